"""One upload that is being worked on: its steps in order, none left half done by a caller who goes away.

Bytes are written, looked at and synced at the same time, each on a thread, none further ahead of the others than a
bound: while a chunk is hashed the next is written, and a sync goes on while both do.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from mlmesh_registry.blobs import Blobs, Staging
from mlmesh_registry.inspection import Inspection
from mlmesh_registry.ledger import Blob, Part, SqlBlobLedger, Upload, offset_mismatch
from mlmesh_runtime.chunks import CHUNK_BYTES, Chunk, crc32c
from mlmesh_runtime.errors import Corrupt, InvalidInput, MeshError, NotFound, WrongState
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

T = TypeVar("T")

_INSPECTIONS_MAX = 64
_TAKE_UP_TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What every upload works with. `inspections` are of uploads that nobody is working on just now."""

    blobs: Blobs
    ledger: SqlBlobLedger
    disk: BoundedExecutor
    clock: Callable[[], datetime]
    commit_bytes: int
    inspections: OrderedDict[str, Inspection] = field(default_factory=OrderedDict)

    async def discard(self, upload_id: str) -> None:
        """Forget an upload. Row first: a file without a row is swept, a row without its file would be an error."""
        self.inspections.pop(upload_id, None)
        await self.ledger.discard(upload_id)
        await run_blocking(self.disk, self.blobs.drop, upload_id)

    def keep(self, upload_id: str, inspection: Inspection) -> None:
        """Keep what was found out for whoever goes on."""
        self.inspections[upload_id] = inspection
        while len(self.inspections) > _INSPECTIONS_MAX:
            self.inspections.popitem(last=False)


@dataclass(slots=True, kw_only=True)
class _Session:
    """An upload that is open for writing. `syncing` and `looking` are what goes on beside the next write."""

    upload: Upload
    staging: Staging
    inspection: Inspection | None
    syncing: "asyncio.Task[None] | None" = None
    looking: "asyncio.Task[None] | None" = None


