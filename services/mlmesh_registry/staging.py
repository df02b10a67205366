"""A file into which the bytes of one upload go, in order, by one process. Synchronous, for an executor."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Self

from mlmesh_registry.ledger import Part
from mlmesh_runtime.chunks import disk_full, fsync_directory, is_disk_full, write_at


class StagedFile:
    """Implements blobs.Staging. Holds the file's lock while it is open, so that only one process writes to it.

    A file that is taken up is not touched before the first write: until then whoever took it up can find that more of
    it was committed than was known when it asked for it.
    """

    def __init__(self, fd: int, path: Path, *, start: int, committed: int) -> None:
        self._fd = fd
        self._path = path
        self._start = start
        self._cut = False
        self.written = self.committed = committed

    @classmethod
    def begin(cls, path: Path, start: int) -> Self:
        """A new file, for bytes from `start` of the whole on."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):  # A file system that knows no locks: then nobody takes the file up.
                _lock(fd)
            fsync_directory(path.parent)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, path, start=start, committed=start)

    @classmethod
    def take_up(cls, path: Path, part: Part) -> Self | None:
        """The file that holds a committed part, to go on behind it; None while somebody else writes to it."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _lock(fd)
        except OSError:
            os.close(fd)
            return None
        return cls(fd, path, start=part.start, committed=part.end)

    def write(self, data: bytes) -> None:
        """See Staging."""
        if not self._cut:
            os.ftruncate(self._fd, self.committed - self._start)
            self._cut = True
        write_at(self._fd, data, self.written - self._start)
        self.written += len(data)

    def sync(self) -> Part:
        """See Staging."""
        end = self.written
        try:
            os.fsync(self._fd)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(f"{end - self.committed} bytes of an upload") from error
            raise
        return Part(start=self._start, size_bytes=end - self._start, key=self._path.name)

    def close(self) -> None:
        """See Staging. What nobody answered for is cut off by whoever takes the file up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _lock(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
