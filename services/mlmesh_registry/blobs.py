"""Where finished bytes rest: content-addressed, written once, in an object store. Synchronous; for an executor.

obstore's own coroutines are not used: with 0.12 a process that leaves right after one may abort in its Tokio threads.
Reading by ranges through an executor is also several times faster than obstore's stream on a local disk.
"""

import contextlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore

from mlmesh_registry.ledger import Blob
from mlmesh_runtime.chunks import disk_full, fsync_directory, is_disk_full
from mlmesh_runtime.errors import Corrupt

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_STAGING = "staging"
_BLOBS = "sha256"


class LocalBlobs:
    """Blobs under a folder: `sha256/ab/abcd…` for those that are whole, `staging/{upload}` for those under way.

    Both are on one file system, so a blob appears by a hard link and is never half there. Paths are made of digests
    and of ids that this process drew, never of names that came from outside.

    Errors: Overloaded (DISK_FULL); Corrupt (BLOB_CORRUPT) when a blob is gone, cut or cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        for folder in (root / _STAGING, root / _BLOBS):
            folder.mkdir(parents=True, exist_ok=True)
        fsync_directory(root)
        fsync_directory(root.parent)
        self._store = LocalStore(str(root))

    def staging_path(self, upload_id: str) -> Path:
        """Where an upload's bytes gather."""
        return self._root / _STAGING / upload_id

    def admit(self, upload_id: str, sha256: str) -> None:
        """Give verified, synced bytes their final name, durably. The staging file stays until `drop`."""
        folder = (self._root / _key(sha256)).parent
        with _translated(sha256):
            if not folder.exists():
                folder.mkdir()
                fsync_directory(folder.parent)
            self._link(upload_id, sha256)
            fsync_directory(folder)

    def _link(self, upload_id: str, sha256: str) -> None:
        source, target = f"{_STAGING}/{upload_id}", _key(sha256)
        try:
            obstore.copy(self._store, source, target, overwrite=False)
        except AlreadyExistsError:
            # Left by an attempt that did not reach the ledger: nobody reads it, and nobody knows whether it is whole.
            obstore.delete(self._store, target)
            obstore.copy(self._store, source, target, overwrite=False)

    def drop(self, upload_id: str) -> None:
        """Remove an upload's bytes, if any."""
        self.staging_path(upload_id).unlink(missing_ok=True)

    def check_size(self, blob: Blob) -> None:
        """Compare what is stored with what is known."""
        with _translated(blob.sha256):
            here = obstore.head(self._store, _key(blob.sha256))["size"]
        if here != blob.size_bytes:
            raise Corrupt(f"{blob.name}: {here} bytes are here of {blob.size_bytes}", reason="BLOB_CORRUPT")

    def read(self, blob: Blob, start: int, end: int) -> bytes:
        """Bytes [start, end) of a blob."""
        with _translated(blob.sha256):
            data = bytes(obstore.get_range(self._store, _key(blob.sha256), start=start, end=end))
        if len(data) != end - start:
            raise Corrupt(f"{blob.name}: cut at byte {start + len(data)}", reason="BLOB_CORRUPT")
        return data

    def sweep(self, blobs: Collection[str], upload_ids: Collection[str]) -> int:
        """Remove every file that is neither a known blob nor an upload under way; how many there were."""
        wanted = {self._root / _key(sha256) for sha256 in blobs} | {self.staging_path(each) for each in upload_ids}
        orphans = [
            Path(folder) / name
            for folder, _, names in os.walk(self._root)
            for name in names
            if Path(folder) / name not in wanted
        ]
        for path in orphans:
            path.unlink()
        return len(orphans)


def _key(sha256: str) -> str:
    return f"{_BLOBS}/{sha256[:2]}/{sha256}"


@contextlib.contextmanager
def _translated(sha256: str) -> Iterator[None]:
    """Translate errors of the store and of the disk at this edge; obstore keeps the error number in its text only."""
    try:
        yield
    except FileNotFoundError as error:
        raise Corrupt(f"blobs/sha256-{sha256}: its bytes are gone", reason="BLOB_CORRUPT") from error
    except (OSError, BaseError) as error:
        found = _OS_ERROR.search(str(error))
        cause = error if isinstance(error, OSError) and error.errno else OSError(int(found[1]) if found else 0, "")
        if is_disk_full(cause):
            raise disk_full(f"blobs/sha256-{sha256}") from error
        if "range" in str(error) or cause.errno == _EIO:
            raise Corrupt(f"blobs/sha256-{sha256}: its bytes cannot be read", reason="BLOB_CORRUPT") from error
        raise


_EIO = 5
