"""`mlmesh streams`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

streams_app = typer.Typer(
    name="streams", help="Open inference streams: where they are, and moving them.", no_args_is_help=True
)

Addresses = Annotated[
    list[str] | None,
    typer.Option(
        "--address",
        help="host:port of inference processes instead of the laptop mesh; a name stands for all of its addresses.",
        show_default=False,
    ),
]


@streams_app.command("list")
def list_streams(
    address: Addresses = None, state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE
) -> None:
    """Show how many streams are open, by process and by the version that they last asked.

    [bold]Examples[/bold]

      mlmesh streams list

      mlmesh streams list -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.moving import processes_of  # noqa: PLC0415
        from mlmesh_cli.render.streams import processes_dict, streams_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            processes = await processes_of(connection, address or ())
        terminal.show(streams_table(processes), processes_dict(processes))

    run(terminal, main)


@streams_app.command("move")
def move_streams(
    *,
    model: Annotated[
        str, typer.Argument(metavar="[MODEL[/VERSION]]", help="Only streams that last asked it; default: all.")
    ] = "",
    share: Annotated[float, typer.Option(help="Share of them to move, above 0 to 1.", min=0.0, max=1.0)] = 1.0,
    spread: Annotated[float, typer.Option(help="Seconds over which they are asked.", min=0.0, max=3600.0)] = 0.5,
    follow: Annotated[
        bool, typer.Option("--follow", help="Move as many as it takes to be spread as the routes' weights say.")
    ] = False,
    address: Addresses = None,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Have open streams opened again, so that they land by the mesh's present weights.

    `mlmesh apply` does it by itself after weights have changed. No message is lost or answered twice; streams whose
    client cannot move stay.

    [bold]Examples[/bold]

      mlmesh streams move --follow

      mlmesh streams move mnist/1 --share 0.5 --spread 30

      mlmesh streams move --address inference-pods.mlmesh.svc.cluster.local:9000 --share 0.9 --spread 60
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.errors import usage_error  # noqa: PLC0415
        from mlmesh_cli.moving import follow_weights, move, processes_of  # noqa: PLC0415
        from mlmesh_cli.names import parse_model  # noqa: PLC0415
        from mlmesh_cli.render.streams import moved_dict, moved_view  # noqa: PLC0415

        if follow and (model or address):
            raise usage_error("--follow looks at all streams of the laptop mesh", "leave out MODEL and --address")
        if not share:
            raise usage_error("--share is more than 0", "give the share to move, such as 0.5")
        parent = ""
        if model:
            reference = parse_model(model)
            parent = f"models/{reference.model}" + (f"/versions/{reference.version}" if reference.version else "")
        async with Connection.from_environment(state_dir) as connection:
            if follow:
                moved = await follow_weights(connection, spread_s=spread)
            else:
                processes = await processes_of(connection, address or ())
                shares = dict.fromkeys((process.name for process in processes), share)
                moved = await move(processes, shares, parent=parent, spread_s=spread)
        terminal.show(moved_view(moved), moved_dict(moved))

    run(terminal, main)
