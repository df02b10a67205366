"""`mlmesh apply`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mlmesh_cli.errors import usage_error
from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run


def apply(
    *,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE|DIR]...", help="YAML files, folders of them, or - for standard input.", show_default=False
        ),
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(
            "--file", "--filename", "-f", help="The same as an argument; may be repeated.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate and show what would change; change nothing.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Also remove active resources that are not in these files.")
    ] = False,
    move: Annotated[
        bool, typer.Option("--move-streams/--leave-streams", help="Have open streams follow changed weights.")
    ] = True,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Make Istio resources active in every sidecar, or refuse them and change nothing.

    [bold]Examples[/bold]

      mlmesh apply -f mesh/istio/virtualservice.yaml

      mlmesh apply mesh/istio --dry-run

      kustomize build my-overlay | mlmesh apply -f -

      mlmesh apply mesh/istio -o json | jq .changes
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.apply import apply_documents, refuse_nothing, streams_follow  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.defaults import read_documents  # noqa: PLC0415
        from mlmesh_cli.render.status import changes_view  # noqa: PLC0415
        from mlmesh_cli.render.streams import moved_line  # noqa: PLC0415

        wanted = [*(paths or []), *(file or [])]
        if not wanted:
            raise usage_error("nothing to apply", "name a YAML file or a folder: mlmesh apply -f mesh/istio")
        documents = read_documents(wanted, sys.stdin.read)
        refuse_nothing(documents)
        async with Connection.from_environment(state_dir) as connection:
            response = await apply_documents(await connection.control(), documents, dry_run=dry_run, prune=prune)
            terminal.show(changes_view(response, dry_run=dry_run), response)
            if move and not dry_run:
                moved = await streams_follow(connection, response)
                if moved is not None and moved.streams:
                    terminal.say(f"streams follow the weights: {moved_line(moved)}")

    run(terminal, main)
