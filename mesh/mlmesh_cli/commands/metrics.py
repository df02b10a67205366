"""`mlmesh metrics`."""

from __future__ import annotations

from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir, Watch
from mlmesh_cli.terminal import Terminal, run

_INTERVAL_S = 2.0


def metrics(
    *,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", help="Label to group by; may be given several times.", metavar="LABEL"),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", help="Only calls with this label; may be given several times.", metavar="LABEL=VALUE"),
    ] = None,
    window: Annotated[float, typer.Option(help="Seconds to look back.", min=1, max=600)] = 60.0,
    prometheus: Annotated[
        bool,
        typer.Option("--prometheus", help="Print all metrics as Prometheus scrapes them."),
    ] = False,
    watch: Watch = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show rates, errors and latencies of calls in the mesh, by labels of Istio's standard metrics.

    What is shown is what the called side reports; --where reporter=source shows the caller's view.

    [bold]Examples[/bold]

      mlmesh metrics

      mlmesh metrics --by destination_workload --by grpc_response_status --window 300

      mlmesh metrics --where source_workload=client --where reporter=source

      mlmesh metrics --prometheus | grep istio_requests_total
    """
    terminal = Terminal(output)

    async def main() -> None:
        import asyncio  # noqa: PLC0415  keeps `mlmesh --help` quick

        from rich.live import Live  # noqa: PLC0415

        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415
        from mlmesh_cli.connection import CONTROL_DEADLINE_S, Connection, duration  # noqa: PLC0415
        from mlmesh_cli.measuring import conditions, scrape  # noqa: PLC0415
        from mlmesh_cli.render.metrics import metrics_view  # noqa: PLC0415

        request = pb.GetMetricsRequest(window=duration(window), by=by or (), where=conditions(where or (), "--where"))
        async with Connection.from_environment(state_dir) as connection:
            control = await connection.control()
            if prometheus:
                status = await control.GetStatus(pb.GetStatusRequest(), timeout=CONTROL_DEADLINE_S)
                typer.echo(await scrape(status.status.metrics_address), nl=False)
                return
            response = await control.GetMetrics(request, timeout=CONTROL_DEADLINE_S)
            if not watch:
                terminal.show(metrics_view(response), response)
                return
            with Live(console=terminal.out, auto_refresh=False, transient=terminal.json) as live:
                while True:
                    terminal.line(response)
                    if not terminal.json:
                        live.update(metrics_view(response), refresh=True)
                    await asyncio.sleep(_INTERVAL_S)
                    response = await control.GetMetrics(request, timeout=CONTROL_DEADLINE_S)

    run(terminal, main)
