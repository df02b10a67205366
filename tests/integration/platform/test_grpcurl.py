"""Every RPC is callable with the real grpcurl from reflection alone."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest

from mlmesh.inference.v1 import control_pb2
from mlmesh.local.v1 import local_pb2
from mlmesh.registry.v1 import registry_pb2
from mlmesh.training.v1 import training_pb2
from open_inference import grpc_service_pb2
from tests.support.live_platform import Platform
from tests.support.tools import require

INSTANCES = {
    control_pb2: "inference-v1-0",
    grpc_service_pb2: "inference-v1-0",
    registry_pb2: "registry-0",
    training_pb2: "training-0",
    local_pb2: "",
}
# The Open Inference Protocol's calls that are refused by name (the README and ServerMetadata say so).
REFUSED = {
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
}
STATUS_BASE, UNIMPLEMENTED = 64, 12
"""grpcurl's exit code is 64 plus the gRPC status."""


def methods() -> Iterator[tuple[str, str]]:
    for file, instance in INSTANCES.items():
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                yield instance, method.full_name


def grpcurl(platform: Platform, instance: str, *arguments: str, data: str = "") -> subprocess.CompletedProcess[str]:
    target = platform.instance(instance).application_address if instance else "unix:.mlmesh/control.sock"
    options = ["-plaintext", "-max-time", "3", *(["-d", data] if data else [])]
    return subprocess.run(
        [str(require("grpcurl")), *options, target, *arguments],
        cwd=platform.folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(("instance", "method"), sorted(methods()))
def test_described_and_callable(platform: Platform, instance: str, method: str) -> None:
    described = grpcurl(platform, instance, "describe", method)
    assert described.returncode == 0, described.stderr
    assert f"rpc {method.rpartition('.')[2]}" in described.stdout
    if method.endswith(".Shutdown"):
        return
    service, _, name = method.rpartition(".")
    called = grpcurl(platform, instance, f"{service}/{name}", data="{}")
    # Answered or refused by the service itself, with a status: 1 and 2 would be grpcurl failing before the call.
    status = called.returncode - STATUS_BASE if called.returncode else 0
    assert status >= 0, called.stderr
    assert (status == UNIMPLEMENTED) == (name in REFUSED), called.stderr


def test_refusal_names_the_field(platform: Platform) -> None:
    """What a person reads who typed something wrong."""
    called = grpcurl(
        platform, "training-0", "mlmesh.training.v1.TrainingService/CreateJob",
        data='{"spec": {"recipe": "transformer", "dataset": "mnist"}}',
    )  # fmt: skip
    assert "InvalidArgument" in called.stderr
    assert "spec.recipe" in called.stderr
    assert "UNKNOWN_RECIPE" in called.stderr


def test_lists_models_without_a_request(platform: Platform) -> None:
    called = grpcurl(platform, "registry-0", "mlmesh.registry.v1.ModelRegistryService/ListModels")
    assert {model["name"] for model in json.loads(called.stdout)["models"]} >= {"models/mnist"}


def test_a_search_by_hand(platform: Platform) -> None:
    """What a person types who looks for a version, and reads who typed it wrong."""
    search = ("registry-0", "mlmesh.registry.v1.ModelRegistryService/ListModelVersions")
    asked = {"parent": "models/-", "filter": "model = mnist AND number = 1", "order_by": "create_time desc"}
    found = grpcurl(platform, *search, data=json.dumps(asked))
    assert [version["name"] for version in json.loads(found.stdout)["model_versions"]] == ["models/mnist/versions/1"]
    wrong = grpcurl(platform, *search, data=json.dumps({"parent": "models/-", "filter": "model == mnist"}))
    assert "InvalidArgument" in wrong.stderr
    assert "at character 8" in wrong.stderr
    assert "INVALID_FILTER" in wrong.stderr
