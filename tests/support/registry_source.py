"""A registry in memory for loader tests: the test publishes, cuts, corrupts. The real one is tested in integration."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping

from mlmesh_inference.desired import ModelFile, VersionRecord
from mlmesh_inference.events import AliasDeleted, AliasMoved, Bookmark, Event, Named, Published, Withdrawn
from mlmesh_inference.tensors import Signature
from mlmesh_runtime.chunks import Chunk, crc32c
from mlmesh_runtime.errors import NotFound, NotReady, RevisionLost


class MemoryRegistry:
    """Implements follow.Source.

    `down` refuses everything; `cut()` ends open watches; `damage` replaces a blob's bytes on the way; `chunk_bytes` and
    `cut_after` make downloads end early.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.blobs: dict[str, bytes] = {}
        self.damage: dict[str, bytes] = {}
        self.down = False
        self.kept_from = 1
        self.watched_from: list[int] = []
        self.downloads: list[tuple[str, int]] = []
        self.chunk_bytes = 1 << 20
        self.cut_after: int | None = None
        self.hold_downloads: asyncio.Event | None = None
        self._changed = asyncio.Condition()
        self._generation = 0

    @property
    def revision(self) -> int:
        """Of the last change."""
        return len(self.events)

    async def publish(
        self,
        model: str,
        version: int,
        data: bytes,
        *,
        signature: Signature | None = None,
        path: str = "model.onnx",
        quarantined: bool = False,
    ) -> None:
        """A version appears, or its stage changes."""
        file = self.blob(data, path)
        record = VersionRecord(
            model=model, version=version, files=(file,), signature=signature, quarantined=quarantined
        )
        await self._add(Published(revision=self.revision + 1, record=record))

    async def publish_files(
        self, model: str, version: int, files: Mapping[str, bytes], *, signature: Signature | None = None
    ) -> None:
        """A version of several files appears."""
        made = tuple(self.blob(data, path) for path, data in files.items())
        record = VersionRecord(model=model, version=version, files=made, signature=signature)
        await self._add(Published(revision=self.revision + 1, record=record))

    async def delete(self, model: str, version: int) -> None:
        """A version goes."""
        await self._add(Withdrawn(revision=self.revision + 1, model=model, version=version))

    async def name(self, model: str, *, servable: bool) -> None:
        """A model is registered."""
        await self._add(Named(revision=self.revision + 1, model=model, servable=servable))

    def blob(self, data: bytes, path: str = "model.onnx") -> ModelFile:
        """Keep bytes; the file that names them."""
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return ModelFile(path=path, sha256=digest, size=len(data))

    async def alias(self, model: str, alias: str, version: int) -> None:
        """An alias moves."""
        await self._add(AliasMoved(revision=self.revision + 1, model=model, alias=alias, version=version))

    async def delete_alias(self, model: str, alias: str) -> None:
        """An alias goes."""
        await self._add(AliasDeleted(revision=self.revision + 1, model=model, alias=alias))

    async def cut(self) -> None:
        """End every open watch."""
        async with self._changed:
            self._generation += 1
            self._changed.notify_all()

    async def watched(self, times: int) -> None:
        """Wait until a watch was asked for this often."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.watched_from) >= times)

    async def _add(self, event: Event) -> None:
        async with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    async def watch(self, from_revision: int) -> AsyncGenerator[Event]:
        """See follow.Source; events of the present state are the whole log here."""
        async with self._changed:
            self.watched_from.append(from_revision)
            self._changed.notify_all()
        if self.down:
            raise NotReady("connection refused")
        if 0 < from_revision < self.kept_from:
            raise RevisionLost(f"revision {from_revision} is no longer kept")
        generation, place = self._generation, max(from_revision - 1, 0)
        bookmarked = False
        while True:
            while place < len(self.events):
                yield self.events[place]
                place += 1
            if not bookmarked:
                bookmarked = True
                yield Bookmark(revision=self.revision)
            async with self._changed:
                while len(self.events) <= place and generation == self._generation:
                    await self._changed.wait()
            if generation != self._generation:
                raise NotReady("the connection was cut")

    async def download(self, file: ModelFile, offset: int) -> AsyncGenerator[Chunk]:
        """See follow.Source."""
        self.downloads.append((file.sha256, offset))
        if self.down:
            raise NotReady("connection refused")
        if file.sha256 not in self.blobs:
            raise NotFound("no such blob", reason="BLOB_NOT_FOUND")
        data = self.damage.get(file.sha256, self.blobs[file.sha256])
        sent = 0
        while offset < len(data):
            if self.hold_downloads is not None:
                await self.hold_downloads.wait()
            if self.cut_after is not None and sent >= self.cut_after:
                raise NotReady("the connection was cut")
            piece = data[offset : offset + self.chunk_bytes]
            yield Chunk(offset, piece, crc32c(piece))
            offset += len(piece)
            sent += len(piece)
