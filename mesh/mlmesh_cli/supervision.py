"""Starting and ending the supervisor of the laptop mesh."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_local.launcher import Supervised, start_detached
from mlmesh_local.state import StateDir

from mlmesh_cli.connection import CONTROL_DEADLINE_S, Connection
from mlmesh_cli.errors import CliError, ExitCode

POLL_S = 0.2
_STOP_S = 60.0
_LOG_LINES = 5

Seen = Callable[[pb.MeshStatus | None, float], None]


def already_running(pid: int, state_dir: Path) -> CliError:
    """A second `mlmesh up`."""
    return CliError(
        f"a mesh is already running in {state_dir} (supervisor {pid})",
        "look at it with `mlmesh status`, or end it with `mlmesh down`",
        reason="MESH_RUNNING",
        exit_code=ExitCode.FAILED,
    )


def last_log_lines(state: StateDir, count: int = _LOG_LINES) -> str:
    """The end of the supervisor's log, in one line; empty when there is none."""
    with contextlib.suppress(OSError):
        lines = state.supervisor_log.read_text(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-count:])
    return ""


async def start(
    state_dir: Path, paths: Sequence[Path], *, gateway_address: str, timeout_s: float, seen: Seen
) -> pb.MeshStatus:
    """Starts the supervisor in the background and waits until the mesh is ready.

    When it does not get ready, or the wait is cancelled, what was started is ended again.

    Args:
        state_dir: its state folder.
        paths: YAML files and folders.
        gateway_address: "host:port" at which the ingress gateway also listens, or "none".
        timeout_s: longest wait.
        seen: called with each status (None: no answer yet) and the seconds since the start.

    Returns:
        The first status that was ready.

    Raises:
        CliError: one is running here already, it ended, or was not ready in time.
    """
    state = StateDir(state_dir)
    if pid := state.running_pid():
        raise already_running(pid, state_dir)
    supervised = await asyncio.to_thread(start_detached, state_dir, paths, gateway_address=gateway_address)
    ready = False
    try:
        status = await _until_ready(state_dir, supervised, timeout_s=timeout_s, seen=seen)
        ready = True
        return status
    finally:
        if not ready:
            await asyncio.shield(stop(state_dir, lambda _step: None))


async def _until_ready(state_dir: Path, supervised: Supervised, *, timeout_s: float, seen: Seen) -> pb.MeshStatus:
    begin = time.monotonic()
    state = StateDir(state_dir)
    status: pb.MeshStatus | None = None
    async with Connection.from_environment(state_dir) as connection:
        while (elapsed := time.monotonic() - begin) < timeout_s:
            if not supervised.alive():
                raise CliError(
                    supervised.problem() or f"the supervisor ended: {last_log_lines(state)}",
                    f"the whole story is in {state.supervisor_log}",
                    reason="SUPERVISOR_ENDED",
                )
            with contextlib.suppress(CliError, grpc.aio.AioRpcError):
                status = await connection.status()
            seen(status, elapsed)
            if status is not None and status.ready:
                return status
            await asyncio.sleep(POLL_S)
    raise CliError(
        f"the mesh was not ready within {timeout_s:.0f} s: {_unready(status)}",
        f"logs are in {state.logs}; it was ended again. Allow more time with --timeout",
        reason="NOT_READY",
    )


def _unready(status: pb.MeshStatus | None) -> str:
    if status is None:
        return "the supervisor does not answer"
    waiting = [
        f"{i.name} ({i.reason or pb.InstanceState.Name(i.state)})"
        for i in status.instances
        if i.state != pb.INSTANCE_STATE_READY
    ]
    return ", ".join(waiting) or "a sidecar has not acknowledged the configuration"


async def stop(state_dir: Path, said: Callable[[str], None]) -> bool:
    """Drains and ends the mesh; a supervisor that does not answer is told by a signal.

    Args:
        state_dir: its state folder.
        said: called with each step.

    Returns:
        Whether there was one.

    Raises:
        CliError: it did not end in time.
    """
    state = StateDir(state_dir)
    pid = state.running_pid()
    if not pid:
        return False
    try:
        async with Connection.from_environment(state_dir) as connection:
            control = await connection.control()
            async for step in control.Shutdown(pb.ShutdownRequest(), timeout=_STOP_S):
                said(step.message)
    except (CliError, grpc.aio.AioRpcError):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while state.running_pid():
        if time.monotonic() > deadline:
            raise CliError(
                f"the supervisor {pid} does not end", f"end it by force: kill -9 {pid}", reason="DOES_NOT_END"
            )
        await asyncio.sleep(POLL_S)
    return True


__all__ = ["CONTROL_DEADLINE_S", "already_running", "last_log_lines", "start", "stop"]
