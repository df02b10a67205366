"""`mlmesh init`, `up`, `down`, `status`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlmesh_cli.options import DEFAULT_STATE_DIR, Output, OutputFormat, StateDir, Watch
from mlmesh_cli.terminal import Terminal, run

if TYPE_CHECKING:
    from mlmesh.local.v1 import local_pb2 as pb
    from rich.live import Live

    from mlmesh_cli.connection import Connection

GATEWAY_ADDRESS = "127.0.0.1:8443"


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


def up(
    *,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", help="YAML file or folder; may be repeated.", show_default=False),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay here, log here; Ctrl-C ends the mesh.")
    ] = False,
    gateway_address: Annotated[
        str, typer.Option(help="HOST:PORT at which the ingress gateway listens besides its own address, or none.")
    ] = GATEWAY_ADDRESS,
    timeout: Annotated[float, typer.Option(help="Longest wait until it is ready, seconds.", min=1)] = 120.0,
    state_dir: StateDir = DEFAULT_STATE_DIR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Start the mesh of this folder in the background: every workload as a process behind an Envoy of its own.

    Reads manifests/base and mesh/istio here, or the built-in defaults where they are missing.

    [bold]Examples[/bold]

      mlmesh up

      mlmesh up --gateway-address 127.0.0.1:9443

      mlmesh up -f manifests/base -f my-istio/ --foreground
    """
    terminal = Terminal(output)

    async def main() -> None:
        from mlmesh_cli.defaults import find_folders  # noqa: PLC0415  keeps `mlmesh --help` quick
        from mlmesh_cli.errors import CliError  # noqa: PLC0415
        from mlmesh_cli.render.status import status_view  # noqa: PLC0415
        from mlmesh_cli.supervision import start  # noqa: PLC0415

        paths, builtin = (file, False) if file else find_folders(Path())
        for path in paths:
            if not path.exists():
                raise CliError(f"{path} does not exist", "name YAML files or folders of them", reason="FILE_NOT_FOUND")
        if builtin:
            terminal.say(
                "no manifests/base and mesh/istio here: using the built-in ones (`mlmesh init` writes them out)"
            )
        with starting(terminal) as seen:
            status = await start(state_dir, paths, gateway_address=gateway_address, timeout_s=timeout, seen=seen)
        terminal.show(status_view(status, datetime.now(UTC)), status)
        terminal.say("next: `mlmesh train`, `mlmesh infer`, `mlmesh routes`; end it with `mlmesh down`")

    if foreground:
        from mlmesh_cli.foreground import run_foreground  # noqa: PLC0415

        run_foreground(terminal, state_dir, file, gateway_address=gateway_address)
        return
    run(terminal, main)


class starting:  # noqa: N801  used as a function: `with starting(terminal) as seen`
    """Draws what starts, in place."""

    def __init__(self, terminal: Terminal) -> None:
        from rich.live import Live  # noqa: PLC0415  keeps `mlmesh --help` quick

        # Only the last view stays, and that is replaced by the whole status.
        console = terminal.err if terminal.json else terminal.out
        self._live: Live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> starting:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, status: pb.MeshStatus | None, elapsed_s: float) -> None:
        from mlmesh_cli.render.status import starting_view  # noqa: PLC0415

        if self._live.console.is_terminal:
            self._live.update(starting_view(status, elapsed_s), refresh=True)


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

        running = await stop(state_dir, said)
        said("the mesh is down" if running else f"no mesh was running in {state_dir}")

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
    from mlmesh.local.v1 import local_pb2 as pb  # noqa: PLC0415
    from rich.live import Live  # noqa: PLC0415

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
