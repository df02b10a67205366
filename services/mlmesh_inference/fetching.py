"""The bytes of versions: fetched from the registry once, however many versions are made of them, or brought along."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakValueDictionary

from mlmesh_inference.cache import ModelCache
from mlmesh_inference.catalog import Catalog, State
from mlmesh_inference.desired import ModelFile, VersionRecord
from mlmesh_inference.follow import Backoff, Sleep, Source
from mlmesh_runtime.chunks import crc32c
from mlmesh_runtime.errors import Corrupt, InvalidInput, MeshError, NotFound
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

_LOG = logging.getLogger(__name__)

CORRUPT_ATTEMPTS_MAX: Final = 3


class FetchError(Exception):
    """The bytes will not come. The text is for whoever published them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """Fetches into a cache.

    Args:
        source: bytes. cache: the disk. catalog: is told how it goes. disk: the executor for files.
    """

    source: Source
    cache: ModelCache
    catalog: Catalog
    disk: BoundedExecutor
    sleep: Sleep
    _locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    async def keep(self, file: ModelFile, data: bytes) -> None:
        """Put bytes that somebody brought along where a fetch would have put them."""

        def write() -> None:
            writer = self.cache.writer(file)
            try:
                rest = data[writer.committed :]
                writer.write(writer.committed, rest, crc32c(rest))
                writer.finish()
            finally:
                writer.close()

        async with self._alone(file):
            if not await run_blocking(self.disk, self.cache.has, file):
                await run_blocking(self.disk, write)

    @asynccontextmanager
    async def _alone(self, file: ModelFile) -> AsyncIterator[None]:
        """Versions share files, such as labels: the first fetches one, the others find it."""
        lock = self._locks.get(file.sha256)
        if lock is None:
            lock = self._locks[file.sha256] = asyncio.Lock()
        async with lock:
            yield

    async def fetch(self, record: VersionRecord, stalled: Callable[[], None]) -> None:
        """Until all of a version is here. What may pass is tried again for ever; `stalled` is called each time.

        Raises FetchError.
        """
        backoff, corrupt = Backoff(), 0
        while True:
            try:
                return await self._all(record)
            except (NotFound, InvalidInput) as error:
                raise FetchError(error.message) from error
            except (MeshError, OSError) as error:
                text = error.message if isinstance(error, MeshError) else str(error)
                corrupt += isinstance(error, Corrupt)
                if corrupt >= CORRUPT_ATTEMPTS_MAX:
                    raise FetchError(f"{text} ({corrupt} times)") from error
                _LOG.warning("fetch failed", extra={"model": record.model, "version": record.version, "error": text})
                self.catalog.progress(record.model, record.version, State.FETCHING, error=text)
                stalled()
                await self.sleep(backoff.next_s())

    async def _all(self, record: VersionRecord) -> None:
        done = 0
        for file in record.files:
            async with self._alone(file):
                if not await run_blocking(self.disk, self.cache.has, file):
                    await self._download(file, record, done)
            done += file.size
            self.catalog.progress(record.model, record.version, State.FETCHING, fetched_bytes=done)

    async def _download(self, file: ModelFile, record: VersionRecord, done: int) -> None:
        """Fetch one file, from where an earlier fetch was cut."""
        writer = await run_blocking(self.disk, self.cache.writer, file)
        try:
            if writer.committed < file.size:
                async with aclosing(self.source.download(file, writer.committed)) as chunks:
                    async for chunk in chunks:
                        committed = await run_blocking(self.disk, writer.write, *chunk)
                        fetched = done + committed
                        self.catalog.progress(record.model, record.version, State.FETCHING, fetched_bytes=fetched)
            await run_blocking(self.disk, writer.finish)
        finally:
            # A write that a thread has begun must end first; the executor's queue may be full of others' work.
            await asyncio.shield(run_blocking(self.disk, writer.close))
