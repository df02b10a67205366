"""Blobs in a folder: `sha256/ab/abcd….{upload}` for those that are whole, `staging/{upload}.{token}` for uploads.

Both are on one file system, so a blob appears by a hard link and is never half there. Processes may share the folder:
an upload's file is written by the one that holds its lock, and another one begins a file of its own where the committed
bytes end. What each wrote is put together when the upload is finished, which hardly ever is more than one file.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlmesh_registry.blobs import Stored, corrupt, lost, unavailable
from mlmesh_registry.inspection import Inspection
from mlmesh_registry.ledger import BLOCK_BYTES, Blob, Found, Part, Upload
from mlmesh_registry.staging import StagedFile
from mlmesh_runtime.chunks import disk_full, fsync_directory, is_disk_full, write_at

_STAGING, _BLOBS = "staging", "sha256"
_BLOB_NAME = re.compile(r"([0-9a-f]{64})(?:\.([0-9a-z-]{1,64}))?")
_PAGE = 1000


class FolderBlobs:
    """Implements Blobs."""

    inspects_as_written = True
    commit_bytes_max = 1 << 40
    read_bytes = BLOCK_BYTES

    def __init__(self, root: Path, *, new_token: Callable[[], str] = lambda: secrets.token_hex(4)) -> None:
        self._root = root
        self._new_token = new_token
        for folder in (root / _STAGING, root / _BLOBS):
            folder.mkdir(parents=True, exist_ok=True)
        fsync_directory(root)
        fsync_directory(root.parent)

    def stage(self, upload: Upload, parts: Sequence[Part]) -> StagedFile:
        """See Blobs: in the last file, unless somebody is writing to it."""
        with self._translated():
            self._check(upload, parts)
            if parts and (last := StagedFile.take_up(self._staging(parts[-1].key), parts[-1])):
                return last
            return StagedFile.begin(self._staging(f"{upload.id}.{self._new_token()}"), upload.committed_bytes)

    def admit(self, upload: Upload, parts: Sequence[Part], inspection: Inspection) -> Found:
        """See Blobs: a second name, where the bytes are in one file."""
        with self._translated():
            self._check(upload, parts)
            for data in self._staged(parts, inspection.position):
                inspection.feed(data)
            found = inspection.check(upload.sha256)
            whole = self._staging(parts[0].key if parts else f"{upload.id}.{self._new_token()}")
            if len(parts) != 1 or whole.stat().st_size != upload.size_bytes:
                whole = self._joined(upload, parts)
            self._name(whole, upload)
            return found

    def _check(self, upload: Upload, parts: Sequence[Part]) -> None:
        for part in parts:
            path = self._staging(part.key)
            if not path.exists() or path.stat().st_size < part.size_bytes:
                raise lost(upload.id)

    def _staged(self, parts: Sequence[Part], offset: int) -> Iterator[bytes]:
        for part in parts:
            position = max(offset - part.start, 0)
            with self._staging(part.key).open("rb", buffering=0) as file:
                while position < part.size_bytes:
                    data = os.pread(file.fileno(), min(BLOCK_BYTES, part.size_bytes - position), position)
                    if not data:
                        raise lost(part.key.partition(".")[0])
                    position += len(data)
                    yield data

    def _joined(self, upload: Upload, parts: Sequence[Part]) -> Path:
        path = self._staging(f"{upload.id}.{self._new_token()}")
        with path.open("xb", buffering=0) as file:
            for data in self._staged(parts, 0):
                write_at(file.fileno(), data, file.tell())
                file.seek(0, os.SEEK_END)
            os.fsync(file.fileno())
        return path

    def _name(self, source: Path, upload: Upload) -> None:
        target = self._path(upload.sha256, upload.id)
        if not target.parent.exists():
            target.parent.mkdir(exist_ok=True)
            fsync_directory(target.parent.parent)
        with contextlib.suppress(FileExistsError):
            # Else by an attempt that did not reach the ledger, which had looked at the bytes as this one did.
            os.link(source, target)
        fsync_directory(target.parent)

    def drop(self, upload_id: str) -> None:
        """See Blobs."""
        with self._translated():
            for name in _names(self._root / _STAGING):
                if name.partition(".")[0] == upload_id:
                    self._staging(name).unlink(missing_ok=True)

    def open(self, blob: Blob) -> "_File":
        """See Blobs."""
        with self._reading(blob):
            fd = os.open(self._path(blob.sha256, blob.location), os.O_RDONLY | os.O_CLOEXEC)
        file = _File(self, fd, blob)
        if (here := os.fstat(fd).st_size) != blob.size_bytes:
            file.close()
            raise corrupt(blob, f"{here} bytes are here of {blob.size_bytes}")
        return file

    def of(self, sha256: str) -> Sequence[Stored]:
        """See Blobs."""
        with self._translated():
            folder = self._path(sha256, "").parent
            names = _names(folder) if folder.exists() else ()
            return [_stored(f"{_BLOBS}/{folder.name}/{name}") for name in names if name.startswith(sha256)]

    def stored(self) -> Iterator[Sequence[Stored]]:
        """See Blobs. The folder is this registry's, so what has no name of ours is nobody's."""
        page: list[Stored] = []
        with self._translated():
            for top in (_STAGING, _BLOBS):
                for folder, _, names in os.walk(self._root / top):
                    page += [_stored(str(Path(folder, name).relative_to(self._root))) for name in names]
                    if len(page) >= _PAGE:
                        yield page
                        page = []
        yield page

    def remove(self, stored: Stored) -> None:
        """See Blobs."""
        with self._translated():
            (self._root / stored.key).unlink(missing_ok=True)

    def _staging(self, key: str) -> Path:
        return self._root / _STAGING / key

    def _path(self, sha256: str, location: str) -> Path:
        return self._root / _BLOBS / sha256[:2] / (f"{sha256}.{location}" if location else sha256)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Translate errors of the disk, fsync's apart: whoever syncs must know."""
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise disk_full("a blob") from error
            raise unavailable(error.strerror or "it cannot be read or written") from error

    @contextlib.contextmanager
    def _reading(self, blob: Blob) -> Iterator[None]:
        """Translate errors of reading a blob: lost, unreadable, or the folder itself is away (not mounted)."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.EIO:
                raise corrupt(blob, "its bytes cannot be read") from error
            if isinstance(error, FileNotFoundError) and (self._root / _BLOBS).is_dir():
                raise corrupt(blob, "its bytes are gone") from error
            raise unavailable(error.strerror or "it cannot be read") from error


class _File:
    """Implements Reading. It stays readable when it is removed meanwhile."""

    def __init__(self, blobs: FolderBlobs, fd: int, blob: Blob) -> None:
        self._blobs = blobs
        self._fd = fd
        self._blob = blob

    def read(self, start: int, end: int) -> bytes:
        """See Reading."""
        with self._blobs._reading(self._blob):
            data = os.pread(self._fd, end - start, start)
        if len(data) != end - start:
            raise corrupt(self._blob, f"it is cut at byte {start + len(data)}")
        return data

    def close(self) -> None:
        """See Reading."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _names(folder: Path) -> Sequence[str]:
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


def _stored(key: str) -> Stored:
    top, *_, name = key.split("/")
    if top == _STAGING:
        return Stored(key=key, sha256="", upload_id=name.partition(".")[0])
    found = _BLOB_NAME.fullmatch(name)
    # A name that is none of ours: of a digest that no blob has.
    return Stored(key=key, sha256=found[1] if found else name, upload_id=(found and found[2]) or "")
