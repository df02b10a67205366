"""One upload that is being worked on: its steps in order, none left half done by a caller who goes away.

While a chunk is written and looked at on a thread the next one is received, and a sync goes on beside both: what is
wrong with a chunk is told by the step after it, which does nothing then.
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
    bulk: BoundedExecutor
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
    """An upload that is open for writing.

    The next chunk starts at `expected`; what is before `syncing_to` is committed, or `syncing` is at it.
    """

    upload: Upload
    staging: Staging
    inspection: Inspection | None
    expected: int
    syncing_to: int
    taking: "asyncio.Task[None] | None" = None
    syncing: "asyncio.Task[None] | None" = None


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
        """Add a chunk where the last ended. A refused chunk changes nothing, and nothing follows it.

        Errors, of this chunk or of the one before: InvalidInput (INVALID_FIELD, UPLOAD_TOO_LARGE), Conflict
        (UPLOAD_OFFSET_MISMATCH), Corrupt (CHUNK_CHECKSUM_MISMATCH).
        """
        await whole(self._locked(self._append, chunk))

    async def commit(self, *, mine: bool = True) -> None:
        """Put what was appended on disk, then record it. That somebody else's chunk was refused is theirs to hear."""
        if self._session is not None:
            await whole(self._locked(self._commit, mine))

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
        _check(chunk, session.expected, session.upload.size_bytes)
        await self._taken(session)
        staging = session.staging
        if staging.written - session.syncing_to >= self._place.commit_bytes:
            await self._begin_sync(session)
        session.expected += len(chunk.data)
        work = run_blocking(self._place.disk, _take, staging, session.inspection, chunk)
        session.taking = asyncio.ensure_future(work)

    async def _taken(self, session: _Session) -> None:
        """Wait for the chunk before. One that was refused is as if it never came."""
        taking, session.taking = session.taking, None
        if taking is not None:
            try:
                await taking
            except BaseException:
                session.expected = session.staging.written
                raise

    async def _commit(self, mine: bool) -> None:
        if (session := self._session) is None:
            return
        try:
            if mine:
                await self._taken(session)
            elif session.taking is not None:
                await asyncio.wait({session.taking})
        finally:
            await self._synced(session)

    async def _synced(self, session: _Session) -> None:
        try:
            if session.syncing is not None:
                await session.syncing
            if session.staging.written > session.staging.committed:
                await self._sync(session)
        except (MeshError, OSError):
            # What was not committed may be there or not: whoever goes on begins at what was.
            await self._close()
            raise

    async def _begin_sync(self, session: _Session) -> None:
        try:
            if session.syncing is not None:
                await session.syncing
        except (MeshError, OSError):
            await self._close()
            raise
        session.syncing_to = session.staging.written
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
        await self._commit(mine=True)
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
            found = await run_blocking(place.bulk, place.blobs.admit, upload, parts, inspection)
        except MeshError as error:
            # Another process may have finished it meanwhile, and with that taken the staged bytes away.
            upload, _ = await self._known()
            if upload.finished:
                return await place.ledger.blob(upload.sha256)
            if isinstance(error, Corrupt | InvalidInput):
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
        begin = upload.committed_bytes
        self._session = _Session(
            upload=upload, staging=staging, inspection=inspection, expected=begin, syncing_to=begin
        )
        return self._session

    async def _close_unused(self) -> None:
        if self.users == 0:
            await self._close()

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        for task in (session.taking, session.syncing):
            if task is not None:
                with contextlib.suppress(MeshError, OSError):
                    await task
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


def _check(chunk: Chunk, expected: int, size_bytes: int) -> None:
    length = len(chunk.data)
    if length > CHUNK_BYTES:
        raise InvalidInput(f"data: {length} bytes, at most {CHUNK_BYTES}", field="data")
    if chunk.offset != expected:
        raise offset_mismatch(f"a chunk starts at {chunk.offset}, expected {expected}", expected)
    if chunk.offset + length > size_bytes:
        text = f"data: reaches byte {chunk.offset + length} where {size_bytes} were announced"
        raise InvalidInput(text, field="data", reason="UPLOAD_TOO_LARGE")


def _take(staging: Staging, inspection: Inspection | None, chunk: Chunk) -> None:
    if crc32c(chunk.data) != chunk.crc32c:
        text = f"the chunk of {len(chunk.data)} bytes at {chunk.offset} fails its CRC-32C"
        raise Corrupt(text, reason="CHUNK_CHECKSUM_MISMATCH")
    staging.write(chunk.data)
    if inspection is not None:
        inspection.feed(chunk.data)


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
