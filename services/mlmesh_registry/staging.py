"""The bytes of one upload under way: a file that grows in order. Synchronous; callers run it on an executor.

`written` counts what the kernel has, `committed` what is on disk and recorded: only the latter was ever promised.
"""

import hashlib
import os
from pathlib import Path

from mlmesh_runtime.chunks import CHUNK_BYTES, crc32c, disk_full, fsync_directory, is_disk_full, write_at
from mlmesh_runtime.errors import Conflict, Corrupt, InvalidInput


class StagedFile:
    """One open staging file, cut back to what was committed.

    Errors: Corrupt (BLOB_CORRUPT) when fewer bytes are here than were committed, Overloaded (DISK_FULL).
    """

    def __init__(self, path: Path, *, size_bytes: int, committed_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.committed = self.written = committed_bytes
        self._fd = _create(path) if committed_bytes == 0 else _open(path)
        here = os.fstat(self._fd).st_size
        if here < committed_bytes:
            os.close(self._fd)
            raise Corrupt(f"{here} bytes are here of {committed_bytes} committed", reason="BLOB_CORRUPT")
        if here > committed_bytes:
            os.ftruncate(self._fd, committed_bytes)

    def append(self, offset: int, data: bytes, checksum: int) -> None:
        """Add one chunk. A refused chunk changes nothing.

        Errors: InvalidInput (INVALID_FIELD, UPLOAD_TOO_LARGE), Conflict (UPLOAD_OFFSET_MISMATCH), Corrupt
        (CHUNK_CHECKSUM_MISMATCH), Overloaded (DISK_FULL).
        """
        if len(data) > CHUNK_BYTES:
            raise InvalidInput(f"data: {len(data)} bytes, at most {CHUNK_BYTES}", field="data")
        if offset != self.written:
            raise offset_mismatch(f"a chunk starts at {offset}, expected {self.written}", self.written)
        if offset + len(data) > self.size_bytes:
            text = f"data: reaches byte {offset + len(data)} where {self.size_bytes} were announced"
            raise InvalidInput(text, field="data", reason="UPLOAD_TOO_LARGE")
        if crc32c(data) != checksum:
            text = f"the chunk of {len(data)} bytes at {offset} fails its CRC-32C"
            raise Corrupt(text, reason="CHUNK_CHECKSUM_MISMATCH")
        write_at(self._fd, data, offset)
        self.written += len(data)

    def sync(self) -> int:
        """Put what is written on disk and return how much that is. The caller records it, then sets `committed`.

        Errors: Overloaded (DISK_FULL) with the file cut back to what was committed; OSError when the disk failed, after
        which the file must not be used again: nobody knows which pages reached the disk.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            if not is_disk_full(error):
                raise
            os.ftruncate(self._fd, self.committed)
            self.written = self.committed
            raise disk_full(f"{self.size_bytes} bytes") from error
        return self.written

    def sha256(self) -> str:
        """Hash the whole file as it is stored."""
        digest, position = hashlib.sha256(), 0
        while data := os.pread(self._fd, CHUNK_BYTES, position):
            digest.update(data)
            position += len(data)
        return digest.hexdigest()

    def close(self) -> None:
        """Close; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def offset_mismatch(text: str, expected: int) -> Conflict:
    """Build the error for a chunk that does not continue the upload; GetUpload tells where to go on."""
    return Conflict(text, reason="UPLOAD_OFFSET_MISMATCH", metadata={"expected_offset": str(expected)})


def _create(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if is_disk_full(error):
            raise disk_full("an upload") from error
        raise
    try:
        fsync_directory(path.parent)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Corrupt("the committed bytes of this upload are gone", reason="BLOB_CORRUPT") from error
