"""One upload that is being worked on: its steps in order, none left half done by a caller who goes away."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from mlmesh_registry.blobs import LocalBlobs
from mlmesh_registry.ledger import Blob, SqlBlobLedger, Upload
from mlmesh_registry.staging import StagedFile, offset_mismatch
from mlmesh_runtime.chunks import Chunk
from mlmesh_runtime.errors import Corrupt, WrongState
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What every upload works with."""

    blobs: LocalBlobs
    ledger: SqlBlobLedger
    disk: BoundedExecutor
    clock: Callable[[], datetime]
    commit_bytes: int
    # One at a time, so that two uploads of the same bytes do not replace each other's blob.
    admission: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def discard(self, upload_id: str) -> None:
        """Forget an upload. Row first: a file without a row is swept, a row without its file would be an error."""
        await self.ledger.discard([upload_id])
        await run_blocking(self.disk, self.blobs.drop, upload_id)


class LiveUpload:
    """See Artifacts.appending. Nothing is read or opened before the first step, which knows the ledger's word by then.

    Errors of every step: NotFound (UPLOAD_NOT_FOUND), Overloaded (DISK_FULL), Corrupt (BLOB_CORRUPT) when the disk
    lost what was committed; the upload is then discarded.
    """

    def __init__(self, upload_id: str, place: Place) -> None:
        self.users = 0
        self._id = upload_id
        self._place = place
        self._lock = asyncio.Lock()
        self._file: StagedFile | None = None

    async def append(self, chunk: Chunk) -> None:
        """Add a chunk where the last ended. A refused chunk changes nothing.

        Errors: InvalidInput (INVALID_FIELD, UPLOAD_TOO_LARGE), Conflict (UPLOAD_OFFSET_MISMATCH), Corrupt
        (CHUNK_CHECKSUM_MISMATCH).
        """
        await _whole(self._append(chunk))

    async def commit(self) -> None:
        """Put what was appended on disk, then record it."""
        if self._file is not None:
            await _whole(self._commit())

    async def finish(self) -> Blob:
        """See Artifacts.finish."""
        return await _whole(self._finish())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    async def _append(self, chunk: Chunk) -> None:
        async with self._lock:
            file = self._file or await self._open(await self._upload())
            await run_blocking(self._place.disk, file.append, *chunk)
            if file.written - file.committed >= self._place.commit_bytes:
                await self._sync(file)

    async def _commit(self) -> None:
        async with self._lock:
            if self._file is not None and self._file.written > self._file.committed:
                await self._sync(self._file)

    async def _finish(self) -> Blob:
        place = self._place
        async with self._lock:
            upload = await self._upload(finished=True)
            if upload.finished:
                return Blob(sha256=upload.sha256, size_bytes=upload.size_bytes)
            file = await self._open(upload)
            if file.written != file.size_bytes:
                text = f"{file.written} of {file.size_bytes} bytes are here; send the rest first"
                expected = {"expected_offset": str(file.written)}
                raise WrongState(text, reason="UPLOAD_OFFSET_MISMATCH", metadata=expected)
            if file.written > file.committed:
                await self._sync(file)
            if (found := await run_blocking(place.disk, file.sha256)) != upload.sha256:
                await self._discard()
                text = f"the SHA-256 of the {file.size_bytes} bytes is {found}, announced was {upload.sha256}"
                raise Corrupt(text, reason="DIGEST_MISMATCH")
            async with place.admission:
                if await place.ledger.find(found) is None:
                    await run_blocking(place.disk, place.blobs.admit, upload.id, found)
                blob = await place.ledger.finish(upload)
            self._forget_file()
            await run_blocking(place.disk, place.blobs.drop, upload.id)
            return blob

    async def _upload(self, *, finished: bool = False) -> Upload:
        upload = await self._place.ledger.get(self._id, self._place.clock())
        if upload.finished and not finished:
            raise offset_mismatch("the upload is finished already", upload.size_bytes)
        return upload

    async def _open(self, upload: Upload) -> StagedFile:
        if self._file is None:
            path = self._place.blobs.staging_path(upload.id)
            try:
                self._file = await run_blocking(
                    self._place.disk,
                    StagedFile,
                    path,
                    size_bytes=upload.size_bytes,
                    committed_bytes=upload.committed_bytes,
                )
            except Corrupt:
                await self._discard()
                raise
        return self._file

    async def _sync(self, file: StagedFile) -> None:
        try:
            synced = await run_blocking(self._place.disk, file.sync)
        except OSError as error:
            await self._discard()
            text = "the disk failed while bytes were made durable; the upload is discarded, start again"
            raise Corrupt(text, reason="BLOB_CORRUPT") from error
        await self._place.ledger.commit(self._id, synced)
        file.committed = synced

    async def _discard(self) -> None:
        self._forget_file()
        await self._place.discard(self._id)

    def _forget_file(self) -> None:
        self.close()
        self._file = None


async def _whole(step: Coroutine[Any, Any, T]) -> T:
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
