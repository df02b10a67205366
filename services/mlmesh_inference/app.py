"""The inference process, put together."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from mlmesh.inference.v1 import control_pb2, control_pb2_grpc
from mlmesh_inference.building import EXECUTOR as COMPILER
from mlmesh_inference.building import building, operations_service, tensorrt_kind
from mlmesh_inference.builds import Builds
from mlmesh_inference.cache import ModelCache
from mlmesh_inference.catalog import Catalog, State, Status
from mlmesh_inference.choosing import EngineChooser
from mlmesh_inference.config import InferenceSettings, ProtocolSettings
from mlmesh_inference.config_engines import EngineSettings
from mlmesh_inference.control import WATCH_METHODS, InferenceControlServicer
from mlmesh_inference.engines.base import EngineKind
from mlmesh_inference.engines.child import Prover
from mlmesh_inference.engines.kinds import engine_kinds as model_file_kinds
from mlmesh_inference.engines.tensorrt import TensorRTKind
from mlmesh_inference.engines.verdicts import VerdictStore
from mlmesh_inference.follow import Source
from mlmesh_inference.load import LoadMeter
from mlmesh_inference.loader import Loader
from mlmesh_inference.loading import Loading
from mlmesh_inference.moving import OpenStreams
from mlmesh_inference.oip import model_repository
from mlmesh_inference.oip.dialects import TRITON, add_to_server
from mlmesh_inference.oip.direct import DirectInfer, DirectStreamInfer
from mlmesh_inference.oip.infer import shutting_down
from mlmesh_inference.oip.repository import Repository
from mlmesh_inference.oip.servicer import METHODS, OpenInferenceServicer
from mlmesh_inference.oip.shared_memory import SharedMemory
from mlmesh_inference.oip.stream import Streaming
from mlmesh_inference.registry import RegistryClient
from mlmesh_inference.renewal import LoadedVersions
from mlmesh_inference.tokens import Tokens
from mlmesh_inference.trace_settings import TraceSettings
from mlmesh_inference.tracing import SpanTracer
from mlmesh_inference.tuning import tune
from mlmesh_runtime import orca
from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.config import Settings
from mlmesh_runtime.direct import DirectMethod
from mlmesh_runtime.executors import Executors
from mlmesh_runtime.health import HealthStatuses
from mlmesh_runtime.server import Server, Service
from mlmesh_runtime.telemetry import tracing
from open_inference import grpc_service_pb2

_LOG = logging.getLogger(__name__)
_SERVICE: Final = grpc_service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]


def engine_kinds(tensorrt: TensorRTKind | None = None) -> tuple[EngineKind, ...]:
    """Engines in the order of preference, before anything is measured."""
    return (tensorrt or TensorRTKind(), *model_file_kinds())


def server_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("mlmesh")
    except PackageNotFoundError:
        return "unknown"


class ModelHealth:
    """Tells health what the catalog says: "model:NAME" and "model:NAME/VERSION"; and "", once everything is there."""

    def __init__(self, health: HealthStatuses) -> None:
        self._health = health
        self.catalog: Catalog | None = None
        self.synced(False)

    def synced(self, ready: bool = True) -> None:
        """Whether the start is over: the whole server and the inference service answer from then on."""
        for name in ("", _SERVICE.full_name):
            self._health.set(name, ready)

    def changed(self, status: Status) -> None:
        """A version changed; the catalog's listener."""
        name = f"model:{status.model}/{status.version}"
        if status.state is State.UNLOADED:
            self._health.remove(name)
        else:
            self._health.set(name, status.state is State.READY)
        if self.catalog is None:
            return
        if self.catalog.statuses(status.model):
            self._health.set(f"model:{status.model}", self.catalog.find(status.model, "") is not None)
        else:
            self._health.remove(f"model:{status.model}")


def streaming_of(catalog: Catalog, settings: Settings, inference: InferenceSettings) -> Streaming:
    """What the process's streams share."""
    return Streaming(
        catalog=catalog,
        # No secret: which streams move is left to chance.
        open=OpenStreams(
            asyncio.get_running_loop().call_later,
            chance=random.Random(),  # noqa: S311
            age_s=inference.stream_age_s,
        ),
        tokens=Tokens(inference.stream_key),
        hold_s=settings.grace_s / 2,
    )


