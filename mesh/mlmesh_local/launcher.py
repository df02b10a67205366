"""Starts and stops a supervisor from another process: what `mlmesh up` and `mlmesh down` do.

async for progress in start_detached(Options(state_dir=Path(".mlmesh"))):
    print(progress.message)
channel = open_channel(StateDir(Path(".mlmesh")).target)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh_local.options import Options
from mlmesh_local.process import tail
from mlmesh_local.state import StateDir
from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.errors import MeshError

READY_S = 180.0
FAILURES_MAX = 3
STOP_S = 30.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A step of a start. ``instance`` and ``state`` are set when it is about one; ``ready`` with the last step."""

    message: str
    instance: str = ""
    state: str = ""
    ready: bool = False
    gateway: str = ""


class StartFailed(MeshError):  # noqa: N818  (named like the errors of mlmesh_runtime)
    """The mesh did not start; nothing of it is left running. ``log_tail`` is the end of the log that tells why."""

    default_reason = "START_FAILED"

    def __init__(self, message: str, *, reason: str | None = None, log: str = "", log_tail: str = "") -> None:
        super().__init__(message, reason=reason, metadata={"log": log} if log else None)
        self.log = log
        self.log_tail = log_tail


async def start_detached(
    options: Options, *, timeout_s: float = READY_S, failures_max: int = FAILURES_MAX
) -> AsyncIterator[Progress]:
    """Start a supervisor in a session of its own and tell its progress until everything is ready.

    It goes on when this process ends. Raises StartFailed when it refuses to start, when a process of it fails
    ``failures_max`` times, or after ``timeout_s``; then, and when this generator is closed early, it is ended again.
    """
    state = StateDir(options.state_dir)
    state.logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    output = state.logs / "supervisor.out"
    reading, writing = os.pipe()
    try:
        with output.open("wb" if not state.running_pid() else "ab") as log:
            process = subprocess.Popen(  # noqa: ASYNC220  (starts, does not wait)
                [sys.executable, "-m", "mlmesh_local", *_detached(options, writing).arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[writing],
                start_new_session=True,
            )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    ready = False
    try:
        async with asyncio.timeout(timeout_s):
            async for entry in _entries(reading):
                progress = _progress(entry, failures_max)
                ready = progress.ready
                yield progress
        if not ready:
            raise StartFailed("the supervisor ended before it was ready", log=str(output), log_tail=tail(output))
    except TimeoutError:
        raise StartFailed(
            f"the mesh was not ready within {timeout_s:g} s; logs are in {state.logs}", reason="START_TIMED_OUT"
        ) from None
    finally:
        if ready:
            # It outlives this process by design; nobody waits for it.
            process.returncode = 0
        else:
            await asyncio.shield(_end(process))


async def shut_down(state_dir: Path, *, timeout_s: float = STOP_S) -> AsyncIterator[str]:
    """End the mesh of a state folder and tell each step; nothing to do is fine.

    Asks by the control service; a supervisor that does not answer gets SIGTERM, after ``timeout_s`` SIGKILL (its
    processes die with it).
    """
    state = StateDir(state_dir)
    pid = state.running_pid()
    if not pid:
        yield "no mesh is running"
        return
    try:
        async with open_channel(state.target) as channel:
            stub: Any = local_pb2_grpc.LocalMeshServiceStub(channel)
            async for step in stub.Shutdown(local_pb2.ShutdownRequest(), timeout=timeout_s):
                yield step.message
    except grpc.aio.AioRpcError as error:
        yield f"the supervisor does not answer ({error.code().name}); it is told by SIGTERM"
        _signal(pid, signal.SIGTERM)
    if not await _gone(state, timeout_s):
        yield "the supervisor does not end; it is killed"
        _signal(pid, signal.SIGKILL)
        await _gone(state, timeout_s)
    yield "stopped"


def _detached(options: Options, descriptor: int) -> Options:
    return replace(options, state_dir=options.state_dir.absolute(), startup_fd=descriptor)


async def _entries(descriptor: int) -> AsyncIterator[Mapping[str, Any]]:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb")
    )
    try:
        while line := await reader.readline():
            yield json.loads(line)
    finally:
        transport.close()


def _progress(entry: Mapping[str, Any], failures_max: int) -> Progress:
    if entry["event"] == "failed":
        raise StartFailed(entry["message"], reason=entry["reason"])
    if entry["event"] == "ready":
        gateway = entry["gateway"]
        return Progress(message="the mesh is ready", ready=True, gateway=gateway)
    if entry["event"] == "step":
        return Progress(message=entry["message"])
    if entry["failures"] >= failures_max:
        log = Path(entry["log"])
        text = f"{entry['instance']} does not start: {entry['exit']}; its log is {log}"
        raise StartFailed(text, reason="INSTANCE_FAILED", log=str(log), log_tail=tail(log))
    text = f"{entry['instance']}: {entry['state']}"
    if entry["reason"]:
        text += f" ({entry['reason']})"
    return Progress(message=text, instance=entry["instance"], state=entry["state"])


async def _end(process: subprocess.Popen[bytes]) -> None:
    _signal(process.pid, signal.SIGTERM)
    deadline = asyncio.get_running_loop().time() + STOP_S
    while process.poll() is None:
        if asyncio.get_running_loop().time() > deadline:
            process.kill()
        await asyncio.sleep(POLL_S)


async def _gone(state: StateDir, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            while state.running_pid():  # noqa: ASYNC110  (another process, nothing to wait on)
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        return False
    return True


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid > 0:
            os.kill(pid, number)
