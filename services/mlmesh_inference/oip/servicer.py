"""inference.GRPCInferenceService: check, call, reply. What is not implemented says so by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from typing import Any, Final

from mlmesh_inference.catalog import Catalog, State, check_version
from mlmesh_inference.config import ProtocolSettings
from mlmesh_inference.oip import describe, describe_config, dialects, repository, stream
from mlmesh_inference.oip.infer import shutting_down, start
from mlmesh_inference.oip.repository import Repository
from mlmesh_inference.oip.settings import LogControl
from mlmesh_inference.oip.shared_memory import SharedMemory
from mlmesh_inference.trace_settings import TraceSettings
from mlmesh_runtime.calls import metadata_value
from mlmesh_runtime.errors import NotFound, Unsupported
from mlmesh_runtime.identity import current_identity
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs

METHODS: Final = frozenset(method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods)
"""All RPCs: clients of the protocol call every one of them without a deadline."""


class OpenInferenceServicer(stubs.GRPCInferenceServiceServicer):
    """Implements the protocol over a catalog.

    Args:
        catalog: the models. repository: loads and unloads. version: of the server.
        going_away: set when the server drains. streaming: what streams share.
        settings: choices that the protocol leaves. memory: shared with local callers, None where it is off.
        traces: which requests are traced; TraceSetting changes it.
    """

    def __init__(
        self,
        catalog: Catalog,
        repository: Repository,
        *,
        version: str,
        going_away: asyncio.Event,
        streaming: stream.Streaming,
        settings: ProtocolSettings,
        memory: SharedMemory | None,
        traces: TraceSettings,
    ) -> None:
        self._catalog = catalog
        self._repository = repository
        self._version = version
        self._going_away = going_away
        self._streaming = streaming
        self._settings = settings
        self._traces = traces
        self._logs = LogControl()
        self._memory = memory

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:  # noqa: ARG002
        """One request."""
        raw = bool(self._settings.compat)
        return await start(self._catalog, request, regions=self._memory, always_raw=raw).finish()

    # It writes by itself instead of being a generator: a task group must not be left through a yield.
    async def ModelStreamInfer(  # type: ignore[override]
        self, request_iterator: AsyncIterable[pb.ModelInferRequest], context: Any
    ) -> None:
        """A stream of requests, answered in order."""
        if self._going_away.is_set():
            raise shutting_down()
        mlserver = dialects.stream_dialect(metadata_value(dialects.HEADER), self._settings.dialect) == dialects.MLSERVER
        grpc_errors = mlserver or (metadata_value("triton_grpc_error") or "").lower() == "true"
        announced, resumable = stream.ANNOUNCED
        await stream.answer(
            self._streaming,
            request_iterator,
            dialects.unwrapped(context.write) if mlserver else context.write,
            movable=not mlserver and metadata_value(announced) == resumable,
            grpc_errors=grpc_errors,
            owner=current_identity(),
        )

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:  # noqa: ARG002
        """Whoever answers is alive."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:  # noqa: ARG002
        """False until everything wanted at the start was loaded or has failed, and while draining."""
        ready = self._catalog.synced and not self._going_away.is_set()
        if ready and self._settings.compat:
            ready = all(status.state in (State.READY, State.ASLEEP) for status in self._catalog.statuses())
        return pb.ServerReadyResponse(ready=ready)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:  # noqa: ARG002
        """An unknown model is not ready, and no error; one that sleeps is woken by whoever asks."""
        self._catalog.wake(request.name, request.version)
        check_version(request.version)
        return pb.ModelReadyResponse(ready=self._catalog.find(request.name, request.version) is not None)

    async def ServerMetadata(
        self,
        request: pb.ServerMetadataRequest,  # noqa: ARG002
        context: Any,  # noqa: ARG002
    ) -> pb.ServerMetadataResponse:
        """Name, version, extensions."""
        extensions = describe.extensions(shared_memory=self._memory is not None)
        return pb.ServerMetadataResponse(name=describe.SERVER_NAME, version=self._version, extensions=extensions)

    async def ModelMetadata(
        self,
        request: pb.ModelMetadataRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.ModelMetadataResponse:
        """Tensors of a model."""
        return describe.metadata(self._catalog, self._catalog.resolve(request.name, request.version))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:  # noqa: ARG002
        """Configuration of a model."""
        return pb.ModelConfigResponse(
            config=describe_config.config(self._catalog.resolve(request.name, request.version))
        )

    async def ModelStatistics(
        self,
        request: pb.ModelStatisticsRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.ModelStatisticsResponse:
        """Statistics of one version, of all versions of a model, or of all models."""
        check_version(request.version)
        if not request.name:
            models = self._catalog.ready_models()
        elif request.version:
            found = self._catalog.find(request.name, request.version)
            models = [] if found is None else [found]
        else:
            models = self._catalog.versions(request.name)
        if request.name and not models:
            raise _not_counted(request)
        return pb.ModelStatisticsResponse(model_stats=[describe.statistics(model) for model in models])

    async def RepositoryIndex(
        self,
        request: pb.RepositoryIndexRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.RepositoryIndexResponse:
        """Every version of the repository, and those known to this process; there is one repository, without a name."""
        if request.repository_name:
            raise Unsupported("'repository_name' specification is not supported")
        return describe.index(
            self._catalog, () if request.ready else self._repository.known(), ready_only=request.ready
        )

    async def RepositoryModelLoad(
        self,
        request: pb.RepositoryModelLoadRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.RepositoryModelLoadResponse:
        """Load by hand; answers when the model does."""
        model = repository.named(request)
        files = self._settings.load_files
        override = await asyncio.to_thread(repository.override_of, model, request.parameters, files_allowed=files)
        await self._repository.load(model, override)
        return dialects.loaded(model)

    async def RepositoryModelUnload(
        self,
        request: pb.RepositoryModelUnloadRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.RepositoryModelUnloadResponse:
        """Unload by hand; answers when the model is gone. Only KServe's clients want to know that it was not there."""
        dependents = repository.unload_dependents(request.parameters)
        model = repository.named(request)
        try:
            await self._repository.unload(model, dependents=dependents)
        except NotFound:
            if dialects.is_kserve(request):
                raise
        return dialects.unloaded(model)

    async def SystemSharedMemoryStatus(
        self,
        request: pb.SystemSharedMemoryStatusRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.SystemSharedMemoryStatusResponse:
        """Regions registered."""
        return describe.regions(self._shared("SystemSharedMemoryStatus").status(request.name))

    async def SystemSharedMemoryRegister(
        self,
        request: pb.SystemSharedMemoryRegisterRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.SystemSharedMemoryRegisterResponse:
        """A region more."""
        memory = self._shared("SystemSharedMemoryRegister")
        memory.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self,
        request: pb.SystemSharedMemoryUnregisterRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        """A region less, or none left."""
        self._shared("SystemSharedMemoryUnregister").unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def _shared(self, method: str) -> SharedMemory:
        if self._memory is None:
            raise Unsupported(f"{method} is not enabled (MLMESH_SHARED_MEMORY)", reason="METHOD_NOT_IMPLEMENTED")
        return self._memory

    async def CudaSharedMemoryStatus(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("CudaSharedMemoryStatus")

    async def CudaSharedMemoryRegister(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("CudaSharedMemoryRegister")

    async def CudaSharedMemoryUnregister(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        """Not implemented."""
        raise _unimplemented("CudaSharedMemoryUnregister")

    async def TraceSetting(
        self,
        request: pb.TraceSettingRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.TraceSettingResponse:
        """Change what is traced, of a model or of all, and tell how it is."""
        if request.model_name and not self._catalog.statuses(request.model_name):
            shown = request.model_name[:256]
            raise NotFound(f"Request for unknown model : {shown}", reason="MODEL_NOT_FOUND")
        self._traces.update(request.model_name, {name: said.value for name, said in request.settings.items()})
        return describe.trace_settings(self._traces.shown(request.model_name))

    async def LogSettings(self, request: pb.LogSettingsRequest, context: Any) -> pb.LogSettingsResponse:  # noqa: ARG002
        """Change what is logged, and tell how it is."""
        self._logs.update(request.settings)
        return describe.log_settings(self._logs.shown())


def _not_counted(request: pb.ModelStatisticsRequest) -> NotFound:
    shown = request.name[:256]
    if request.version:
        text = f"requested model version is not available for model '{shown}'"
    else:
        text = f"requested model '{shown}' is not available"
    return NotFound(text, reason="MODEL_NOT_FOUND")


def _unimplemented(method: str) -> Unsupported:
    return Unsupported(f"{method} is not implemented", reason="METHOD_NOT_IMPLEMENTED")
