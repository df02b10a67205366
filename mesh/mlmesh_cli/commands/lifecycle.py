"""`mlmesh init`, `up`, `down`, `status`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir, Watch
from mlmesh_cli.terminal import Terminal, run

if TYPE_CHECKING:
    from mlmesh_cli.connection import Connection
    from mlmesh_cli.supervision import Starting

GATEWAY_ADDRESS = "127.0.0.1:8443"


class ControlPlane(StrEnum):
    """Who configures the Envoys."""

    MLMESH = "mlmesh"
    ISTIOD = "istiod"


def init(
    directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to write.", file_okay=False)] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Write the default YAML out to edit: the workloads (manifests/base) and the mesh (mesh/istio).

    [bold]Examples[/bold]

      mlmesh init

      mlmesh init my-platform --force
    """
    terminal = Terminal(output)

    async def main() -> None:
        from rich.text import Text  # noqa: PLC0415  keeps `mlmesh --help` quick

        from mlmesh_cli.defaults import write_out  # noqa: PLC0415

        written, same = write_out(directory, force=force)
        lines = [Text(f"wrote {path}", style="green") for path in written]
        lines += [Text(f"{path} is there already, unchanged", style="dim") for path in same]
        lines.append(Text("now edit them, then start the mesh here with `mlmesh up`"))
        value = {"written": [str(path) for path in written], "unchanged": [str(path) for path in same]}
        terminal.show(Text("\n").join(lines), value)

    run(terminal, main)


Manifests = Annotated[
    list[Path] | None,
    typer.Option("--manifests", help="Kubernetes YAML: a file or a folder; may be repeated.", show_default=False),
]
IstioFiles = Annotated[
    list[Path] | None,
    typer.Option("--istio", help="Istio YAML: a file or a folder; may be repeated.", show_default=False),
]
Foreground = Annotated[bool, typer.Option("--foreground", help="Stay here and log here; Ctrl-C ends the mesh.")]
GatewayAddress = Annotated[
    str, typer.Option(help="HOST:PORT at which the ingress gateway listens besides its own address, or none.")
]
ControlPlaneChoice = Annotated[
    ControlPlane, typer.Option(help="Who configures the Envoys: the laptop mesh, or Istio's own pilot-discovery.")
]
IstiodProgram = Annotated[
    str,
    typer.Option(help="The program pilot-discovery; else MLMESH_ISTIOD, or on PATH.", metavar="PATH"),
]
OtlpEndpoint = Annotated[
    str,
    typer.Option(help="OTLP gRPC collector that gets spans, too: http://127.0.0.1:4317.", metavar="URL"),
]
SpiffeSocket = Annotated[
    str,
    typer.Option(
        help="SPIFFE Workload API that issues the identities, such as SPIRE's: unix:///run/spire/agent.sock.",
        metavar="ADDRESS",
    ),
]


