"""`mlmesh config`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlmesh_cli.commands.translating import TranslateFormat
from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

config_app = typer.Typer(help="Show what sidecars were told, and what they run.", no_args_is_help=True)

_Proxy = Annotated[
    str, typer.Argument(metavar="[PROXY]", help="An instance, or a workload for all of its replicas; all without one.")
]
_Live = Annotated[bool, typer.Option("--live", help="Also ask each Envoy what it runs, and compare.")]


@config_app.command("summary")
def summary(
    proxy: _Proxy = "",
    live: _Live = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show how far each sidecar took its configuration: versions, counts by type, and what it refused.

    With --live it exits with 1 when an Envoy runs something else than it was sent.

    [bold]Examples[/bold]

      mlmesh config summary

      mlmesh config summary inference-v1 --live

      mlmesh config summary -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.configurations import compare_all, not_same, summaries  # noqa: PLC0415  keeps --help quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.errors import CliError  # noqa: PLC0415
        from mlmesh_cli.render.config import compared_view, summary_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            proxies = await summaries(await connection.control(), proxy=proxy, content=live)
        compared = await compare_all(proxies) if live else {}
        terminal.show(
            lambda: compared_view(summary_table(proxies), compared, only_different=True),
            {"proxies": [one.document(compared.get(one.name)) for one in proxies]},
        )
        different = not_same(compared)
        if different:
            raise CliError(
                f"{different} resources are not what was sent",
                "they may be on their way: try again; `mlmesh config dump PROXY --live` shows each",
                reason="CONFIG_DIFFERS",
            )

    run(terminal, main)


@config_app.command("dump")
def dump(
    proxy: _Proxy = "",
    kind: Annotated[
        str,
        typer.Option(
            "--type", "-t", help="Only listeners, routes, clusters, endpoints, extensions or secrets (names only)."
        ),
    ] = "",
    live: _Live = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Annotated[
        TranslateFormat, typer.Option("--output", "-o", help="table of versions; json or yaml with the resources.")
    ] = TranslateFormat.TABLE,
) -> None:
    """Show what the control plane sent, resource by resource: versions, what was taken, and the content.

    With --live, also what Envoy runs (its own /config_dump), and where the two differ.

    [bold]Examples[/bold]

      mlmesh config dump toolbox-0

      mlmesh config dump toolbox-0 --type routes -o yaml

      mlmesh config dump inference-v1 --live
    """
    terminal = Terminal(OutputFormat.TABLE if output is TranslateFormat.TABLE else OutputFormat.JSON)

    async def main() -> None:
        from mlmesh_cli.configurations import compare_all, summaries  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.config import compared_view, sent_table  # noqa: PLC0415
        from mlmesh_cli.render.translating import yaml_text  # noqa: PLC0415

        wanted = live or output is not TranslateFormat.TABLE
        async with Connection.from_environment(state_dir) as connection:
            proxies = await summaries(await connection.control(), proxy=proxy, kind=kind, content=wanted)
        compared = await compare_all(proxies, kind=kind) if live else {}
        value = {"proxies": [one.document(compared.get(one.name), content=True) for one in proxies]}
        if output is TranslateFormat.YAML:
            terminal.out.file.write(yaml_text(value))
            return
        terminal.show(lambda: compared_view(sent_table(proxies), compared, only_different=False), value)

    run(terminal, main)
