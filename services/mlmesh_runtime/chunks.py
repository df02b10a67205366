"""Bytes in chunks: what both ends of an upload or download share, whatever the messages are called.

A sender turns a file into chunks with `read_chunks`; a receiver puts them together with `VerifyingWriter`, which can
be cut at any byte and gone on with later. Nothing here knows a protocol: wrap `Chunk` in the message at hand.
"""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

import google_crc32c

from mlmesh_runtime.errors import Conflict, Corrupt, Overloaded, WrongState

CHUNK_BYTES = 1 << 20
"""Largest chunk of the upload and download streams, bytes."""

# What the kernel says when there is no room: device full, quota used up, file size limit reached.
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Chunk(NamedTuple):
    """One run of bytes: `offset` in the whole, the `data`, and the CRC-32C of `data`."""

    offset: int
    data: bytes
    crc32c: int


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of data, as an unsigned 32 bit number."""
    return int(google_crc32c.value(data))


def is_disk_full(error: OSError) -> bool:
    """Whether an OSError says that there is no room left."""
    return error.errno in _NO_SPACE


def disk_full(where: str, *, retry_after_s: float = 5.0) -> Overloaded:
    """Build the error for a full disk; `where` says what could not be stored."""
    return Overloaded(f"no space left to store {where}", reason="DISK_FULL", retry_after_s=retry_after_s)


def sha256_of(path: Path) -> tuple[str, int]:
    """Hash a file: lower-case hex SHA-256 and size in bytes."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def read_chunks(source: Path | BinaryIO, *, offset: int = 0, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut a file, from offset to its end, into chunks of at most chunk_bytes.

    An offset at or behind the end gives nothing. A path is opened and closed here; a file stays open, its position is
    moved.
    """
    with ExitStack() as stack:
        file = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
        file.seek(offset)
        while data := file.read(chunk_bytes):
            yield Chunk(offset, data, crc32c(data))
            offset += len(data)


def fsync_directory(path: Path) -> None:
    """Make names made or moved in a directory survive a crash."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class VerifyingWriter:
    """Writes a file that appears whole and verified, or not at all.

    Bytes gather in `<path>.part`; `finish` checks size and SHA-256, makes them durable and renames. A `.part` left
    behind by a cut or a crash is taken up again: `committed` says from where to ask for more. One writer a path at a
    time; a second one is refused.

    Errors: Conflict (CHUNK_OFFSET_MISMATCH) when a chunk does not start where the last ended, Corrupt
    (CHUNK_CHECKSUM_MISMATCH, DIGEST_MISMATCH) when bytes are not what was promised, Overloaded (DISK_FULL), WrongState
    (WRITER_BUSY) when another writer holds the path. Blocking: call it on an executor.
    """

    def __init__(self, path: Path, sha256: str, size: int) -> None:
        self._path = path
        self._part = path.with_name(path.name + ".part")
        self._sha256 = sha256
        self._size = size
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = _open_locked(self._part)
        try:
            self._hash, self._committed = self._take_up()
        except BaseException:
            self.close()
            raise

    def _take_up(self) -> "tuple[hashlib._Hash, int]":
        """Hash what an earlier writer left; start over when it is more than the whole."""
        if os.fstat(self._fd).st_size > self._size:
            os.ftruncate(self._fd, 0)
        sha256, position = hashlib.sha256(), 0
        while data := os.pread(self._fd, CHUNK_BYTES, position):
            sha256.update(data)
            position += len(data)
        return sha256, position

    @property
    def committed(self) -> int:
        """Bytes here so far; the next chunk starts there."""
        return self._committed

    def write(self, offset: int, data: bytes, checksum: int) -> int:
        """Append one chunk and return the new `committed`. A refused chunk changes nothing."""
        if offset != self._committed:
            raise Conflict(
                f"chunk at offset {offset}, expected {self._committed}",
                reason="CHUNK_OFFSET_MISMATCH",
                metadata={"committed_bytes": str(self._committed)},
            )
        if offset + len(data) > self._size:
            raise Corrupt(f"{offset + len(data)} bytes where {self._size} were announced", reason="DIGEST_MISMATCH")
        if crc32c(data) != checksum:
            raise Corrupt(
                f"chunk at offset {offset} ({len(data)} bytes) fails its CRC-32C", reason="CHUNK_CHECKSUM_MISMATCH"
            )
        write_at(self._fd, data, offset)
        self._hash.update(data)
        self._committed += len(data)
        return self._committed

    def finish(self) -> None:
        """Verify the whole, make it durable and give it its name. On a wrong digest the bytes are discarded."""
        if self._committed != self._size:
            raise Conflict(
                f"{self._committed} of {self._size} bytes are here",
                reason="CHUNK_OFFSET_MISMATCH",
                metadata={"committed_bytes": str(self._committed)},
            )
        if (found := self._hash.hexdigest()) != self._sha256:
            self.discard()
            raise Corrupt(
                f"SHA-256 of {self._size} bytes is {found}, expected {self._sha256}", reason="DIGEST_MISMATCH"
            )
        try:
            os.fsync(self._fd)
        except OSError as error:
            # After a failed fsync nobody knows which pages reached the disk: never try again with the same file.
            self.discard()
            if is_disk_full(error):
                raise disk_full(self._path.name) from error
            raise
        self._part.replace(self._path)
        fsync_directory(self._path.parent)
        self.close()

    def discard(self) -> None:
        """Throw away what is here and close."""
        self._part.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close; what is here stays for the next writer. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_locked(part: Path) -> int:
    """Open or create a part file and lock it, or raise WrongState (WRITER_BUSY)."""
    while True:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between open and lock another writer may have finished: then this file has its final name already.
            if part.exists() and part.stat().st_ino == os.fstat(fd).st_ino:
                return fd
        except BlockingIOError as error:
            os.close(fd)
            raise WrongState(f"{part.name} is being written by another writer", reason="WRITER_BUSY") from error
        os.close(fd)


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Write all of data at offset; on failure cut the file back to offset, so that it is as it was before.

    Errors: Overloaded (DISK_FULL) when there is no room, OSError for the rest.
    """
    view, position = memoryview(data), offset
    try:
        while view:
            written = os.pwrite(fd, view, position)
            view, position = view[written:], position + written
    except OSError as error:
        os.ftruncate(fd, offset)
        if is_disk_full(error):
            raise disk_full(f"{len(data)} bytes") from error
        raise
