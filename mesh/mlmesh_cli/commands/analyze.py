"""`mlmesh analyze` and `mlmesh conditions`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Files, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run


class Threshold(StrEnum):
    """Severities, the mildest first."""

    INFO = "Info"
    WARNING = "Warning"
    ERROR = "Error"


def analyze(
    file: Files = None,
    *,
    live: Annotated[bool, typer.Option("--live", help="Look at the files together with the running mesh.")] = False,
    suppress: Annotated[
        list[str] | None,
        typer.Option(
            "--suppress",
            "-S",
            help='A code not to report of a resource, "CODE=Kind namespace/name"; * stands for any part.',
            show_default=False,
        ),
    ] = None,
    output_threshold: Annotated[Threshold, typer.Option(help="Show findings of this severity and worse.")] = (
        Threshold.INFO
    ),
    failure_threshold: Annotated[
        Threshold, typer.Option(help="Exit with 79 when there is a finding of this severity or worse.")
    ] = Threshold.ERROR,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Find what is wrong with resources, with the codes of istioctl analyze: what is missing, conflicts or never acts.

    Looks at files, or at the running mesh where none are named.

    [bold]Examples[/bold]

      mlmesh analyze

      mlmesh analyze -f manifests/base -f mesh/istio

      mlmesh analyze -f route.yaml --live -o json

      mlmesh analyze -f . --failure-threshold Warning -S "IST0118=Service shop/*"
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.analyzing import look, report  # noqa: PLC0415  keeps `mlmesh --help` quick

        found = await look(state_dir, file, live=live, suppress=suppress or [])
        report(terminal, found, show=output_threshold.value, fail=failure_threshold.value)

    run(terminal, main)


def conditions(
    file: Files = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show the statuses of Gateways and routes of the Gateway API: what is accepted, resolved and programmed.

    Of the running mesh, or of what files would make.

    [bold]Examples[/bold]

      mlmesh conditions

      mlmesh conditions -f gateway.yaml -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.analyzing import conditions_table, statuses  # noqa: PLC0415  keeps `mlmesh --help` quick

        found = await statuses(state_dir, file)
        terminal.show(lambda: conditions_table(found), found)

    run(terminal, main)
