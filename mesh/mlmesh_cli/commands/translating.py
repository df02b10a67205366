"""`mlmesh translate`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from mlmesh_cli.options import Files, OutputFormat
from mlmesh_cli.terminal import Terminal, run


class TranslateFormat(StrEnum):
    """How Envoy's resources are printed."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


def translate(
    file: Files = None,
    proxy: Annotated[
        str, typer.Option("--proxy", help="Only this instance, or all of this workload.", show_default=False)
    ] = "",
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            "-t",
            help="Only listeners, routes, clusters, endpoints or extensions; may be repeated.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        TranslateFormat,
        typer.Option("--output", "-o", help="table of names and versions; yaml or json with the resources."),
    ] = TranslateFormat.TABLE,
) -> None:
    """Show what Envoys would be told for these files. Nothing runs, and equal files give equal output.

    Without files it takes those that `mlmesh up` would read here.

    [bold]Examples[/bold]

      mlmesh translate

      mlmesh translate -f manifests/base -f mesh/istio --proxy toolbox-0 --type routes -o yaml

      mlmesh translate -f manifests/overlays/cpu -o json
    """
    terminal = Terminal(OutputFormat.TABLE if output is TranslateFormat.TABLE else OutputFormat.JSON)

    async def main() -> None:
        from mlmesh_cli.render.translating import items_table, items_tree, items_yaml  # noqa: PLC0415
        from mlmesh_cli.worlds import files_world  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_local.inspection import find_proxies, items  # noqa: PLC0415

        seen = files_world(file or [])
        for note in seen.notes:
            terminal.warn(note)
        proxies = find_proxies(seen.world, proxy) if proxy else seen.world.proxies
        found = list(items(seen.world, proxies, tuple(types or ())))
        if output is TranslateFormat.YAML:
            terminal.out.file.write(items_yaml(found))
            return
        terminal.show(lambda: items_table(found), items_tree(found))

    run(terminal, main)
