"""The files of a job as its workers see them: what they may fetch, and what they bring. Blocking: use an executor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlmesh_runtime.chunks import Chunk, VerifyingWriter, read_chunks, sha256_of
from mlmesh_runtime.errors import InvalidInput, NotFound, Overloaded

FETCHED = ("dataset", "source", "checkpoint-*")
"""What a worker needs before it starts: folders and names in the job's folder."""
CHECKPOINTS_KEPT = 2
_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,7}")
# The service's own files in a job's folder, and what workers only fetch.
_OURS = re.compile(r"task\.json|lock|(dataset|source)(/.*)?|.*\.part")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFile:
    """One file: relative path, size in bytes, hex SHA-256."""

    path: str
    size_bytes: int
    sha256: str


def needed(folder: Path) -> list[JobFile]:
    """The files that a worker needs before it starts, by path."""
    found = [
        path
        for pattern in FETCHED
        for place in folder.glob(pattern)
        for path in (place.rglob("*") if place.is_dir() else [place])
        if path.is_file() and path.suffix != ".part"
    ]
    return [describe(folder, path.relative_to(folder).as_posix()) for path in sorted(found)]


def describe(folder: Path, path: str) -> JobFile:
    """One file with its digest. Errors: OSError."""
    sha256, size_bytes = sha256_of(folder / path)
    return JobFile(path=path, size_bytes=size_bytes, sha256=sha256)


def chunks(folder: Path, path: str, offset: int) -> Iterator[Chunk]:
    """A file from an offset. Errors: InvalidInput, NotFound (FILE_NOT_FOUND) at once."""
    place = folder / checked(path)
    if not place.is_file():
        raise NotFound(f"{path} is not a file of this job", reason="FILE_NOT_FOUND")
    return read_chunks(place, offset=offset)


class Bringing:
    """A file that a worker brings. Errors: as VerifyingWriter, InvalidInput, Overloaded (UPLOAD_TOO_LARGE)."""

    def __init__(self, folder: Path, file: JobFile, *, bytes_max: int) -> None:
        path = checked(file.path)
        if _OURS.fullmatch(path):
            raise InvalidInput(f"{path} is not a worker's to bring", field="file.path")
        if not re.fullmatch("[0-9a-f]{64}", file.sha256):
            raise InvalidInput("file.sha256: expected 64 hex digits", field="file.sha256")
        if not 0 <= file.size_bytes <= bytes_max:
            raise Overloaded(f"{path}: {file.size_bytes} bytes, at most {bytes_max}", reason="UPLOAD_TOO_LARGE")
        self._folder = folder
        self._path = folder / path
        self.here = self._path.is_file() and sha256_of(self._path) == (file.sha256, file.size_bytes)
        self._writer = None if self.here else VerifyingWriter(self._path, file.sha256, file.size_bytes)

    def write(self, chunk: Chunk) -> None:
        """Take one chunk in."""
        if self._writer is not None:
            self._writer.write(chunk.offset, chunk.data, chunk.crc32c)

    def finish(self) -> None:
        """Make the file visible; of checkpoints the newest are kept."""
        if self._writer is not None:
            self._writer.finish()
        for old in sorted(self._folder.glob("checkpoint-*.pt"), reverse=True)[CHECKPOINTS_KEPT:]:
            with suppress(FileNotFoundError):
                old.unlink()

    def close(self) -> None:
        """Let go of a file that was not finished; what is here of it stays."""
        if self._writer is not None:
            self._writer.close()


def checked(path: str) -> str:
    """A relative path that stays inside. Errors: InvalidInput."""
    if len(path) > 255 or not _PATH.fullmatch(path):
        raise InvalidInput("path: expected a relative path of letters, digits, '.', '_' and '-'", field="path")
    return path
