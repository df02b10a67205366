"""Bytes in and out: resumable uploads that end as content-addressed blobs, and verified reads.

What is answered as committed was synced first and then recorded, so it survives a crash. A blob appears by one step
(a row in the ledger) after its bytes were verified, synced and named; everything before that step is swept at start.
"""

import contextlib
import hashlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from datetime import datetime

from mlmesh_registry import names
from mlmesh_registry.blobs import LocalBlobs
from mlmesh_registry.ledger import Blob, SqlBlobLedger, Upload
from mlmesh_registry.uploading import LiveUpload, Place
from mlmesh_runtime.chunks import CHUNK_BYTES, Chunk, crc32c
from mlmesh_runtime.errors import Corrupt, InvalidInput, MeshError
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

log = logging.getLogger(__name__)


class Artifacts:
    """Uploads and blobs of one registry.

    Args:
        disk: executor for file work.
        clock: the present time, timezone-aware UTC.
        blob_bytes_max: largest blob.
        commit_bytes: a stream is synced and recorded at least once per this many bytes, and when it ends or is cut.
    """

    def __init__(
        self,
        blobs: LocalBlobs,
        ledger: SqlBlobLedger,
        *,
        disk: BoundedExecutor,
        clock: Callable[[], datetime],
        blob_bytes_max: int,
        commit_bytes: int,
    ) -> None:
        self._blobs = blobs
        self._ledger = ledger
        self._disk = disk
        self._clock = clock
        self._blob_bytes_max = blob_bytes_max
        self._place = Place(blobs=blobs, ledger=ledger, disk=disk, clock=clock, commit_bytes=commit_bytes)
        self._live: dict[str, LiveUpload] = {}

    async def start(self, sha256: str, size_bytes: int, *, request_id: str, actor: str) -> Upload | Blob:
        """Open an upload, or give the blob when it is here already.

        Errors: InvalidInput (UPLOAD_TOO_LARGE), AlreadyExists (REQUEST_ID_REUSED), Overloaded (DISK_FULL).
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
            async with self.appending(upload_id) as live:
                await live.commit()
        return await self._ledger.get(upload_id, self._clock())

    @contextlib.asynccontextmanager
    async def appending(self, upload_id: str) -> AsyncIterator[LiveUpload]:
        """Work on an upload; what was appended is committed at the end, also when the end is a cut.

        Several may work on one upload at a time: every chunk says where it belongs, so at most one of them fits.
        """
        live = self._live.setdefault(upload_id, LiveUpload(upload_id, self._place))
        live.users += 1
        try:
            yield live
            await live.commit()
        except BaseException:
            # The first error is the one to tell; that the rest was committed is a kindness to whoever resumes.
            with contextlib.suppress(MeshError, OSError):
                await live.commit()
            raise
        finally:
            live.users -= 1
            if live.users == 0:
                del self._live[upload_id]
                live.close()

    async def finish(self, upload_id: str) -> Blob:
        """Verify the whole digest and make the blob visible. Repeating it gives the same answer.

        Errors: WrongState (UPLOAD_OFFSET_MISMATCH) while bytes are missing, Corrupt (DIGEST_MISMATCH) when they are not
        those announced; the upload is then discarded. NotFound (UPLOAD_NOT_FOUND), Overloaded (DISK_FULL).
        """
        async with self.appending(upload_id) as live:
            return await live.finish()

    async def blob(self, sha256: str) -> Blob:
        """Tell whether a blob is here. Errors: NotFound (BLOB_NOT_FOUND)."""
        return await self._ledger.blob(sha256)

    async def read(self, sha256: str, *, offset: int, limit_bytes: int) -> AsyncGenerator[tuple[Chunk, Blob], None]:
        """Chunks of a range in order (limit_bytes 0: to the end); at least one, empty when the range is.

        A blob read whole is verified, and its last chunk is held back until it is: wrong bytes never look complete.
        Errors: NotFound (BLOB_NOT_FOUND), InvalidInput for an offset behind the end, Corrupt (BLOB_CORRUPT).
        """
        blob = await self._ledger.blob(sha256)
        if offset > blob.size_bytes:
            raise InvalidInput(f"offset: {offset}, the blob has {blob.size_bytes} bytes", field="offset")
        end = min(blob.size_bytes, offset + limit_bytes) if limit_bytes else blob.size_bytes
        await run_blocking(self._disk, self._blobs.check_size, blob)
        whole = hashlib.sha256() if (offset, end) == (0, blob.size_bytes) else None
        position = offset
        while True:
            chunk = await run_blocking(self._disk, self._read_chunk, blob, position, end, whole)
            position += len(chunk.data)
            if position == end and whole is not None and whole.hexdigest() != sha256:
                raise Corrupt(f"{blob.name}: the stored bytes have another digest", reason="BLOB_CORRUPT")
            yield chunk, blob
            if position == end:
                return

    def _read_chunk(self, blob: Blob, start: int, end: int, whole: "hashlib._Hash | None") -> Chunk:
        stop = min(end, start + CHUNK_BYTES)
        data = self._blobs.read(blob, start, stop) if stop > start else b""
        if whole is not None:
            whole.update(data)
        return Chunk(start, data, crc32c(data))

    async def sweep(self) -> None:
        """Remove what crashes left behind. Only at start, before anybody uploads."""
        blobs, upload_ids = await self._ledger.known()
        if orphans := await run_blocking(self._disk, self._blobs.sweep, blobs, upload_ids):
            log.info("swept files that no crash-safe step had finished", extra={"files": orphans})

    async def expire(self) -> None:
        """Discard uploads past their time that nobody is working on."""
        for upload_id in await self._ledger.expired(self._clock()):
            if upload_id not in self._live:
                await self._place.discard(upload_id)
