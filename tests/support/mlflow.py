"""A real MLflow server in an environment of its own, and models logged into it by its own client."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.tools import ROOT

HERE = ROOT / ".tools" / "mlflow" / "bin"
SCRIPT = Path(__file__).with_name("mlflow_models.py")
_START_S = 150.0


@dataclass(frozen=True, slots=True)
class Mlflow:
    """A server on a loopback port."""

    url: str
    folder: Path

    def log(self, *what: str) -> dict[str, Any]:
        """Log and register models with MLflow's own client; what it tells of them. See mlflow_models.py."""
        done = subprocess.run(
            # -P: this module has the name of the package that the script imports.
            [str(HERE / "python"), "-P", "-W", "ignore", str(SCRIPT), self.url, *what],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=170,
            env=_environment(),
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told


@contextlib.contextmanager
def mlflow_running(folder: Path, *options: str) -> Iterator[Mlflow]:
    """A server for the length of a block; skips the test where `make tools` did not install MLflow."""
    if not (HERE / "mlflow").exists():
        pytest.skip("MLflow is not here: `make tools` installs it")
    store = (
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.sqlite",
        "--artifacts-destination",
        str(folder / "files"),
    )
    process = subprocess.Popen(
        [str(HERE / "mlflow"), "server", "--host", "127.0.0.1", "--port", "0", "--workers", "1", *store, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(),
        cwd=folder,
        # It starts processes of its own, which are ended with it.
        start_new_session=True,
    )
    said: list[str] = []
    listening = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if "running on http://" in line:
                listening.set()
        listening.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        listening.wait(_START_S)
        found = re.search(r"running on (http://[\d.]+:\d+)", "".join(said))
        assert found, "".join(said)[-3000:]
        yield Mlflow(found[1], folder)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        reader.join(20)
        assert process.stdout is not None
        process.stdout.close()


def _environment() -> dict[str, str]:
    # It must not find our packages, ask the network for anything, or look for git.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW", "VIRTUAL"))}
    own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    return {**kept, **own, "GIT_PYTHON_REFRESH": "quiet"}
