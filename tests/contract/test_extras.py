"""Each extra is enough: a process starts, serves and ends in an environment with its extra alone, as in its image."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import wheel

SERVES_S = 60.0


def _listening(process: subprocess.Popen[str]) -> str:
    """The address that the process says it listens on; fails with what it said when it ends before."""
    said = []
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line)
        if line.startswith("{") and json.loads(line).get("event") == "listening":
            return str(json.loads(line)["address"])
    pytest.fail("it ended before it listened:\n" + "".join(said))


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("service", ["registry", "training", "inference"])
def test_a_process_runs_on_its_extra_alone(built: Path, service: str, tmp_path: Path) -> None:
    python = wheel.environment(tmp_path / "venv", f"{built}[{service}]")
    environment = {
        "PATH": os.environ["PATH"],
        "MLMESH_LISTEN": "127.0.0.1:0",
        "MLMESH_DATA_DIR": str(tmp_path / "data"),
        "MLMESH_REGISTRY_TARGET": "127.0.0.1:1",
        "MLMESH_SERVE": "*@stable",
        "MLMESH_GRACE_S": "1",
    }
    with subprocess.Popen(
        [str(python), "-m", f"mlmesh_{service}"],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert _listening(process).startswith("127.0.0.1:")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=SERVES_S) == 0
        finally:
            process.kill()


def test_the_command_runs_on_its_extra_alone(built: Path, tmp_path: Path) -> None:
    python = wheel.environment(tmp_path / "venv", f"{built}[local]")
    printed = wheel.run(python.parent / "mlmesh", "--help", cwd=tmp_path)
    for command in ("init", "up", "demo", "apply", "status"):
        assert command in printed


CLIENT = """
from mlmesh_client import Client, RetryPolicy
with Client("127.0.0.1:1", retry=RetryPolicy(attempts=1)) as client:
    print(client, client.live(timeout=30))
"""


def test_the_client_library_runs_on_its_extra_alone(built: Path, tmp_path: Path) -> None:
    python = wheel.environment(tmp_path / "venv", f"{built}[client]")
    assert wheel.run(python, "-W", "error", "-c", CLIENT, cwd=tmp_path).strip() == "<Client 127.0.0.1:1> False"
