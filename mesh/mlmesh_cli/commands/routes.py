"""`mlmesh routes`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir, Watch
from mlmesh_cli.terminal import Terminal, run

_INTERVAL_S = 1.0


def routes(
    host: Annotated[str, typer.Argument(help="Only this service, such as inference or its full host name.")] = "",
    watch: Watch = False,
    window: Annotated[float, typer.Option(help="Seconds over which shares are observed.", min=1, max=3600)] = 60.0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show how traffic is routed now: rules, weights and the shares really observed.

    [bold]Examples[/bold]

      mlmesh routes

      mlmesh routes inference --watch --window 10

      mlmesh routes -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        import asyncio  # noqa: PLC0415  keeps `mlmesh --help` quick

        from rich.live import Live  # noqa: PLC0415

        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415
        from mlmesh_cli.config import full_host  # noqa: PLC0415
        from mlmesh_cli.connection import CONTROL_DEADLINE_S, Connection, duration  # noqa: PLC0415
        from mlmesh_cli.render.status import routes_view  # noqa: PLC0415

        request = pb.ListRoutesRequest(host=full_host(host), share_window=duration(window))
        async with Connection.from_environment(state_dir) as connection:
            control = await connection.control()
            response = await control.ListRoutes(request, timeout=CONTROL_DEADLINE_S)
            if not watch:
                terminal.show(routes_view(response.routes), response)
                return
            with Live(console=terminal.out, auto_refresh=False, transient=terminal.json) as live:
                while True:
                    terminal.line(response)
                    if not terminal.json:
                        live.update(routes_view(response.routes), refresh=True)
                    await asyncio.sleep(_INTERVAL_S)
                    response = await control.ListRoutes(request, timeout=CONTROL_DEADLINE_S)

    run(terminal, main)
