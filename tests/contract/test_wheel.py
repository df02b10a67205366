"""The wheel as a stranger gets it: what is in it, what it needs, and whether a client can be written against it."""

from __future__ import annotations

import email
import json
import re
import zipfile
from collections.abc import Iterator
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from tests.support import wheel

STUBS = (
    "mlmesh.registry.v1.registry_pb2",
    "mlmesh.registry.v1.registry_pb2_grpc",
    "mlmesh.training.v1.training_pb2",
    "mlmesh.training.v1.training_pb2_grpc",
    "mlmesh.inference.v1.control_pb2",
    "mlmesh.inference.v1.control_pb2_grpc",
    "mlmesh.local.v1.local_pb2",
    "mlmesh.local.v1.local_pb2_grpc",
    "open_inference.grpc_service_pb2",
    "open_inference.grpc_service_pb2_grpc",
    "open_inference.model_config_pb2",
)

# A client as a person would write it: control API and inference, unary and streams, blocking and asyncio.
CLIENT = """
from collections.abc import AsyncIterator, Iterator

import grpc
import grpc.aio

from mlmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from mlmesh.training.v1 import training_pb2, training_pb2_grpc
from open_inference import grpc_service_pb2, grpc_service_pb2_grpc


def versions(channel: grpc.Channel) -> list[str]:
    stub = registry_pb2_grpc.ModelRegistryServiceStub(channel)
    reply = stub.ListModelVersions(registry_pb2.ListModelVersionsRequest(parent="models/-"), timeout=5.0)
    return [version.name for version in reply.model_versions]


def losses(channel: grpc.Channel, job: str) -> Iterator[float]:
    stub = training_pb2_grpc.TrainingServiceStub(channel)
    for event in stub.WatchJob(training_pb2.WatchJobRequest(name=job), timeout=60.0):
        if event.WhichOneof("event") == "metrics":
            yield event.metrics.values["train_loss"]


async def aliases(channel: grpc.aio.Channel) -> AsyncIterator[str]:
    stub = registry_pb2_grpc.ModelRegistryServiceStub(channel)
    async for change in stub.WatchModels(registry_pb2.WatchModelsRequest()):
        yield change.DESCRIPTOR.full_name


async def infer(channel: grpc.aio.Channel, data: bytes) -> bytes:
    stub = grpc_service_pb2_grpc.GRPCInferenceServiceStub(channel)
    tensor = grpc_service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=[1, 1, 28, 28])
    request = grpc_service_pb2.ModelInferRequest(model_name="mnist", inputs=[tensor], raw_input_contents=[data])
    reply = await stub.ModelInfer(request, timeout=1.0)
    return reply.raw_output_contents[0]
"""


