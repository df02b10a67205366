"""inference.GRPCInferenceService: check, call, reply. What is not implemented says so by name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterable
from typing import Any, Final, Protocol

from mlmesh_inference.catalog import Catalog
from mlmesh_inference.oip import describe, stream
from mlmesh_inference.oip.infer import shutting_down, start
from mlmesh_runtime.calls import metadata_value
from mlmesh_runtime.errors import InvalidInput, Unsupported
from mlmesh_runtime.identity import current_identity
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs

METHODS: Final = frozenset(method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods)
"""All RPCs: clients of the protocol call every one of them without a deadline."""

_MODEL_NAME: Final = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


class Repository(Protocol):
    """Loads and unloads by hand, beside what the selectors ask for."""

    async def load(self, model: str) -> None:
        """Load a model, or load it again. Raises NotFound when the registry does not have it."""

    async def unload(self, model: str) -> None:
        """Take a model out of service. Raises NotFound when it is not served."""


class OpenInferenceServicer(stubs.GRPCInferenceServiceServicer):
    """Implements the protocol over a catalog.

    Args:
        catalog: the models. repository: loads and unloads. version: of the server.
        going_away: set when the server drains. streaming: what streams share.
    """

    def __init__(
        self,
        catalog: Catalog,
        repository: Repository,
        *,
        version: str,
        going_away: asyncio.Event,
        streaming: stream.Streaming,
    ) -> None:
        self._catalog = catalog
        self._repository = repository
        self._version = version
        self._going_away = going_away
        self._streaming = streaming

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:  # noqa: ARG002
        """One request."""
        return await start(self._catalog, request).finish()

    # It writes by itself instead of being a generator: a task group must not be left through a yield.
    async def ModelStreamInfer(  # type: ignore[override]
        self, request_iterator: AsyncIterable[pb.ModelInferRequest], context: Any
    ) -> None:
        """A stream of requests, answered in order."""
        if self._going_away.is_set():
            raise shutting_down()
        grpc_errors = (metadata_value("triton_grpc_error") or "").lower() == "true"
        announced, resumable = stream.ANNOUNCED
        await stream.answer(
            self._streaming,
            request_iterator,
            context.write,
            movable=metadata_value(announced) == resumable,
            grpc_errors=grpc_errors,
            owner=current_identity(),
        )

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:  # noqa: ARG002
        """Whoever answers is alive."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:  # noqa: ARG002
        """False until everything wanted at the start was loaded or has failed, and while draining."""
        return pb.ServerReadyResponse(ready=self._catalog.synced and not self._going_away.is_set())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:  # noqa: ARG002
        """An unknown model is not ready, and no error."""
        return pb.ModelReadyResponse(ready=self._catalog.find(request.name, request.version) is not None)

    async def ServerMetadata(
        self,
        request: pb.ServerMetadataRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> pb.ServerMetadataResponse:
        """Name, version, extensions."""
        return pb.ServerMetadataResponse(
            name=describe.SERVER_NAME, version=self._version, extensions=describe.EXTENSIONS
        )

    async def ModelMetadata(
        self,
        request: pb.ModelMetadataRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.ModelMetadataResponse:
        """Tensors of a model."""
        return describe.metadata(self._catalog, self._catalog.resolve(request.name, request.version))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:  # noqa: ARG002
        """Configuration of a model."""
        return pb.ModelConfigResponse(config=describe.config(self._catalog.resolve(request.name, request.version)))

    async def ModelStatistics(
        self,
        request: pb.ModelStatisticsRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.ModelStatisticsResponse:
        """Statistics of one version, of all versions of a model, or of all models."""
        if not request.name:
            models = self._catalog.ready_models()
        elif not request.version:
            self._catalog.resolve(request.name, "")
            models = self._catalog.versions(request.name)
        else:
            models = [self._catalog.resolve(request.name, request.version)]
        return pb.ModelStatisticsResponse(model_stats=[describe.statistics(model) for model in models])

    async def RepositoryIndex(
        self,
        request: pb.RepositoryIndexRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.RepositoryIndexResponse:
        """Versions known to this process."""
        return describe.index(self._catalog, ready_only=request.ready)

    async def RepositoryModelLoad(
        self,
        request: pb.RepositoryModelLoadRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.RepositoryModelLoadResponse:
        """Load by hand; answers when the model does."""
        if request.parameters:
            raise Unsupported(f"load parameter '{min(request.parameters)[:64]}' is not implemented")
        await self._repository.load(_model_name(request.model_name))
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self,
        request: pb.RepositoryModelUnloadRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload by hand; answers when the model is gone. There are no dependents to unload."""
        if unknown := set(request.parameters) - {"unload_dependents"}:
            raise Unsupported(f"unload parameter '{min(unknown)[:64]}' is not implemented")
        await self._repository.unload(_model_name(request.model_name))
        return pb.RepositoryModelUnloadResponse()

    async def SystemSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("SystemSharedMemoryStatus")

    async def SystemSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("SystemSharedMemoryRegister")

    async def SystemSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("SystemSharedMemoryUnregister")

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("CudaSharedMemoryStatus")

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("CudaSharedMemoryRegister")

    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("CudaSharedMemoryUnregister")

    async def TraceSetting(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("TraceSetting")

    async def LogSettings(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("LogSettings")


def _model_name(name: str) -> str:
    if not _MODEL_NAME.match(name):
        raise InvalidInput(f"{name[:64]!r} is not the name of a model", field="model_name")
    return name


def _unimplemented(method: str) -> Unsupported:
    return Unsupported(f"{method} is not implemented", reason="METHOD_NOT_IMPLEMENTED")
