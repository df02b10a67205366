"""`mlmesh traces`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

traces_app = typer.Typer(help="Show where a request spent its time.", no_args_is_help=True)


@traces_app.command("list")
def list_traces(
    count: Annotated[int, typer.Option("--count", "-n", help="Most traces to show.", min=1, max=1000)] = 20,
    span: Annotated[str, typer.Option(help="Only traces with a span of this name.")] = "",
    errors: Annotated[bool, typer.Option("--errors", help="Only traces with an error.")] = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List the traces kept, newest first.

    [bold]Examples[/bold]

      mlmesh traces list

      mlmesh traces list --errors -n 5
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import CONTROL_DEADLINE_S, Connection  # noqa: PLC0415
        from mlmesh_cli.render.traces import traces_table  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            request = pb.ListTracesRequest(page_size=count, span_name=span, errors_only=errors)
            response = await (await connection.control()).ListTraces(request, timeout=CONTROL_DEADLINE_S)
        terminal.show(traces_table(response.traces, datetime.now(UTC)), response)

    run(terminal, main)


@traces_app.command("search")
def search_traces(
    *,
    service: Annotated[str, typer.Option(help="A span of this service, such as inference.mlmesh.")] = "",
    span: Annotated[str, typer.Option(help="A span of this name.")] = "",
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", "-a", help="A span with this attribute; may be repeated.", metavar="NAME[=VALUE]"),
    ] = None,
    request_id: Annotated[str, typer.Option(help="The x-request-id of a call or stream, as access logs show it.")] = "",
    slower_than: Annotated[float, typer.Option(help="Took at least so many milliseconds.", min=0)] = 0.0,
    errors: Annotated[bool, typer.Option("--errors", help="With an error.")] = False,
    since: Annotated[float, typer.Option(help="Began in the last so many seconds; 0: ever.", min=0)] = 0.0,
    count: Annotated[int, typer.Option("--count", "-n", help="Most traces to show.", min=1, max=1000)] = 20,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Find traces by what one of their spans is like, by duration and by time, newest first.

    [bold]Examples[/bold]

      mlmesh traces search --service inference.mlmesh --slower-than 50

      mlmesh traces search -a grpc.status_code=8 --since 300

      mlmesh traces search --request-id 9f3c1d2e-5a6b-4c7d-8e9f-0a1b2c3d4e5f
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import CONTROL_DEADLINE_S, Connection, duration  # noqa: PLC0415
        from mlmesh_cli.render.traces import traces_table  # noqa: PLC0415

        wanted = dict(text.partition("=")[::2] for text in attribute or ())
        if request_id:
            wanted["guid:x-request-id"] = request_id
        now = datetime.now(UTC)
        request = pb.ListTracesRequest(
            page_size=count, service=service, span_name=span, attributes=wanted, errors_only=errors
        )
        if slower_than:
            request.min_duration.CopyFrom(duration(slower_than / 1000))
        if since:
            request.start_time.FromDatetime(now - timedelta(seconds=since))
        async with Connection.from_environment(state_dir) as connection:
            response = await (await connection.control()).ListTraces(request, timeout=CONTROL_DEADLINE_S)
        none = "no trace is like that: `mlmesh traces list` shows all that are kept"
        terminal.show(traces_table(response.traces, now, none), response)

    run(terminal, main)


@traces_app.command("show")
def show_trace(
    trace_id: Annotated[
        str, typer.Argument(metavar="ID|latest", help="Trace id, 32 hex digits, or latest.")
    ] = "latest",
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Draw one trace as a waterfall: client, both sidecars, queue, batch, engine.

    [bold]Examples[/bold]

      mlmesh traces show

      mlmesh traces show 4bf92f3577b34da6a3ce929d0e0e4736 -o json
    """
    terminal = Terminal(output)

    async def main() -> None:
        import re  # noqa: PLC0415  keeps `mlmesh --help` quick

        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415
        from mlmesh_cli.connection import CONTROL_DEADLINE_S, Connection  # noqa: PLC0415
        from mlmesh_cli.errors import usage_error  # noqa: PLC0415
        from mlmesh_cli.render.traces import trace_view  # noqa: PLC0415

        if not re.fullmatch(r"[0-9a-f]{32}|latest", trace_id):
            raise usage_error(
                f"{trace_id!r} is not a trace id", "32 lower-case hex digits, or `latest`; see mlmesh traces list"
            )
        async with Connection.from_environment(state_dir) as connection:
            request = pb.GetTraceRequest(trace_id=trace_id)
            response = await (await connection.control()).GetTrace(request, timeout=CONTROL_DEADLINE_S)
        terminal.show(trace_view(response), response)

    run(terminal, main)
