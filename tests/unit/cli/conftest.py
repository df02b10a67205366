"""A mesh of canned answers: real gRPC servers on a Unix socket and a loopback port, real messages, no processes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh.registry.v1 import registry_pb2_grpc
from mlmesh.training.v1 import training_pb2_grpc
from mlmesh_cli.app import app
from open_inference import grpc_service_pb2_grpc
from tests.support.cli import FakeServicer, mesh_status


def text_of(renderable: RenderableType, *, width: int = 160) -> str:
    """What a terminal of this width shows, without colours."""
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False, emoji=False).print(renderable)
    return stream.getvalue()


def abort(context: Any, code: grpc.StatusCode, message: str, *, reason: str = "", violations: Any = ()) -> None:
    """Ends a call as the runtime's servers do: status with ErrorInfo and BadRequest details."""
    status = status_pb2.Status(code=code.value[0], message=message)
    if reason:
        status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="mlmesh"))
    if violations:
        bad = error_details_pb2.BadRequest()
        for field, description in violations:
            bad.field_violations.add(field=field, description=description)
        status.details.add().Pack(bad)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, message)


class FakeMesh:
    """Servers that answer what a test put into `local`, `registry`, `training`, `inference`: method name → function."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.local, self.registry = FakeServicer(), FakeServicer()
        self.training, self.inference = FakeServicer(), FakeServicer()
        self.environ: dict[str, str] = {}
        self.local["GetStatus"] = lambda request, context: local_pb2.GetStatusResponse(status=mesh_status())

    def start(self) -> Callable[[], None]:
        """Serves until the function that it gives is called."""
        server = grpc.server(ThreadPoolExecutor(8))
        local_pb2_grpc.add_LocalMeshServiceServicer_to_server(self.local, server)
        registry_pb2_grpc.add_ModelRegistryServiceServicer_to_server(self.registry, server)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(self.training, server)
        grpc_service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self.inference, server)
        server.add_insecure_port(f"unix:{self.state_dir / 'control.sock'}")
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        target = f"127.0.0.1:{port}"
        self.environ = {f"MLMESH_{name}_TARGET": target for name in ("REGISTRY", "TRAINING", "INFERENCE")}
        return lambda: server.stop(None).wait(5)

    def run(self, *arguments: str, text: str = "") -> Any:
        """Runs `mlmesh` with these arguments against this mesh."""
        runner = CliRunner()
        return runner.invoke(
            app, [*arguments], input=text or None, env={**self.environ, "MLMESH_STATE_DIR": str(self.state_dir)}
        )


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[FakeMesh]:
    """A mesh of canned answers."""
    state_dir = tmp_path / "s"
    state_dir.mkdir()
    fake = FakeMesh(state_dir)
    with ExitStack() as stack:
        stack.callback(fake.start())
        yield fake
