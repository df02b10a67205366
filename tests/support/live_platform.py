"""The whole platform as a user starts it: the `mlmesh` command, the YAML of the repository, real Envoys."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh_local.state import StateDir

ROOT = Path(__file__).resolve().parent.parent.parent
MLMESH = Path(sys.executable).with_name("mlmesh")
HOST = "inference.mlmesh.svc.cluster.local"


class Platform:
    """A running mesh in a folder of its own. Use `started`."""

    def __init__(self, folder: Path, gateway: str) -> None:
        self.folder = folder
        self.gateway = gateway
        self.state = folder / ".mlmesh"

    def mlmesh(
        self, *arguments: str | Path, check: bool = True, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the CLI in the mesh's folder to its end; its output as text."""
        done = subprocess.run(
            [str(MLMESH), *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(),
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            raise AssertionError(f"mlmesh {arguments} → {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def json(self, *arguments: str | Path) -> Any:
        """What a command prints with --output json."""
        return json.loads(self.mlmesh(*arguments, "--output", "json").stdout)

    def environment(self, **more: str) -> dict[str, str]:
        """This process's environment with the programs under test first on PATH."""
        path = f"{MLMESH.parent}:{ROOT / '.tools' / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "COLUMNS": "120", **more}

    def status(self) -> local_pb2.MeshStatus:
        """The state of the mesh now."""
        options = [("grpc.default_authority", "localhost")]
        with grpc.insecure_channel(StateDir(self.state).target, options) as channel:
            stub = local_pb2_grpc.LocalMeshServiceStub(channel)
            return stub.GetStatus(local_pb2.GetStatusRequest(), timeout=10).status

    def instance(self, name: str) -> local_pb2.Instance:
        """One replica."""
        return next(instance for instance in self.status().instances if instance.name == name)

    def outbound(self, instance: str = "toolbox-0") -> str:
        """Where that replica's sidecar takes calls for service port 9000."""
        listeners = self.instance(instance).outbound_listeners
        return next(listener.address for listener in listeners if listener.port == 9000)

    def certificate(self, service_account: str = "operator") -> Mapping[str, Path]:
        """Fresh files: cert, key, ca."""
        folder = self.folder / "certs" / service_account
        self.mlmesh("certs", "issue", service_account, "--to", folder)
        return {name: folder / f"{name}.pem" for name in ("cert", "key", "ca")}

    def wait(self, what: str, ready: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
        """Poll until something outside this process has happened."""
        end = time.monotonic() + timeout_s
        while not ready():
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n{self.mlmesh('status').stdout}")
            time.sleep(0.1)

    def wait_ready(self, *, timeout_s: float = 60.0) -> None:
        """Until every replica is ready and every sidecar has acknowledged the active configuration."""
        self.wait("the mesh is ready", lambda: self.status().ready, timeout_s=timeout_s)

    def figures(self, instance: str) -> dict[str, float]:
        """Prometheus figures of a replica, `name{labels}` to value."""
        host = self.instance(instance).application_address.rpartition(":")[0]
        with urllib.request.urlopen(f"http://{host}:9090/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def started_calls(self, *instances: str) -> float:
        """Calls that reached handlers of these replicas, except probes."""
        return sum(
            value
            for instance in instances
            for name, value in self.figures(instance).items()
            if name.startswith("grpc_server_started_total") and "grpc.health" not in name
        )


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[Platform]:
    """A mesh for the length of a block, from the repository's own YAML; always taken down."""
    # Unix socket paths are short (108 bytes): pytest's own temporary folders are not.
    with tempfile.TemporaryDirectory(prefix="mlmesh-") as folder:
        gateway = f"127.0.0.1:{free_port()}"
        platform = Platform(Path(folder), gateway)
        try:
            yaml = ("--manifests", ROOT / "manifests" / "base", "--istio", ROOT / "mesh" / "istio")
            platform.mlmesh("up", *yaml, "--gateway-address", gateway, *arguments)
            yield platform
        finally:
            platform.mlmesh("down", check=False)
