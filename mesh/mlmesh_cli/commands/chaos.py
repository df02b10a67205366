"""`mlmesh chaos`: faults on purpose."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir
from mlmesh_cli.terminal import Terminal, run

if TYPE_CHECKING:
    from mlmesh.local.v1 import local_pb2 as pb
    from mlmesh_cli.chaos import RouteFault

chaos_app = typer.Typer(
    help="Break things on purpose: kill and stop processes, delay and abort calls, slow, cut and corrupt connections.",
    no_args_is_help=True,
)

_DEADLINE_S = 30.0
Target = Annotated[
    str, typer.Argument(help="Workload (all its replicas) or instance, such as inference-v1 or registry-0.")
]
Host = Annotated[str, typer.Argument(help="Service that is called, such as inference or its full host name.")]
Duration = Annotated[float, typer.Option("--for", help="Seconds until it ends by itself.", min=0.1, max=3600)]
Sidecar = Annotated[bool, typer.Option("--sidecar", help="Its Envoy instead of its application.")]
Percent = Annotated[float, typer.Option(help="Share of the calls.", min=0.0, max=100.0)]
Method = Annotated[str, typer.Option(help="Only calls of this gRPC method, /package.Service/Method.")]
Header = Annotated[
    list[str] | None, typer.Option("--header", "-H", help="Only calls with NAME=VALUE; may be repeated.")
]
Keep = Annotated[bool, typer.Option("--keep", help="Do not wait: the fault stays until `mlmesh chaos clear`.")]
Print = Annotated[
    bool, typer.Option("--print", help="Only print the YAML, to apply it elsewhere, such as with kubectl.")
]


@chaos_app.command()
def kill(
    target: Target,
    sidecar: Sidecar = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Kill a process (SIGKILL). The mesh starts it again, after a pause that grows.

    [bold]Examples[/bold]

      mlmesh chaos kill inference-v1

      mlmesh chaos kill registry-0 --sidecar
    """
    _process(target, sidecar=sidecar, stop=False, duration_s=None, terminal=Terminal(output), state_dir=state_dir)


