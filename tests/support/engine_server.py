"""An inference server in this process with a registry in memory and a real compiler of engines."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
from google.longrunning import operations_pb2 as ops
from google.protobuf.empty_pb2 import Empty

from mlmesh.inference.v1 import control_pb2 as pb
from mlmesh.inference.v1 import control_pb2_grpc as stubs
from mlmesh_inference.app import services, streaming_of
from mlmesh_inference.building import EXECUTOR, Building, building, tensorrt_kind
from mlmesh_inference.cache import ModelCache
from mlmesh_inference.catalog import Catalog
from mlmesh_inference.choosing import EngineChooser
from mlmesh_inference.config import InferenceSettings
from mlmesh_inference.config_engines import EngineSettings
from mlmesh_inference.desired import parse_selectors
from mlmesh_inference.engines.onnx import OnnxKind
from mlmesh_inference.engines.tensorrt import TensorRTKind
from mlmesh_inference.engines.verdicts import VerdictStore
from mlmesh_inference.loader import Loader
from mlmesh_inference.loading import Loading
from mlmesh_inference.renewal import LoadedVersions
from mlmesh_runtime.executors import Executors
from mlmesh_runtime.server import Server
from tests.support.registry_source import MemoryRegistry
from tests.support.server import settings

DEADLINE_S = 60.0
_OPERATIONS = "/google.longrunning.Operations/"


class Operations:
    """A client of google.longrunning.Operations."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def get(self, name: str) -> ops.Operation:
        return await self._call("GetOperation", ops.GetOperationRequest(name=name), ops.Operation)

    async def wait(self, name: str, timeout_s: float | None = None, *, deadline_s: float = DEADLINE_S) -> ops.Operation:
        request = ops.WaitOperationRequest(name=name)
        if timeout_s is not None:
            request.timeout.FromNanoseconds(int(timeout_s * 1e9))
        return await self._call("WaitOperation", request, ops.Operation, deadline_s)

    async def list(self, filter: str = "", *, size: int = 0, token: str = "") -> ops.ListOperationsResponse:  # noqa: A002
        request = ops.ListOperationsRequest(name="operations", filter=filter, page_size=size, page_token=token)
        return await self._call("ListOperations", request, ops.ListOperationsResponse)

    async def cancel(self, name: str) -> None:
        await self._call("CancelOperation", ops.CancelOperationRequest(name=name), Empty)

    async def delete(self, name: str) -> None:
        await self._call("DeleteOperation", ops.DeleteOperationRequest(name=name), Empty)

    async def _call(self, name: str, request: Any, response: Any, deadline_s: float = DEADLINE_S) -> Any:
        call = self._channel.unary_unary(
            _OPERATIONS + name,
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        return await call(request, timeout=deadline_s)


class EngineServer:
    """The server's parts, and clients of it."""

    def __init__(self, server: Server, channel: grpc.aio.Channel, made: Building, catalog: Catalog) -> None:
        self.server = server
        self.made = made
        self.catalog = catalog
        self.operations = Operations(channel)
        self.control: Any = stubs.InferenceControlServiceStub(channel)

    async def build(self, model: str, version: int = 1, **fields: Any) -> ops.Operation:
        """BuildEngine."""
        request = pb.BuildEngineRequest(name=f"models/{model}/versions/{version}", **fields)
        return await self.control.BuildEngine(request, timeout=DEADLINE_S)

    async def built(self, model: str, version: int = 1, **fields: Any) -> pb.EngineBuild:
        """BuildEngine, awaited."""
        ended = await self.operations.wait((await self.build(model, version, **fields)).name)
        response = pb.EngineBuild()
        assert ended.response.Unpack(response), ended
        return response


@contextlib.asynccontextmanager
async def engine_server(
    data_dir: Path,
    source: MemoryRegistry,
    *,
    registry: grpc.aio.Channel | None = None,
    rows_max: int = 8,
    kind_of: Callable[[EngineSettings, Path], TensorRTKind] = tensorrt_kind,
    **engines: Any,
) -> AsyncIterator[EngineServer]:
    """A server over what `source` has published, once all of it answers. `engines` are fields of EngineSettings;
    `kind_of` makes the kind that compiles."""
    inference = InferenceSettings(selectors=parse_selectors("*"), rows_max=rows_max, rows_preferred=4)
    asked = EngineSettings(**engines)
    catalog, synced = Catalog(), asyncio.Event()
    kind = kind_of(asked, data_dir)
    kinds = [kind, OnnxKind()]
    config = settings()
    async with contextlib.AsyncExitStack() as stack:
        executors = await stack.enter_async_context(Executors({"disk": 2, "build": 1, EXECUTOR: 1}))
        registry = registry or await stack.enter_async_context(grpc.aio.insecure_channel("127.0.0.1:1"))
        loading = Loading(
            source=source,
            cache=ModelCache(data_dir / "cache"),
            catalog=catalog,
            kinds=kinds,
            settings=inference,
            disk=executors["disk"],
            build=executors["build"],
            chooser=EngineChooser(
                kinds, inference, VerdictStore(data_dir / "verdicts"), disk=executors["disk"], build=executors["build"]
            ),
        )
        loader = Loader(loading, on_synced=synced.set)
        served = LoadedVersions(loading, loader.record)
        made = building(asked, kind, served, executors, data_dir=data_dir, channel=registry)
        streaming = streaming_of(catalog, config, inference)
        offered = services(catalog, loader, kinds, asyncio.Event(), streaming, builds=made.builds)
        server = await stack.enter_async_context(Server(config, offered))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loader.run()), group.create_task(made.run(catalog))]
            async with asyncio.timeout(DEADLINE_S):
                await made.builds.started.wait()
                await synced.wait()
            try:
                yield EngineServer(server, channel, made, catalog)
            finally:
                for task in tasks:
                    task.cancel()
        for ready in catalog.ready_models():
            ready.runner.abort()