def services(
    catalog: Catalog,
    repository: Repository,
    kinds: Sequence[EngineKind],
    going_away: asyncio.Event,
    streaming: Streaming,
    *,
    protocol: ProtocolSettings | None = None,
    traces: TraceSettings | None = None,
    builds: Builds | None = None,
) -> list[Service]:
    """What the process serves, on one port."""
    protocol = protocol or ProtocolSettings()
    memory = SharedMemory() if protocol.shared_memory else None
    reporter = orca.LoadReporter(LoadMeter(catalog).report)
    raw = bool(protocol.compat)
    streaming = dataclasses.replace(streaming, regions=memory, always_raw=raw)
    direct: dict[str, DirectMethod] = {"ModelInfer": DirectInfer(catalog, regions=memory, always_raw=raw)}
    if protocol.dialect == TRITON:
        direct["ModelStreamInfer"] = DirectStreamInfer(catalog, regions=memory, always_raw=raw)
    inference = OpenInferenceServicer(
        catalog,
        repository,
        version=server_version(),
        going_away=going_away,
        streaming=streaming,
        settings=protocol,
        memory=memory,
        traces=traces or TraceSettings(exporting=tracing()),
    )
    return [
        Service(
            add=add_to_server,
            servicer=inference,
            descriptor=_SERVICE,
            validate=False,
            deadline_optional=METHODS,
            direct=direct,
            going_away=shutting_down,
            trailers=reporter.trailers if protocol.load_trailers else None,
        ),
        Service(
            add=model_repository.add_to_server,
            servicer=model_repository.ModelRepositoryServicer(inference),
            descriptor=model_repository.DESCRIPTOR,
            validate=False,
            deadline_optional=model_repository.METHODS,
        ),
        Service(
            add=control_pb2_grpc.add_InferenceControlServiceServicer_to_server,
            servicer=InferenceControlServicer(catalog, kinds, streaming.open, builds),
            descriptor=control_pb2.DESCRIPTOR.services_by_name["InferenceControlService"],
            deadline_exempt=WATCH_METHODS,
        ),
        Service(
            add=orca.add_to_server,
            servicer=orca.OrcaServicer(reporter),
            descriptor=orca.DESCRIPTOR,
            validate=False,
            deadline_exempt={orca.METHOD},
        ),
        *([] if builds is None else [operations_service(builds)]),
    ]


async def serve(settings: Settings, *, source: Source | None = None, kinds: Sequence[EngineKind] | None = None) -> None:
    """Serve until told to stop.

    Args:
        settings: of the process. source: instead of the registry, for tests. kinds: engines, best first.
    """
    inference = InferenceSettings.from_settings(settings)
    engines = EngineSettings.from_environ(settings.environ)
    tensorrt = tensorrt_kind(engines, settings.data_dir)
    kinds = engine_kinds(tensorrt) if kinds is None else kinds
    health = HealthStatuses()
    traces = TraceSettings(exporting=tracing())
    model_health = ModelHealth(health)
    catalog = Catalog(listener=model_health.changed)
    model_health.catalog = catalog
    channel = open_channel(settings.registry_target, settings=settings)
    if not inference.selectors:
        _LOG.warning("MLMESH_SERVE is empty: nothing is served until RepositoryModelLoad asks for it")
    async with channel, Executors({"disk": 2, "build": 2, COMPILER: 1}) as executors:
        loading = Loading(
            source=source or RegistryClient(channel),
            cache=ModelCache(settings.data_dir / "cache"),
            catalog=catalog,
            kinds=kinds,
            settings=inference,
            disk=executors["disk"],
            build=executors["build"],
            tracer=SpanTracer(admits=traces.admits),
            prover=Prover(VerdictStore(settings.data_dir / "verdicts")) if inference.model_trial else None,
            chooser=EngineChooser(
                kinds,
                inference,
                VerdictStore(settings.data_dir / "verdicts"),
                disk=executors["disk"],
                build=executors["build"],
            ),
        )
        loader = Loader(loading, on_synced=model_health.synced)
        served = LoadedVersions(loading, loader.record)
        made = building(engines, tensorrt, served, executors, data_dir=settings.data_dir, channel=channel)
        going_away = asyncio.Event()
        streaming = streaming_of(catalog, settings, inference)
        server = Server(
            settings,
            services(
                catalog,
                loader,
                kinds,
                going_away,
                streaming,
                protocol=inference.protocol,
                traces=traces,
                builds=made.builds,
            ),
            health=health,
        )
        server.on_drain(going_away.set)
        server.on_drain(streaming.open.drain)
        async with server, asyncio.TaskGroup() as group:
            background = [group.create_task(loader.run()), group.create_task(made.run(catalog))]
            background.append(group.create_task(tune(loading)))
            await server.serve_until_signal()
            for task in background:
                task.cancel()
        for ready in catalog.ready_models():
            ready.runner.abort()
