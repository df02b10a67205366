"""What an inference process takes from the registry's stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh.registry.v1 import registry_pb2_grpc as stubs
from mlmesh_inference.events import Published
from mlmesh_inference.registry import RegistryClient
from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.server import Service
from tests.support.server import serving


class OneVersion(stubs.ModelRegistryServiceServicer):
    async def WatchModels(self, request: pb.WatchModelsRequest, context: Any) -> AsyncIterator[pb.WatchModelsResponse]:
        version = pb.ModelVersion(name="models/mnist/versions/1")
        for path in ("model.onnx", "labels.txt", "tokenizer.json", "weights.safetensors", "plots/curves.png"):
            version.artifacts.add(path=path, blob=f"blobs/sha256-{'0' * 64}", size_bytes=1)
        yield pb.WatchModelsResponse(revision=1, model_version=version)


async def test_what_is_never_served_from_is_never_fetched() -> None:
    service = Service(
        add=stubs.add_ModelRegistryServiceServicer_to_server,
        servicer=OneVersion(),
        descriptor=pb.DESCRIPTOR.services_by_name["ModelRegistryService"],
        deadline_exempt={"WatchModels"},
    )
    async with (
        serving(service) as server,
        open_channel(server.address) as channel,
        aclosing(RegistryClient(channel).watch(0)) as events,
    ):
        event = await anext(events)
    assert isinstance(event, Published)
    assert event.record is not None
    assert [file.path for file in event.record.files] == ["model.onnx", "labels.txt", "tokenizer.json"]