@pytest.fixture(scope="module")
def archive(built: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(built) as opened:
        yield opened


@pytest.fixture(scope="module")
def headers(archive: zipfile.ZipFile) -> Message:
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(archive.read(name))


@pytest.fixture(scope="module")
def client_python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a new environment with the wheel, what it requires, and nothing else."""
    return wheel.environment(tmp_path_factory.mktemp("client") / "venv", str(built))


@pytest.mark.skipif(
    not wheel.INSTALLED, reason="only `make test` runs against the installed wheel (MLMESH_TEST_WHEEL=1)"
)
def test_what_is_tested_is_the_wheel() -> None:
    import mlmesh
    import mlmesh_cli
    import mlmesh_runtime

    for module in (mlmesh, mlmesh_runtime, mlmesh_cli):
        assert module.__file__ is not None
        assert "site-packages" in Path(module.__file__).parts, module.__file__
    origin = json.loads(metadata.distribution("mlmesh").read_text("direct_url.json") or "{}")
    assert not origin.get("dir_info", {}).get("editable", False)


def test_protos_travel_with_their_stubs(archive: zipfile.ZipFile, repository: Path) -> None:
    names = set(archive.namelist())
    protos = [p for folder in ("mlmesh", "open_inference") for p in (repository / "protos" / folder).rglob("*.proto")]
    assert len(protos) >= 6
    for proto in protos:
        relative = proto.relative_to(repository / "protos")
        assert archive.read(relative.as_posix()) == proto.read_bytes()
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi"):
            assert (relative.parent / (relative.stem + suffix)).as_posix() in names


def test_the_descriptor_set_has_comments_and_imports(archive: zipfile.ZipFile) -> None:
    image = descriptor_pb2.FileDescriptorSet()
    image.ParseFromString(archive.read("mlmesh/descriptor_set.binpb"))
    files = {f.name: f for f in image.file}
    assert files["mlmesh/registry/v1/registry.proto"].source_code_info.location
    for file in files.values():
        assert set(file.dependency) <= set(files)


def test_every_package_says_that_it_is_typed(archive: zipfile.ZipFile) -> None:
    names = set(archive.namelist())
    packages = {name.split("/")[0] for name in names if name.endswith(".py")} - {"buf"}
    assert packages == {
        "mlmesh",
        "open_inference",
        "mlmesh_runtime",
        "mlmesh_registry",
        "mlmesh_training",
        "mlmesh_inference",
        "mlmesh_client",
        "mlmesh_local",
        "mlmesh_cli",
    }
    for package in packages:
        assert f"{package}/py.typed" in names


def test_the_default_platform_is_inside(archive: zipfile.ZipFile, repository: Path) -> None:
    for folder in ("manifests/base", "mesh/istio"):
        for path in (repository / folder).glob("*.yaml"):
            assert archive.read(f"mlmesh_cli/defaults/{folder}/{path.name}") == path.read_bytes()
    assert "mlmesh_local/envoy.binpb" in archive.namelist()


def test_nothing_else_is_inside(archive: zipfile.ZipFile) -> None:
    for name in archive.namelist():
        assert not name.startswith(("tests/", "benchmarks/", "tools/", "protos/", "services/", "mesh/")), name
        assert "__pycache__" not in name
        assert "Containerfile" not in name


def test_metadata(headers: Message) -> None:
    assert headers["Name"] == "mlmesh"
    assert headers["License-Expression"] == "Apache-2.0"
    assert headers["Requires-Python"] == ">=3.11"
    extras = set(headers.get_all("Provides-Extra") or [])
    assert {"registry", "training", "inference", "tensorrt", "local", "types", "all"} <= extras
    base = {re.split(r"[<>]", r)[0] for r in headers.get_all("Requires-Dist") or [] if "extra ==" not in r}
    assert base == {"grpcio", "protobuf", "googleapis-common-protos"}


def test_a_client_needs_grpc_and_protobuf_and_no_more(client_python: Path) -> None:
    listed = wheel.run(wheel.uv(), "pip", "list", "--format", "json", "--python", client_python)
    installed = {package["name"] for package in json.loads(listed)}
    assert installed == {"mlmesh", "grpcio", "protobuf", "googleapis-common-protos", "typing-extensions"}


@pytest.mark.parametrize("module", STUBS)
def test_stubs_import_alone(client_python: Path, module: str, tmp_path: Path) -> None:
    wheel.run(client_python, "-W", "error", "-c", f"import {module}", cwd=tmp_path)


def test_all_stubs_import_together(client_python: Path, tmp_path: Path) -> None:
    wheel.run(client_python, "-W", "error", "-c", f"import {', '.join(STUBS)}", cwd=tmp_path)


def test_a_client_passes_mypy_strict(built: Path, tmp_path: Path) -> None:
    version = metadata.version("mypy")
    python = wheel.environment(tmp_path / "venv", f"{built}[types]", f"mypy=={version}")
    (tmp_path / "client.py").write_text(CLIENT)
    out = wheel.run(python, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "client.py", cwd=tmp_path)
    assert "no issues found" in out


def test_a_wrong_client_does_not_pass(built: Path, tmp_path: Path) -> None:
    python = wheel.environment(tmp_path / "venv", f"{built}[types]", f"mypy=={metadata.version('mypy')}")
    (tmp_path / "client.py").write_text(CLIENT.replace('parent="models/-"', "parent=3"))
    with pytest.raises(pytest.fail.Exception, match="arg-type"):
        wheel.run(python, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", "client.py", cwd=tmp_path)
