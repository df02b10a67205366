"""`mlmesh doctor`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Files, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run


class Level(StrEnum):
    """How bad a finding must be to make the command fail."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    NEVER = "never"


_BADNESS = ("info", "warning", "error", "never")


def doctor(
    *,
    file: Files = None,
    list_checks: Annotated[bool, typer.Option("--list", help="Show every check, and look at nothing.")] = False,
    fail_on: Annotated[Level, typer.Option("--fail-on", help="Exit with 1 for findings of this kind and worse.")] = (
        Level.WARNING
    ),
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Look for what will go wrong: timeouts on streams, retries twice, missing drain, blind queries, old certificates.

    With --file it reads manifests only. Without, it looks at the running mesh: its resources, its services by
    reflection and channelz, its Envoys by their admin interfaces; where none runs, at what `mlmesh up` would read.

    [bold]Examples[/bold]

      mlmesh doctor

      mlmesh doctor -f manifests/overlays/prod --fail-on error

      mlmesh doctor --list -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.errors import CliError  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.examining import check_documents, context_of, finding_documents  # noqa: PLC0415
        from mlmesh_cli.render.doctor import checks_table, findings_view  # noqa: PLC0415
        from mlmesh_local.doctor import CHECKS, examine  # noqa: PLC0415

        if list_checks:
            terminal.show(lambda: checks_table(CHECKS), check_documents(CHECKS))
            return
        looked = await context_of(state_dir, file)
        for note in looked.notes:
            terminal.warn(note)
        findings = examine(looked.context)
        terminal.show(lambda: findings_view(findings, looked.at), finding_documents(findings, looked.at))
        bad = [one for one in findings if _BADNESS.index(one.severity) >= _BADNESS.index(fail_on.value)]
        if bad:
            raise CliError(
                f"{len(bad)} findings of the kind {fail_on.value} or worse",
                "each tells its fix; an annotation doctor.mlmesh.dev/ignore: ID says that one is meant so",
                reason="FINDINGS",
            )

    run(terminal, main)