@chaos_app.command()
def stop(
    target: Target,
    duration: Duration = 10.0,
    sidecar: Sidecar = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Stop a process (SIGSTOP) for a time: it hangs, and closes nothing.

    [bold]Examples[/bold]

      mlmesh chaos stop registry --for 30
    """
    _process(target, sidecar=sidecar, stop=True, duration_s=duration, terminal=Terminal(output), state_dir=state_dir)


@chaos_app.command()
def delay(
    host: Host,
    *,
    by: Annotated[float, typer.Option("--by", help="Milliseconds that each call is late.", min=1)] = 500.0,
    percent: Percent = 100.0,
    method: Method = "",
    header: Header = None,
    duration: Duration = 30.0,
    keep: Keep = False,
    print_only: Print = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Delay calls of a service, by its VirtualService. Envoy injects it before the router: retries do not see it.

    [bold]Examples[/bold]

      mlmesh chaos delay inference --by 300 --percent 50 --for 20

      mlmesh chaos delay registry --by 2000 --method /mlmesh.registry.v1.ModelRegistryService/GetModel
    """

    def fault() -> RouteFault:
        from mlmesh_cli.chaos import RouteFault, header_pairs  # noqa: PLC0415  keeps `mlmesh --help` quick

        return RouteFault(delay_s=by / 1000, percent=percent, method=method, headers=header_pairs(header or ()))

    _route(host, fault, duration, keep=keep, print_only=print_only, terminal=Terminal(output), state_dir=state_dir)


@chaos_app.command()
def abort(
    host: Host,
    *,
    status: Annotated[str, typer.Option(help="gRPC status by name, or HTTP status by number.")] = "UNAVAILABLE",
    percent: Percent = 100.0,
    method: Method = "",
    header: Header = None,
    duration: Duration = 30.0,
    keep: Keep = False,
    print_only: Print = False,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """End calls of a service with a status, by its VirtualService. Not retried, in Istio as here.

    [bold]Examples[/bold]

      mlmesh chaos abort inference --status RESOURCE_EXHAUSTED --percent 20

      mlmesh chaos abort inference --header x-user=ada --print | kubectl apply -f -
    """

    def fault() -> RouteFault:
        from mlmesh_cli.chaos import RouteFault, header_pairs  # noqa: PLC0415  keeps `mlmesh --help` quick

        return RouteFault(
            grpc_status="" if status.isdigit() else status.upper(),
            http_status=int(status) if status.isdigit() else 0,
            percent=percent,
            method=method,
            headers=header_pairs(header or ()),
        )

    _route(host, fault, duration, keep=keep, print_only=print_only, terminal=Terminal(output), state_dir=state_dir)


@chaos_app.command()
def slow(
    target: Target,
    *,
    by: Annotated[float, typer.Option("--by", help="Milliseconds that bytes are late, each way.", min=0)] = 100.0,
    jitter: Annotated[float, typer.Option(help="Milliseconds more, at random.", min=0)] = 0.0,
    rate: Annotated[int, typer.Option(help="Bytes a second and connection, each way; 0 is no bound.", min=0)] = 0,
    duration: Duration = 30.0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Slow the connections to a workload down, below TLS, by a proxy put between. Acts on new connections.

    [bold]Examples[/bold]

      mlmesh chaos slow registry --by 200 --jitter 100

      mlmesh chaos slow inference-v1-0 --by 0 --rate 100000 --for 60
    """
    from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
    from mlmesh_cli.connection import duration as seconds  # noqa: PLC0415

    fault = pb.NetworkFault(delay=seconds(by / 1000), jitter=seconds(jitter / 1000), bytes_per_second=rate)
    _network(target, fault, duration, terminal=Terminal(output), state_dir=state_dir)


@chaos_app.command()
def cut(
    target: Target,
    hang: Annotated[
        str,
        typer.Option(help="Cut nothing, but let bytes vanish: requests, responses or both. A link that is half dead."),
    ] = "",
    duration: Duration = 30.0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Cut a workload off: connections through the proxy are reset, new ones refused. What was open before goes on.

    Call [bold]mlmesh chaos watch[/bold] first, and streams that open from then on can be cut later.

    [bold]Examples[/bold]

      mlmesh chaos cut inference-v1 --for 10

      mlmesh chaos cut registry --hang responses
    """
    from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
    from mlmesh_cli.errors import usage_error  # noqa: PLC0415

    directions = {
        "": pb.BLACKHOLE_DIRECTION_UNSPECIFIED,
        "requests": pb.BLACKHOLE_DIRECTION_REQUESTS,
        "responses": pb.BLACKHOLE_DIRECTION_RESPONSES,
        "both": pb.BLACKHOLE_DIRECTION_BOTH,
    }
    terminal = Terminal(output)

    async def fault() -> pb.NetworkFault:
        if hang not in directions:
            raise usage_error(f"--hang {hang!r} is not requests, responses or both", "leave it out to cut")
        return pb.NetworkFault(cut=not hang, blackhole=directions[hang])

    _network(target, fault, duration, terminal=terminal, state_dir=state_dir)


@chaos_app.command()
def corrupt(
    target: Target,
    percent: Annotated[float, typer.Option(help="Share of the pieces of data.", min=0.0, max=100.0)] = 1.0,
    duration: Duration = 30.0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Turn bits over on the way to a workload. Mutual TLS notices, and ends the connection.

    [bold]Examples[/bold]

      mlmesh chaos corrupt inference-v1 --percent 5
    """
    from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick

    _network(target, pb.NetworkFault(corrupt_percent=percent), duration, terminal=Terminal(output), state_dir=state_dir)


@chaos_app.command()
def watch(
    target: Target,
    duration: Duration = 600.0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Put the proxy in front of a workload and break nothing yet: what opens from now on can be broken later.

    [bold]Examples[/bold]

      mlmesh chaos watch inference-v1
    """
    from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick

    _network(target, pb.NetworkFault(), duration, terminal=Terminal(output), state_dir=state_dir)


@chaos_app.command("list")
def list_faults(state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """List the faults that are active.

    [bold]Examples[/bold]

      mlmesh chaos list
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.chaos import virtual_services  # noqa: PLC0415
        from mlmesh_cli.connection import Connection  # noqa: PLC0415
        from mlmesh_cli.render.chaos import faults_view  # noqa: PLC0415
        from mlmesh_cli.terminal import message_dict  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            control = await connection.control()
            response = await control.ListFaults(pb.ListFaultsRequest(), timeout=_DEADLINE_S)
            routes = [each.name for each in await virtual_services(control) if each.original is not None]
        value = {**message_dict(response), "virtual_services": routes}
        terminal.show(faults_view(response.faults, routes, datetime.now(UTC)), value)

    run(terminal, main)


@chaos_app.command()
def clear(
    target: Annotated[str, typer.Argument(help="Only this workload or instance; the routes' faults stay then.")] = "",
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """End every fault now, and restore the VirtualServices as they were.

    [bold]Examples[/bold]

      mlmesh chaos clear
    """
    terminal = Terminal(output)

    async def main() -> None:
        from rich.text import Text  # noqa: PLC0415  keeps `mlmesh --help` quick

        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415
        from mlmesh_cli.chaos import restore  # noqa: PLC0415
        from mlmesh_cli.connection import Connection  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            control = await connection.control()
            response = await control.RemoveFaults(pb.RemoveFaultsRequest(target=target), timeout=_DEADLINE_S)
            restored = [] if target else await restore(control)
        parts = [f"{response.removed} faults ended", *(f"VirtualService {name} restored" for name in restored)]
        terminal.show(Text(", ".join(parts), style="green"), {"removed": response.removed, "restored": restored})

    run(terminal, main)


def _process(
    target: str, *, sidecar: bool, stop: bool, duration_s: float | None, terminal: Terminal, state_dir: StateDir
) -> None:
    async def main() -> None:
        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import duration as seconds  # noqa: PLC0415

        part = pb.PROCESS_PART_SIDECAR if sidecar else pb.PROCESS_PART_APPLICATION
        request = pb.InjectFaultRequest(target=target, process=pb.ProcessFault(part=part, stop=stop))
        if duration_s is not None:
            request.duration.CopyFrom(seconds(duration_s))
        await _inject(request, "stopped" if stop else "killed", terminal, state_dir)

    run(terminal, main)


def _network(
    target: str,
    fault: pb.NetworkFault | Callable[[], Awaitable[pb.NetworkFault]],
    duration_s: float,
    *,
    terminal: Terminal,
    state_dir: StateDir,
) -> None:
    async def main() -> None:
        from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.connection import duration as seconds  # noqa: PLC0415

        network = await fault() if callable(fault) else fault
        request = pb.InjectFaultRequest(target=target, duration=seconds(duration_s), network=network)
        await _inject(request, "disturbed", terminal, state_dir)

    run(terminal, main)


async def _inject(request: pb.InjectFaultRequest, done: str, terminal: Terminal, state_dir: StateDir) -> None:
    from rich.console import Group  # noqa: PLC0415  keeps `mlmesh --help` quick
    from rich.text import Text  # noqa: PLC0415

    from mlmesh_cli.connection import Connection  # noqa: PLC0415
    from mlmesh_cli.render.chaos import faults_view  # noqa: PLC0415

    async with Connection.from_environment(state_dir) as connection:
        response = await (await connection.control()).InjectFault(request, timeout=_DEADLINE_S)
    head = Text(f"{done}: {', '.join(response.instances)}", style="yellow")
    now = datetime.now(UTC)
    terminal.show(Group(head, faults_view(response.faults, (), now)) if response.faults else head, response)


def _route(
    host: str,
    fault: Callable[[], RouteFault],
    duration_s: float,
    *,
    keep: bool,
    print_only: bool,
    terminal: Terminal,
    state_dir: StateDir,
) -> None:
    async def main() -> None:
        import asyncio  # noqa: PLC0415  keeps `mlmesh --help` quick

        from rich.text import Text  # noqa: PLC0415

        from mlmesh_cli.chaos import inject, prepared, restore, virtual_services  # noqa: PLC0415
        from mlmesh_cli.config import full_host  # noqa: PLC0415
        from mlmesh_cli.connection import Connection  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            control = await connection.control()
            texts = prepared(await virtual_services(control), full_host(host), fault())
            names = ", ".join(texts)
            if print_only:
                terminal.out.file.write("---\n".join(texts.values()))
                return
            response = await inject(control, texts)
            lasting = "until `mlmesh chaos clear`" if keep else f"for {duration_s:g} s; Ctrl-C ends it"
            terminal.show(Text(f"injected by VirtualService {names}, {lasting}", style="yellow"), response)
            if keep:
                return
            try:
                await asyncio.sleep(duration_s)
            finally:
                # Also at Ctrl-C: what was there before comes back.
                await asyncio.shield(restore(control, list(texts)))
            terminal.say(Text(f"VirtualService {names} restored", style="green"))

    run(terminal, main)