def up(
    *,
    manifests: Manifests = None,
    istio: IstioFiles = None,
    foreground: Foreground = False,
    gateway_address: GatewayAddress = GATEWAY_ADDRESS,
    control_plane: ControlPlaneChoice = ControlPlane.MLMESH,
    istiod: IstiodProgram = "",
    otlp_endpoint: OtlpEndpoint = "",
    spiffe_socket: SpiffeSocket = "",
    timeout: Annotated[float, typer.Option(help="Longest wait until it is ready, seconds.", min=1)] = 180.0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Start the mesh of this folder in the background: every workload as a process behind an Envoy of its own.

    Reads manifests/base and mesh/istio here, or the built-in defaults where they are missing.

    [bold]Examples[/bold]

      mlmesh up

      mlmesh up --gateway-address 127.0.0.1:9443

      mlmesh up --istio my-istio/ --foreground

      mlmesh up --control-plane istiod --istiod .tools/bin/pilot-discovery
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.defaults import choose_folders  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.render.status import status_view  # noqa: PLC0415
        from mlmesh_cli.supervision import options, start  # noqa: PLC0415

        chosen = choose_folders(Path(), manifests or [], istio or [])
        if chosen.builtin:
            terminal.say(
                f"no {' and '.join(chosen.builtin)} here: the built-in YAML it is (`mlmesh init` writes it out)"
            )
        started = options(
            state_dir,
            chosen.manifests,
            chosen.istio,
            gateway_address,
            control_plane=control_plane.value,
            istiod=istiod,
            otlp_endpoint=otlp_endpoint,
            spiffe_socket=spiffe_socket,
        )
        if foreground:
            # The supervisor takes this process over: signals, exit code and terminal are its own.
            os.execv(sys.executable, [sys.executable, "-m", "mlmesh_local", *started.arguments()])  # noqa: S606
        with starting(terminal) as seen:
            status = await start(started, timeout_s=timeout, seen=seen)
        terminal.show(status_view(status, datetime.now(UTC)), status)
        terminal.say("next: `mlmesh train`, `mlmesh infer`, `mlmesh routes`; end it with `mlmesh down`")

    run(terminal, main)


@contextlib.contextmanager
def starting(terminal: Terminal) -> Iterator[Callable[[Starting], None]]:
    """Draws what starts, in place; gives the function that is told. Only people at a terminal see it."""
    from rich.live import Live  # noqa: PLC0415  keeps `mlmesh --help` quick

    from mlmesh_cli.render.status import starting_view  # noqa: PLC0415

    console = terminal.err if terminal.json else terminal.out
    begin = time.monotonic()
    # Transient: the whole status takes its place.
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def seen(now: Starting) -> None:
            if console.is_terminal:
                live.update(starting_view(now.status, now.steps, time.monotonic() - begin), refresh=True)

        yield seen


def down(state_dir: StateDir = DEFAULT_STATE_DIR, output: Output = OutputFormat.TABLE) -> None:
    """Drain and end the mesh of this folder. Trained models and accepted jobs stay on disk.

    [bold]Examples[/bold]

      mlmesh down
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.supervision import stop  # noqa: PLC0415  keeps `mlmesh --help` quick

        def said(step: str) -> None:
            terminal.line({"message": step})
            if not terminal.json:
                terminal.say(step)

        await stop(state_dir, said)

    run(terminal, main)


def status(
    watch: Watch = False,
    window: Annotated[float, typer.Option(help="Seconds over which shares are observed.", min=1, max=3600)] = 60.0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Show workloads, sidecars, identities, certificates, configuration acknowledged and live traffic shares.

    [bold]Examples[/bold]

      mlmesh status

      mlmesh status --watch

      mlmesh status -o json | jq '.instances[] | {name, state}'
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.connection import Connection  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.render.status import status_view  # noqa: PLC0415

        async with Connection.from_environment(state_dir) as connection:
            if watch:
                await _watch_status(connection, terminal)
                return
            found = await connection.status(share_window_s=window)
        terminal.show(status_view(found, datetime.now(UTC)), found)

    run(terminal, main)


async def _watch_status(connection: Connection, terminal: Terminal) -> None:
    from rich.live import Live  # noqa: PLC0415

    from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415
    from mlmesh_cli.connection import duration  # noqa: PLC0415
    from mlmesh_cli.errors import CliError, ExitCode  # noqa: PLC0415
    from mlmesh_cli.render.status import status_view  # noqa: PLC0415

    control = await connection.control()
    call = control.WatchStatus(pb.WatchStatusRequest(interval=duration(1)))
    if terminal.json:
        async for response in call:
            terminal.line(response.status)
    else:
        with Live(console=terminal.out, auto_refresh=False) as live:
            async for response in call:
                live.update(status_view(response.status, datetime.now(UTC)), refresh=True)
    raise CliError("the mesh ended", "start it with `mlmesh up`", reason="MESH_ENDED", exit_code=ExitCode.NOT_RUNNING)
