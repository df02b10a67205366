"""Versions that answer, seen by who builds engines for them: how to build, and choosing their engine anew."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable

from mlmesh_inference.builds import Builds
from mlmesh_inference.catalog import Catalog, State, Status
from mlmesh_inference.config import InferenceSettings
from mlmesh_inference.configured import ConfigError
from mlmesh_inference.desired import VersionRecord
from mlmesh_inference.engine_options import engine_options
from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.loading import Loading
from mlmesh_inference.workshop import Compiling, Order, Switched
from mlmesh_runtime.errors import InvalidInput, MeshError, Overloaded


class LoadedVersions:
    """See workshop.Served.

    Args:
        loading: makes a version ready. record: what is known of a version, see Loader.record.
    """

    def __init__(self, loading: Loading, record: Callable[[str, int], VersionRecord | None]) -> None:
        self._loading = loading
        self._catalog = loading.catalog
        self._settings = loading.settings
        self._record = record

    def order(self, model: str, version: int) -> Order:
        """How to build for a version that answers. Raises NotFound, NotReady, InvalidInput for an ensemble."""
        return order_of(self._catalog, self._settings, model, version)

    async def renew(self, model: str, version: int) -> Switched:
        """See workshop.Served. What served is drained before this returns."""
        before = self._catalog.ready(model, version)
        record = self._record(model, version)
        if before is None or record is None:
            raise EngineError("it was unloaded meanwhile")
        prepared = await self._loading.prepare(record, lambda: None, config=before.config)
        if isinstance(prepared, str):
            raise EngineError(prepared)
        engine, status = prepared.built.engine, self._catalog.status(model, version)
        if self._catalog.ready(model, version) is not before or status is None:
            engine.close()
            raise EngineError("it was unloaded, or loaded anew, meanwhile")
        if engine.name == status.engine:
            engine.close()
        else:
            self._loading.install(prepared)
            await before.runner.drain()
        return Switched(engine=engine.name, reason=prepared.built.reason)


def order_of(catalog: Catalog, settings: InferenceSettings, model: str, version: int) -> Order:
    """How to build for a version that answers."""
    ready = catalog.resolve(model, str(version))
    if ready.path is None:
        raise InvalidInput(f"'{model}' is an ensemble: engines are built for its steps", field="name")
    try:
        return Order(path=ready.path, options=engine_options(ready.config, settings))
    except ConfigError as error:
        raise InvalidInput(str(error), field="name") from None


async def build_what_lacks(catalog: Catalog, builds: Builds, kind: Compiling, *, boot: str) -> None:
    """Begin a build for every version that begins to answer with another engine, for ever.

    Where the kind's engines cannot run, nothing is built unless somebody asks. A version is tried once a process.

    Args:
        boot: unique to this process.
    """
    found = await asyncio.to_thread(kind.probe)
    if not found.available:
        return
    await builds.started.wait()
    while True:
        # A watcher that falls behind begins anew; builds are known by their request ids.
        with contextlib.suppress(Overloaded):
            async with catalog.watch() as changes:
                for status in catalog.statuses():
                    await _begin(catalog, builds, status, kind.name, boot)
                async for status in changes:
                    await _begin(catalog, builds, status, kind.name, boot)


async def _begin(catalog: Catalog, builds: Builds, status: Status, engine: str, boot: str) -> None:
    ready = catalog.ready(status.model, status.version)
    if ready is None or ready.path is None or status.state is not State.READY or status.engine == engine:
        return
    if ready.config.engine not in {"", engine}:
        return
    name = f"{boot}/{status.model}/{status.version}/{status.sha256}"
    with contextlib.suppress(MeshError):
        await builds.start(status.model, status.version, engine, request_id=hashlib.sha256(name.encode()).hexdigest())
