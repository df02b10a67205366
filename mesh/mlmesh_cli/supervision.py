"""Starting and ending the supervisor of the laptop mesh."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import grpc

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.connection import Connection
from mlmesh_cli.errors import CliError
from mlmesh_local.launcher import Progress, StartFailed, shut_down, start_detached
from mlmesh_local.options import ControlPlane, Options

_LOOK_S = 0.25
_LOG_CHARACTERS_MAX = 600
_HINTS = {
    "MESH_RUNNING": "look at it with `mlmesh status`, or end it with `mlmesh down`",
    "PORT_IN_USE": "choose another one with --gateway-address HOST:PORT, or none at all with --gateway-address none",
    "INVALID_RESOURCE": "correct the file and start again",
    "ENVOY_NOT_FOUND": "install it with `pip install 'mlmesh[local]'`, or put an envoy on the PATH",
    "ISTIOD_MISSING": "`make tools` builds it (.tools/bin/pilot-discovery); name it by --istiod or MLMESH_ISTIOD",
    "START_TIMED_OUT": "look into the logs, or allow more time with --timeout",
}


@dataclass(slots=True)
class Starting:
    """How far a start is.

    Attributes:
        steps: what the supervisor told, newest last.
        status: of the mesh, once it answers.
    """

    steps: list[str] = field(default_factory=list)
    status: pb.MeshStatus | None = None


def options(
    state_dir: Path,
    manifests: Sequence[Path],
    istio: Sequence[Path],
    gateway_address: str,
    *,
    control_plane: ControlPlane = "mlmesh",
    istiod: str = "",
    otlp_endpoint: str = "",
    spiffe_socket: str = "",
) -> Options:
    """What the supervisor is started with."""
    return Options(
        state_dir=state_dir,
        manifests=tuple(manifests),
        istio=tuple(istio),
        gateway_address=gateway_address,
        control_plane=control_plane,
        istiod=istiod,
        otlp_endpoint=otlp_endpoint,
        spiffe_socket=spiffe_socket,
    )


def start_error(error: StartFailed) -> CliError:
    """What a person sees of a start that failed."""
    problem = error.message
    if error.reason in _HINTS:
        # The launcher's own advice comes after a semicolon; here it is the hint's line.
        problem = problem.partition("; ")[0]
    if error.log_tail:
        problem += f": {' | '.join(error.log_tail.strip().splitlines()[-3:])[-_LOG_CHARACTERS_MAX:]}"
    hint = _HINTS.get(error.reason) or (f"the whole story is in {error.log}" if error.log else "")
    return CliError(problem, hint, reason=error.reason)


async def start(
    chosen: Options, *, timeout_s: float, seen: Callable[[Starting], None] = lambda _starting: None
) -> pb.MeshStatus:
    """Starts the supervisor in the background and waits until the mesh is ready.

    When it does not get ready, or the wait is cancelled, what was started is ended again.

    Args:
        chosen: what to start.
        timeout_s: longest wait, seconds.
        seen: called whenever there is news.

    Returns:
        The status once it is ready.

    Raises:
        CliError: one is running here already, something does not start, or it was not ready in time.
    """
    now = Starting()
    async with Connection.from_environment(chosen.state_dir) as connection:
        async with asyncio.TaskGroup() as group:
            looking = group.create_task(_look(connection, now, seen))
            try:
                # Closing it early ends what was started; an iterator left to the garbage collector might not.
                begun = cast("AsyncGenerator[Progress, None]", start_detached(chosen, timeout_s=timeout_s))
                async with contextlib.aclosing(begun) as steps:
                    async for step in steps:
                        now.steps.append(step.message)
                        seen(now)
            except StartFailed as error:
                raise start_error(error) from None
            finally:
                looking.cancel()
        return await connection.status()


async def _look(connection: Connection, now: Starting, seen: Callable[[Starting], None]) -> None:
    while True:
        await asyncio.sleep(_LOOK_S)
        with contextlib.suppress(CliError, grpc.aio.AioRpcError):
            now.status = await connection.status()
        seen(now)


async def stop(state_dir: Path, said: Callable[[str], None] = lambda _step: None) -> None:
    """Drains and ends the mesh, by force when it does not answer; `said` is told each step. None running is fine."""
    async for step in shut_down(state_dir):
        said(step)