class LiveUpload:
    """See Artifacts.appending. Nothing is read or opened before the first step, which knows the ledger's word by then.

    Errors of every step: NotFound (UPLOAD_NOT_FOUND), Overloaded (DISK_FULL), NotReady (STORAGE_UNAVAILABLE), Corrupt
    (BLOB_CORRUPT) when the disk lost what was committed; the upload is then discarded.
    """

    def __init__(self, upload_id: str, place: Place) -> None:
        self.users = 0
        self._id = upload_id
        self._place = place
        self._lock = asyncio.Lock()
        self._session: _Session | None = None

    async def append(self, chunk: Chunk) -> None:
        """Add a chunk where the last ended. A refused chunk changes nothing.

        Errors: InvalidInput (INVALID_FIELD, UPLOAD_TOO_LARGE), Conflict (UPLOAD_OFFSET_MISMATCH), Corrupt
        (CHUNK_CHECKSUM_MISMATCH).
        """
        await whole(self._locked(self._append, chunk))

    async def commit(self) -> None:
        """Put what was appended on disk, then record it."""
        if self._session is not None:
            await whole(self._locked(self._commit))

    async def finish(self, actor: str) -> Blob:
        """See Artifacts.finish."""
        return await whole(self._locked(self._finish, actor))

    async def cancel(self, actor: str) -> None:
        """See Artifacts.cancel."""
        await whole(self._locked(self._cancel, actor))

    async def close(self) -> None:
        """Let go of the file, unless somebody came to work on it meanwhile."""
        await whole(self._locked(self._close_unused))

    async def _locked(self, step: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        async with self._lock:
            return await step(*arguments)

    async def _append(self, chunk: Chunk) -> None:
        session = self._session or await self._open()
        staging, upload = session.staging, session.upload
        _check(chunk, staging.written, upload.size_bytes)
        await run_blocking(self._place.disk, _write, staging, chunk)
        try:
            await self._look(session, chunk.data)
            if staging.written - staging.committed >= self._place.commit_bytes:
                await self._begin_sync(session)
        except (MeshError, OSError):
            # What was not committed may be there or not: whoever goes on begins at what was.
            await self._close()
            raise

    async def _look(self, session: _Session, data: bytes) -> None:
        """Begin to look at bytes, after those before them."""
        if session.inspection is not None:
            if session.looking is not None:
                await session.looking
            session.looking = asyncio.ensure_future(run_blocking(self._place.disk, session.inspection.feed, data))

    async def _commit(self) -> None:
        if (session := self._session) is not None:
            try:
                await _end_of(session)
                if session.staging.written > session.staging.committed:
                    await self._sync(session)
            except (MeshError, OSError):
                await self._close()
                raise

    async def _begin_sync(self, session: _Session) -> None:
        if session.syncing is not None:
            await session.syncing
        session.syncing = asyncio.ensure_future(self._sync(session))

    async def _sync(self, session: _Session) -> None:
        staging = session.staging
        try:
            part = await run_blocking(self._place.disk, staging.sync)
        except OSError as error:
            await self._place.discard(self._id)
            text = "the disk failed while bytes were made durable; the upload is discarded, start again"
            raise Corrupt(text, reason="BLOB_CORRUPT") from error
        try:
            await self._place.ledger.commit(self._id, part, expected_bytes=staging.committed)
        except NotFound:
            # It was cancelled, or its time was over, while this came.
            await run_blocking(self._place.disk, self._place.blobs.drop, self._id)
            raise
        staging.committed = part.end

    async def _finish(self, actor: str) -> Blob:
        place = self._place
        await self._commit()
        upload, parts = await self._known()
        if upload.finished:
            return await place.ledger.blob(upload.sha256)
        if upload.committed_bytes != upload.size_bytes:
            text = f"{upload.committed_bytes} of {upload.size_bytes} bytes are here; send the rest first"
            expected = {"expected_offset": str(upload.committed_bytes)}
            raise WrongState(text, reason="UPLOAD_OFFSET_MISMATCH", metadata=expected)
        await self._close()
        inspection = place.inspections.pop(self._id, None) or Inspection(upload.size_bytes)
        try:
            found = await run_blocking(place.disk, place.blobs.admit, upload, parts, inspection)
        except (Corrupt, InvalidInput):
            await place.discard(self._id)
            raise
        try:
            blob, stale = await place.ledger.finish(upload, found, actor=actor)
        except NotFound:
            # It was cancelled, or its time was over, while its bytes were put where nobody will look for them.
            await remove_unknown(place, upload.sha256)
            raise
        await run_blocking(place.disk, place.blobs.drop, upload.id)
        if stale:
            await remove_unknown(place, blob.sha256)
        return blob

    async def _cancel(self, actor: str) -> None:
        await self._close()
        self._place.inspections.pop(self._id, None)
        await self._place.ledger.cancel(self._id, actor=actor)
        await run_blocking(self._place.disk, self._place.blobs.drop, self._id)

    async def _known(self) -> tuple[Upload, Sequence[Part]]:
        return await self._place.ledger.parts(self._id, self._place.clock())

    async def _open(self) -> _Session:
        place = self._place
        upload, parts = await self._known()
        for _ in range(_TAKE_UP_TRIES):
            if upload.finished:
                raise offset_mismatch("the upload is finished already", upload.size_bytes)
            try:
                staging = await run_blocking(place.disk, place.blobs.stage, upload, parts)
            except Corrupt:
                await place.discard(self._id)
                raise
            before = upload.committed_bytes
            upload, parts = await self._known()
            if upload.committed_bytes == before:
                break
            # Another process was still at it when this one asked.
            await run_blocking(place.disk, staging.close)
        else:
            raise offset_mismatch("somebody else goes on with this upload", upload.committed_bytes)
        inspection = place.inspections.pop(self._id, None) if place.blobs.inspects_as_written else None
        if place.blobs.inspects_as_written and upload.committed_bytes == 0:
            inspection = Inspection(upload.size_bytes)
        if inspection is not None and inspection.position != upload.committed_bytes:
            inspection = None
        self._session = _Session(upload=upload, staging=staging, inspection=inspection)
        return self._session

    async def _close_unused(self) -> None:
        if self.users == 0:
            await self._close()

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        with contextlib.suppress(MeshError, OSError):
            await _end_of(session)
        await run_blocking(self._place.disk, session.staging.close)
        inspection = session.inspection
        if inspection is not None and inspection.position == session.staging.committed:
            self._place.keep(self._id, inspection)


async def remove_unknown(place: Place, sha256: str) -> None:
    """Remove what lies at places of a digest where no blob is and none will be."""
    stored = await run_blocking(place.disk, place.blobs.of, sha256)
    kept, _ = await place.ledger.kept([(each.sha256, each.upload_id) for each in stored], ())
    for each in stored:
        if (each.sha256, each.upload_id) not in kept:
            await run_blocking(place.disk, place.blobs.remove, each)


async def _end_of(session: _Session) -> None:
    """Wait for what goes on beside; the first error of it."""
    tasks = [task for task in (session.looking, session.syncing) if task is not None]
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if (error := task.exception()) is not None:
            raise error


def _check(chunk: Chunk, expected: int, size_bytes: int) -> None:
    length = len(chunk.data)
    if length > CHUNK_BYTES:
        raise InvalidInput(f"data: {length} bytes, at most {CHUNK_BYTES}", field="data")
    if chunk.offset != expected:
        raise offset_mismatch(f"a chunk starts at {chunk.offset}, expected {expected}", expected)
    if chunk.offset + length > size_bytes:
        text = f"data: reaches byte {chunk.offset + length} where {size_bytes} were announced"
        raise InvalidInput(text, field="data", reason="UPLOAD_TOO_LARGE")


def _write(staging: Staging, chunk: Chunk) -> None:
    if crc32c(chunk.data) != chunk.crc32c:
        text = f"the chunk of {len(chunk.data)} bytes at {chunk.offset} fails its CRC-32C"
        raise Corrupt(text, reason="CHUNK_CHECKSUM_MISMATCH")
    staging.write(chunk.data)


async def whole(step: Coroutine[Any, Any, T]) -> T:
    """Run a step to its end even when the caller is cancelled; the caller leaves only after it."""
    task = asyncio.ensure_future(step)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        # Nobody is left to hear of an error; reading it keeps asyncio from reporting it as forgotten.
        if not task.cancelled():
            task.exception()
        raise
