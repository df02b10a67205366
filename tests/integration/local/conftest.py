"""Real meshes of small workloads: real Envoys, real processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh_local.launcher import Progress, shut_down, start_detached
from mlmesh_local.options import Options
from mlmesh_local.state import StateDir
from mlmesh_runtime.channel import open_channel
from tests.support.echo import PROTOS, Text

HERE = Path(__file__).parent
ECHO = "echo.mlmesh.svc.cluster.local"
ECHO_TARGET = f"{ECHO}:9000"


class RunningMesh:
    """A mesh that runs, and short ways to talk to it."""

    def __init__(self, options: Options, progress: list[Progress]) -> None:
        self.options = options
        self.state = StateDir(options.state_dir)
        self.progress = progress
        self.gateway = progress[-1].gateway

    @contextlib.asynccontextmanager
    async def control(self) -> AsyncIterator[Any]:
        """Stub of the control service."""
        async with open_channel(self.state.target) as channel:
            yield local_pb2_grpc.LocalMeshServiceStub(channel)  # type: ignore[arg-type]

    async def status(self) -> local_pb2.MeshStatus:
        """Its status."""
        async with self.control() as stub:
            answer: local_pb2.GetStatusResponse = await stub.GetStatus(local_pb2.GetStatusRequest())
            return answer.status

    async def instance(self, name: str) -> local_pb2.Instance:
        """Status of one instance."""
        return next(item for item in (await self.status()).instances if item.name == name)

    async def until(self, condition: Callable[[local_pb2.MeshStatus], bool], timeout_s: float = 30.0) -> None:
        """Wait until a status fulfils a condition."""
        async with self.control() as stub, asyncio.timeout(timeout_s):
            async for answer in stub.WatchStatus(local_pb2.WatchStatusRequest(), timeout=timeout_s):
                if condition(answer.status):
                    return

    @contextlib.asynccontextmanager
    async def echo(self) -> AsyncIterator[Any]:
        """Stub of the echo service, called from the toolbox by its sidecar."""
        toolbox = await self.instance("toolbox-0")
        host = toolbox.outbound_listeners[0].address.rpartition(":")[0]
        async with open_channel(ECHO_TARGET, outbound_host=host) as channel:
            yield PROTOS.stub(channel)

    async def apply(self, text: str, *, timeout_s: float | None = None, **fields: Any) -> local_pb2.ApplyResponse:
        """Apply YAML."""
        async with self.control() as stub:
            document = local_pb2.ResourceDocument(source="test.yaml", yaml=text)
            request = local_pb2.ApplyRequest(documents=[document], **fields)
            answer: local_pb2.ApplyResponse = await stub.Apply(request, timeout=timeout_s)
            return answer


def start(options: Options) -> list[Progress]:
    """Start a mesh and wait until it is ready."""

    async def collect() -> list[Progress]:
        return [progress async for progress in start_detached(options, timeout_s=60.0)]

    return asyncio.run(collect())


def stop(options: Options) -> list[str]:
    """Stop a mesh."""

    async def collect() -> list[str]:
        return [step async for step in shut_down(options.state_dir)]

    return asyncio.run(collect())


@pytest.fixture(scope="session")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """A mesh with echo v1 (two replicas) and v2, a toolbox and a gateway. Tests leave it as they found it."""
    options = Options(
        state_dir=tmp_path_factory.mktemp("mesh") / "state",
        manifests=(HERE / "manifests.yaml",),
        istio=(HERE / "istio.yaml",),
        gateway_address="127.0.0.1:0",
    )
    running = RunningMesh(options, start(options))
    try:
        yield running
    finally:
        stop(options)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Options]:
    """Options of a mesh with one workload that needs no Python; ended after the test whatever happened."""
    options = Options(state_dir=tmp_path / "state", manifests=(HERE / "small.yaml",), istio=(), gateway_address="none")
    yield options
    stop(options)


async def answer(stub: Any, text: str = "", timeout_s: float = 10.0, **call: Any) -> dict[str, Any]:
    """One unary call; its answer as values."""
    reply = await stub.Unary(Text(text=text), timeout=timeout_s, **call)
    values: dict[str, Any] = json.loads(reply.text)
    return values
