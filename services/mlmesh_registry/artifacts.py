"""Bytes in and out: resumable uploads that end as content-addressed blobs, and verified reads.

What is answered as committed was synced first and then recorded, so it survives a crash. A blob appears by one step
(a row in the ledger) after its bytes were looked at, synced and named; everything before that step is swept.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from datetime import datetime
from hashlib import sha256 as sha256_hash

from mlmesh_registry import names
from mlmesh_registry.blobs import Blobs, Reading, corrupt
from mlmesh_registry.inspection import Inspection
from mlmesh_registry.ledger import BLOCK_BYTES, DIGEST_BYTES, Blob, Found, SqlBlobLedger, Upload
from mlmesh_registry.uploading import LiveUpload, Place, remove_unknown, whole
from mlmesh_runtime.chunks import Chunk, crc32c
from mlmesh_runtime.errors import Corrupt, InvalidInput, MeshError, NotFound
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

log = logging.getLogger(__name__)

Quarantine = Callable[[str, str], Awaitable[object]]
"""Told the SHA-256 of a blob whose bytes are not its own, and why."""

_AHEAD = 2


async def _nobody(_sha256: str, _reason: str) -> None:
    """Quarantine nothing."""


class Artifacts:
    """Uploads and blobs of one registry.

    Args:
        disk: executor for short work on files or objects.
        bulk: executor for work that goes through all of a blob, which may take minutes.
        clock: the present time, timezone-aware UTC.
        blob_bytes_max: largest blob.
        commit_bytes: a stream is synced and recorded at least once per this many bytes, and when it ends or is cut.
        quarantine: called once for each corruption that is met, after it was remembered.
    """

    def __init__(
        self,
        blobs: Blobs,
        ledger: SqlBlobLedger,
        *,
        disk: BoundedExecutor,
        bulk: BoundedExecutor,
        clock: Callable[[], datetime],
        blob_bytes_max: int,
        commit_bytes: int,
        quarantine: Quarantine = _nobody,
    ) -> None:
        self._blobs = blobs
        self._ledger = ledger
        self._disk = disk
        self._bulk = bulk
        self._clock = clock
        self._blob_bytes_max = blob_bytes_max
        commit_bytes = min(commit_bytes, blobs.commit_bytes_max)
        self._place = Place(blobs=blobs, ledger=ledger, disk=disk, bulk=bulk, clock=clock, commit_bytes=commit_bytes)
        self._live: dict[str, LiveUpload] = {}
        self._quarantine = quarantine

    async def start(self, sha256: str, size_bytes: int, *, request_id: str, actor: str) -> Upload | Blob:
        """Open an upload, or give the blob when it is here already.

        Errors: InvalidInput (UPLOAD_TOO_LARGE), AlreadyExists (REQUEST_ID_REUSED), Overloaded (DISK_FULL,
        QUOTA_EXCEEDED).
        """
        names.sha256(sha256)
        if size_bytes < 0:
            raise InvalidInput("size_bytes: negative", field="size_bytes")
        if size_bytes > self._blob_bytes_max:
            text = f"size_bytes: {size_bytes}, at most {self._blob_bytes_max}"
            raise InvalidInput(text, field="size_bytes", reason="UPLOAD_TOO_LARGE")
        return await self._ledger.start(sha256, size_bytes, request_id=request_id, actor=actor)

    async def upload(self, upload_id: str) -> Upload:
        """Tell what is committed; what a cut stream left unsynced is committed first.

        Errors: NotFound (UPLOAD_NOT_FOUND).
        """
        if upload_id in self._live:
            async with self._joined(upload_id) as live:
                await live.commit(mine=False)
        return await self._ledger.get(upload_id, self._clock())

    @contextlib.asynccontextmanager
    async def appending(self, upload_id: str) -> AsyncIterator[LiveUpload]:
        """Work on an upload; what was appended is committed at the end, also when the end is a cut.

        Several may work on one upload at a time, also in other processes: every chunk says where it belongs, so at
        most one of them fits.
        """
        async with self._joined(upload_id) as live:
            try:
                yield live
                await live.commit()
            except BaseException:
                # The first error is the one to tell; that the rest was committed is a kindness to whoever resumes.
                with contextlib.suppress(MeshError, OSError):
                    await live.commit()
                raise

    @contextlib.asynccontextmanager
    async def _joined(self, upload_id: str) -> AsyncIterator[LiveUpload]:
        live = self._live.setdefault(upload_id, LiveUpload(upload_id, self._place))
        live.users += 1
        try:
            yield live
        finally:
            live.users -= 1
            if live.users == 0:
                await live.close()
            if live.users == 0 and self._live.get(upload_id) is live:
                del self._live[upload_id]

    async def finish(self, upload_id: str, *, actor: str = "") -> Blob:
        """Verify digest and format and make the blob visible. Repeating it gives the same answer.

        Errors: WrongState (UPLOAD_OFFSET_MISMATCH) while bytes are missing, Corrupt (DIGEST_MISMATCH) when they are not
        those announced, InvalidInput (FORMAT_NOT_ALLOWED) when they are none of the formats; of the last two nothing is
        kept. NotFound (UPLOAD_NOT_FOUND), Overloaded (DISK_FULL), NotReady (STORAGE_UNAVAILABLE).
        """
        async with self._joined(upload_id) as live:
            return await live.finish(actor)

    async def cancel(self, upload_id: str, *, actor: str = "") -> None:
        """Discard an upload, if there is one; a blob that it became stays."""
        async with self._joined(upload_id) as live:
            await live.cancel(actor)

    async def blob(self, sha256: str) -> Blob:
        """Tell whether a blob is here. Errors: NotFound (BLOB_NOT_FOUND)."""
        return await self._ledger.blob(sha256)

    async def read(self, sha256: str, *, offset: int, limit_bytes: int) -> AsyncGenerator[tuple[Chunk, Blob], None]:
        """Chunks of a range in order (limit_bytes 0: to the end); at least one, empty when the range is.

        No byte is given before the block that it is in was found to be what was stored; who meets other bytes has the
        blob remembered as damaged and its versions quarantined. A blob that was replaced by a new upload meanwhile is
        read on from there.
        Errors: NotFound (BLOB_NOT_FOUND), InvalidInput for an offset behind the end, Corrupt (BLOB_CORRUPT), NotReady
        (STORAGE_UNAVAILABLE).
        """
        blob = await self._ledger.blob(sha256)
        if offset > blob.size_bytes:
            raise InvalidInput(f"offset: {offset}, the blob has {blob.size_bytes} bytes", field="offset")
        end = min(blob.size_bytes, offset + limit_bytes) if limit_bytes else blob.size_bytes
        while True:
            try:
                async with contextlib.aclosing(self._read(blob, offset, end)) as chunks:
                    async for chunk in chunks:
                        yield chunk, blob
                        offset = chunk.offset + len(chunk.data)
            except Corrupt as error:
                blob = await whole(self._judged(blob, error))
            else:
                return

    async def _read(self, blob: Blob, offset: int, end: int) -> AsyncGenerator[Chunk, None]:
        first = offset // BLOCK_BYTES
        digests = await self._digests(blob, first, -(-end // BLOCK_BYTES) - first)
        reading = await run_blocking(self._disk, self._blobs.open, blob)
        ahead: deque[asyncio.Future[_Verified]] = deque()
        try:
            start, last = first * BLOCK_BYTES, min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, blob.size_bytes)
            while True:
                while len(ahead) < _AHEAD and start < last:
                    stop = min(start + self._blobs.read_bytes, last)
                    known = digests[(start - first * BLOCK_BYTES) // BLOCK_BYTES * DIGEST_BYTES :]
                    work = run_blocking(self._disk, _verified, reading, blob, start, stop, known)
                    ahead.append(asyncio.ensure_future(work))
                    start = stop
                if not ahead:
                    break
                chunks, wrong = await ahead.popleft()
                for chunk in chunks:
                    if cut := _within(chunk, offset, end):
                        yield cut
                if wrong is not None:
                    raise wrong
            if offset == end:
                yield Chunk(offset, b"", crc32c(b""))
        finally:
            # Threads still read: the file is theirs until they are done.
            await whole(_settled(ahead))
            await run_blocking(self._disk, reading.close)

    async def _digests(self, blob: Blob, first: int, count: int) -> bytes:
        if count <= 0:
            return b""
        if (known := await self._ledger.digests(blob, first, count)) is None:
            found = await run_blocking(self._bulk, self._inspect, blob)
            if found is None:
                raise corrupt(blob, "the stored bytes have another digest")
            await self._ledger.examined(blob, found)
            known = found.digests[first * DIGEST_BYTES :][: count * DIGEST_BYTES]
        return known

    async def _judged(self, blob: Blob, error: Corrupt) -> Blob:
        """What is there instead of a blob that was found corrupt: a new arrival of it, or the error."""
        now = await self._ledger.find(blob.sha256)
        if now is None:
            raise NotFound(f"{blob.name} not found", reason="BLOB_NOT_FOUND") from error
        if now.location != blob.location:
            return now
        await self._damaged(blob, error.message)
        raise error

    async def _damaged(self, blob: Blob, reason: str) -> None:
        log.error("a blob is damaged", extra={"blob": blob.name, "reason": reason})
        try:
            await self._ledger.judge(blob, damaged=True)
            await self._quarantine(blob.sha256, reason)
        except MeshError:
            # Wrong bytes are refused all the same; the next who reads them tries again.
            log.exception("a damaged blob could not be quarantined", extra={"blob": blob.name})

    async def verify(self, sha256: str) -> bool:
        """Read every byte of a blob; whether they are its own. If not, it is quarantined as by a read.

        Errors: NotFound (BLOB_NOT_FOUND), NotReady (STORAGE_UNAVAILABLE).
        """
        blob = await self._ledger.blob(sha256)
        try:
            found = await run_blocking(self._bulk, self._inspect, blob)
        except Corrupt:
            found = None
        if found is None:
            try:
                await whole(self._judged(blob, corrupt(blob, "the stored bytes have another digest")))
            except Corrupt:
                return False
            return await self.verify(sha256)
        if blob.damaged or not blob.format:
            await self._ledger.examined(blob, found)
            await self._ledger.judge(blob, damaged=False)
        return True

    def _inspect(self, blob: Blob) -> Found | None:
        inspection = Inspection(blob.size_bytes)
        reading = self._blobs.open(blob)
        try:
            for start in range(0, blob.size_bytes, self._blobs.read_bytes):
                inspection.feed(reading.read(start, min(start + self._blobs.read_bytes, blob.size_bytes)))
        finally:
            reading.close()
        return inspection.judge(blob.sha256)

    async def remove(self, sha256s: Collection[str]) -> None:
        """Remove the bytes of digests that have no row any more; those of an upload under way, or of a row, stay.

        Call it after the commit that took the rows away; calling it again does no harm. Errors: NotReady
        (STORAGE_UNAVAILABLE).
        """
        for sha256 in sha256s:
            await remove_unknown(self._place, sha256)

    async def sweep(self) -> None:
        """Remove what crashes left behind. Safe at any time, and with other processes at work."""
        removed = 0
        pages = self._blobs.stored()
        while (page := await run_blocking(self._disk, next, pages, None)) is not None:
            places = [(each.sha256, each.upload_id) for each in page if each.sha256]
            staged = {each.upload_id for each in page if not each.sha256}
            kept, coming = await self._ledger.kept(places, staged)
            for each in page:
                if (each.sha256, each.upload_id) not in kept and (each.sha256 or each.upload_id not in coming):
                    await run_blocking(self._disk, self._blobs.remove, each)
                    removed += 1
        if removed:
            log.info("swept what no crash-safe step had finished", extra={"files": removed})

    async def expire(self) -> None:
        """Discard uploads past their time that nobody is working on."""
        for upload_id in await self._ledger.expire(busy=frozenset(self._live)):
            self._place.inspections.pop(upload_id, None)
            await run_blocking(self._disk, self._blobs.drop, upload_id)

    async def examine(self) -> None:
        """Look at blobs that came before formats and blocks were known."""
        for blob in await self._ledger.unexamined():
            with contextlib.suppress(NotFound):
                await self.verify(blob.sha256)


_Verified = tuple[list[Chunk], Corrupt | None]


def _verified(reading: Reading, blob: Blob, start: int, stop: int, digests: bytes) -> _Verified:
    """Whole blocks [start, stop) of a blob, up to the first that has another digest, and the error for that."""
    data = reading.read(start, stop)
    chunks: list[Chunk] = []
    for number, at in enumerate(range(0, len(data), BLOCK_BYTES)):
        block = data[at : at + BLOCK_BYTES]
        if sha256_hash(block).digest() != digests[number * DIGEST_BYTES :][:DIGEST_BYTES]:
            return chunks, corrupt(blob, f"the block at byte {start + at} is not what was stored")
        chunks.append(Chunk(start + at, block, crc32c(block)))
    return chunks, None


def _within(chunk: Chunk, offset: int, end: int) -> Chunk | None:
    """What of a chunk lies in [offset, end)."""
    begin, stop = max(chunk.offset, offset), min(chunk.offset + len(chunk.data), end)
    if begin >= stop:
        return None
    if stop - begin == len(chunk.data):
        return chunk
    data = chunk.data[begin - chunk.offset : stop - chunk.offset]
    return Chunk(begin, data, crc32c(data))


async def _settled(futures: "deque[asyncio.Future[_Verified]]") -> None:
    if futures:
        await asyncio.wait(futures)
    for future in futures:
        future.exception()
