"""All that builds engines in a process, put together."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from prometheus_client import Counter

from mlmesh_inference.build_log import DiskLog
from mlmesh_inference.builds import Builds
from mlmesh_inference.catalog import Catalog
from mlmesh_inference.config_engines import EngineSettings
from mlmesh_inference.engine_cache import EngineCache, load_key
from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt import TensorRTKind, TensorRTSettings
from mlmesh_inference.operations import SERVICE, WAIT_METHODS, OperationsServicer, add_to_server
from mlmesh_inference.renewal import build_what_lacks
from mlmesh_inference.sharing import SharedEngines
from mlmesh_inference.workshop import EngineWorkshop, Served
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.executors import Executors
from mlmesh_runtime.server import Service
from mlmesh_runtime.telemetry import REGISTRY

EXECUTOR: Final = "compiler"
"""Name of the executor with one thread: one build at a time."""
REFUSED: Final = Counter(
    "mlmesh_inference_engines_refused",
    "Compiled engines that were not believed, by where they came from.",
    ("source",),
    registry=REGISTRY,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Building:
    """The builds of a process and what they are about."""

    builds: Builds
    kind: TensorRTKind
    automatic: bool

    async def run(self, catalog: Catalog) -> None:
        """Do builds for ever, and begin those that nobody needs to ask for."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.builds.run())
            if self.automatic:
                boot = secrets.token_hex(8)
                group.create_task(build_what_lacks(catalog, self.builds, self.kind, boot=boot))


def operations_service(builds: Builds) -> Service:
    """google.longrunning.Operations over builds."""
    return Service(
        add=add_to_server,
        servicer=OperationsServicer(builds),
        descriptor=SERVICE,
        validate=False,
        deadline_exempt=WAIT_METHODS,
    )


def tensorrt_kind(settings: EngineSettings, data_dir: Path) -> TensorRTKind:
    """The engine kind over its cache. Raises ConfigError for a key that cannot be used."""
    named = settings.cache_key_file
    try:
        key = load_key(named or data_dir / "engines" / "key", generate=named is None)
    except EngineError as error:
        raise ConfigError(f"MLMESH_ENGINE_CACHE_KEY_FILE: {error}") from None
    cache = EngineCache(
        data_dir / "engines",
        key,
        bytes_max=settings.cache_bytes,
        refused=lambda _reason: REFUSED.labels("cache").inc(),
    )
    return TensorRTKind(
        cache=cache,
        settings=TensorRTSettings(
            gpu=settings.gpu,
            instances=settings.instances,
            graphs=settings.graphs,
            capabilities=settings.capabilities,
        ),
        compiles=False,
    )


def shared_engines(settings: EngineSettings, channel: grpc.aio.Channel, executors: Executors) -> SharedEngines | None:
    """Engines of the fleet, None where none are shared. Raises ConfigError for a key that cannot be used."""
    if not settings.takes or settings.share_key_file is None:
        return None
    try:
        key = load_key(settings.share_key_file, generate=False)
    except EngineError as error:
        raise ConfigError(f"MLMESH_ENGINE_SHARE_KEY_FILE: {error}") from None
    return SharedEngines(
        channel,
        key,
        executors["disk"],
        offers=settings.offers,
        bytes_max=settings.cache_bytes,
        refused=lambda _reason: REFUSED.labels("registry").inc(),
    )


def building(
    settings: EngineSettings,
    kind: TensorRTKind,
    served: Served,
    executors: Executors,
    *,
    data_dir: Path,
    channel: grpc.aio.Channel,
) -> Building:
    """Builds of a process. `executors` has one of EXECUTOR's name. Raises ConfigError."""
    workshop = EngineWorkshop(
        served,
        {kind.name: kind},
        compiler=executors[EXECUTOR],
        disk=executors["disk"],
        fleet=shared_engines(settings, channel, executors),
    )
    log = DiskLog(data_dir / "builds", executors["disk"])
    return Building(builds=Builds(workshop, log), kind=kind, automatic=settings.automatic)
