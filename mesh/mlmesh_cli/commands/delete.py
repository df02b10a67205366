"""`mlmesh delete`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

_DEADLINE_S = 30.0


def delete(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KIND NAME]...", help="Kinds and names, or KIND/NAME.", show_default=False),
    ] = None,
    *,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file",
            "--filename",
            "-f",
            help="What these files define (- is standard input); may be repeated.",
            show_default=False,
        ),
    ] = None,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="Namespace of names.")] = "mlmesh",
    ignore_missing: Annotated[bool, typer.Option("--ignore-not-found", help="What is not there is no error.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Remove Istio resources from every sidecar, or nothing where what is left would not fit together.

    [bold]Examples[/bold]

      mlmesh delete AuthorizationPolicy deny-all

      mlmesh delete VirtualService/inference DestinationRule/inference

      mlmesh delete -f experiment.yaml --ignore-not-found
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.defaults import read_documents  # noqa: PLC0415
        from mlmesh_cli.deleting import named, of_files  # noqa: PLC0415
        from mlmesh_cli.render.status import changes_view  # noqa: PLC0415

        request = pb.DeleteResourcesRequest(dry_run=dry_run, allow_missing=ignore_missing)
        for kind, name in [*named(names or (), namespace), *of_files(read_documents(file or [], sys.stdin.read))]:
            request.resources.add(kind=kind, name=name)
        async with Connection.from_environment(state_dir) as connection:
            response = await (await connection.control()).DeleteResources(request, timeout=_DEADLINE_S)
        terminal.show(changes_view(response, dry_run=dry_run), response)

    run(terminal, main)
