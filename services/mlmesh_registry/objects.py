"""Blobs in an object store: S3, Google Cloud Storage or Azure, by obstore.

An upload's bytes are staged as objects of their own by offset, `staging/{upload}/{offset}.{token}`, so any process can
go on with it; finishing it streams them into `sha256/ab/{digest}/{upload}` by one multipart upload, which the store
shows whole or not at all. obstore's coroutines are not used: a process that leaves right after one may abort.

Errors: NotReady (STORAGE_UNAVAILABLE) while the store does not answer, or has lost its container.
"""

import contextlib
import logging
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, NotSupportedError
from obstore.store import from_url

from mlmesh_registry.blobs import Stored, corrupt, lost, unavailable
from mlmesh_registry.inspection import Inspection
from mlmesh_registry.ledger import Blob, Found, Part, Upload
from mlmesh_runtime.config import ConfigError

log = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "az")
_STAGING, _BLOBS, _MARKER = "staging", "sha256", "mlmesh-registry"
_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 2
_BLOB_KEY = re.compile(rf"{_BLOBS}/[0-9a-f]{{2}}/([0-9a-f]{{64}})/([0-9a-z-]{{1,64}})")
_STAGED_KEY = re.compile(rf"{_STAGING}/([0-9a-z-]{{1,64}})/[0-9]+\.[0-9a-z]+")
_PAGE = 1000
_CLIENT: Any = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=60)}
_RETRIES: Any = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2},
}


def open_store(url: str, variable: str) -> Any:
    """The store of a URL, with endpoint and credentials from the environment as obstore reads it (AWS_*, ...).

    Nothing is asked of it yet. Errors: ConfigError naming the variable.
    """
    try:
        # Plain HTTP only where the endpoint that was configured says so.
        options: Any = {"client_options": {**_CLIENT, "allow_http": True}, "retry_config": _RETRIES}
        return from_url(url, **options)
    except (BaseError, ValueError) as error:
        raise ConfigError(f"{variable}: {str(error).splitlines()[0]}") from error


class ObjectBlobs:
    """Implements Blobs."""

    inspects_as_written = False
    commit_bytes_max = _PART_BYTES
    read_bytes = 4 << 20

    def __init__(self, store: Any, *, new_token: Callable[[], str] = lambda: secrets.token_hex(4)) -> None:
        self._store = store
        self._new_token = new_token
        self._marked = False
        self._marking = threading.Lock()

    def stage(self, upload: Upload, parts: Sequence[Part]) -> "_StagedObjects":  # noqa: ARG002
        """See Blobs."""
        self._mark()
        return _StagedObjects(self, upload)

    def admit(self, upload: Upload, parts: Sequence[Part], inspection: Inspection) -> Found:
        """See Blobs. The last bytes are held back until the inspection has agreed."""
        self._mark()
        found: list[Found] = []

        def checked(staged: Iterator[bytes]) -> Iterator[bytes]:
            held = b""
            for data in staged:
                if held:
                    yield held
                held = data
                inspection.feed(held)
            found.append(inspection.check(upload.sha256))
            yield held

        key = _key(upload.sha256, upload.id)
        # Read by a thread of its own: obstore cannot be asked for anything by what it is being given. It reads ahead.
        with ThreadPoolExecutor(1, thread_name_prefix="staged") as reader, self._translated():
            staged = self._staged(reader, upload, parts)
            if upload.size_bytes <= _PART_BYTES:
                self._put(key, b"".join(checked(staged)))
            else:
                # Another attempt may have been as far: it looked at the same bytes, and the store swaps whole ones.
                whole = checked(staged)
                obstore.put(self._store, key, whole, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)
        return found[0]

    def _staged(self, reader: ThreadPoolExecutor, upload: Upload, parts: Sequence[Part]) -> Iterator[bytes]:
        ahead: deque[Future[bytes]] = deque()
        for part in parts:
            ahead.append(reader.submit(self._part, upload, part))
            if len(ahead) > 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _part(self, upload: Upload, part: Part) -> bytes:
        try:
            with self._translated():
                data = bytes(obstore.get(self._store, _staged_key(part.key)).bytes())
        except FileNotFoundError as error:
            self._check_marker(error)
            raise lost(upload.id) from error
        if len(data) != part.size_bytes:
            raise lost(upload.id)
        return data

    def drop(self, upload_id: str) -> None:
        """See Blobs."""
        for page in self._list(f"{_STAGING}/{upload_id}"):
            self._delete([each.key for each in page])

    def open(self, blob: Blob) -> "_Object":
        """See Blobs."""
        here = self._of_blob(blob, lambda key: obstore.head(self._store, key)["size"])
        if here != blob.size_bytes:
            raise corrupt(blob, f"{here} bytes are here of {blob.size_bytes}")
        return _Object(self, blob)

    def read(self, blob: Blob, start: int, end: int) -> bytes:
        """Bytes [start, end) of a blob."""
        if start == end:
            return b""
        read = self._of_blob(blob, lambda key: obstore.get_range(self._store, key, start=start, end=end))
        if len(read) != end - start:
            raise corrupt(blob, f"it is cut at byte {start + len(read)}")
        return bytes(read)

    def of(self, sha256: str) -> Sequence[Stored]:
        """See Blobs."""
        return [each for page in self._list(f"{_BLOBS}/{sha256[:2]}/{sha256}") for each in page]

    def stored(self) -> Iterator[Sequence[Stored]]:
        """See Blobs. What has no name of ours is not ours."""
        for top in (_STAGING, _BLOBS):
            yield from self._list(top)

    def remove(self, stored: Stored) -> None:
        """See Blobs."""
        self._delete([stored.key])

    def stage_part(self, upload_id: str, start: int, data: bytes) -> Part:
        """Store a part of an upload."""
        name = f"{upload_id}/{start}.{self._new_token()}"
        self._put(_staged_key(name), data)
        return Part(start=start, size_bytes=len(data), key=name)

    def _put(self, key: str, data: bytes) -> None:
        """Put a small object at a place that nobody else puts anything at; it may have been put by a try before."""
        with self._translated(), contextlib.suppress(AlreadyExistsError):
            try:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except NotSupportedError:
                obstore.put(self._store, key, data, use_multipart=False)
            except FileNotFoundError as error:
                raise unavailable("the bucket is not there") from error

    def _delete(self, keys: Sequence[str]) -> None:
        with self._translated(), contextlib.suppress(FileNotFoundError):
            if keys:
                obstore.delete(self._store, keys[0] if len(keys) == 1 else list(keys))

    def _list(self, prefix: str) -> Iterator[Sequence[Stored]]:
        with self._translated():
            pages = iter(obstore.list(self._store, prefix, chunk_size=_PAGE))
        while True:
            with self._translated():
                page = next(pages, None)
            if page is None:
                return
            yield [stored for each in page if (stored := _stored(each["path"]))]

    def _of_blob(self, blob: Blob, read: Callable[[str], Any]) -> Any:
        try:
            with self._translated():
                return read(_key(blob.sha256, blob.location))
        except FileNotFoundError as error:
            self._check_marker(error)
            raise corrupt(blob, "its bytes are gone") from error

    def _check_marker(self, cause: Exception) -> None:
        """Tell an object that is gone from a store that is: another bucket, or an emptied one, judges no blob."""
        try:
            with self._translated():
                obstore.head(self._store, _MARKER)
        except FileNotFoundError:
            raise unavailable("the bucket, or what this registry keeps in it, is not there") from cause

    def _mark(self) -> None:
        """Leave the sign that _check_marker looks for, once a process and before anything else is stored."""
        with self._marking:
            if not self._marked:
                self._put(_MARKER, b"Blobs of an mlmesh registry.\n")
                self._marked = True

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Translate errors of the store; that something is not there goes through."""
        try:
            yield
        except (FileNotFoundError, NotFoundError) as error:
            raise FileNotFoundError("not there") from error
        except BaseError as error:
            log.warning("the store of blobs failed", extra={"error": str(error)[:1000]})
            raise unavailable("it does not answer as it should") from error
        except OSError as error:
            raise unavailable("it does not answer") from error


class _StagedObjects:
    """Implements Staging."""

    def __init__(self, blobs: ObjectBlobs, upload: Upload) -> None:
        self._blobs = blobs
        self._upload_id = upload.id
        self._held: list[bytes] = []
        # Bytes are written while those before them are synced.
        self._holding = threading.Lock()
        self.written = self.committed = upload.committed_bytes

    def write(self, data: bytes) -> None:
        """See Staging: held until it is synced."""
        with self._holding:
            self._held.append(data)
            self.written += len(data)

    def sync(self) -> Part:
        """See Staging: as one object."""
        with self._holding:
            held, self._held = self._held, []
        data = b"".join(held)
        del held
        return self._blobs.stage_part(self._upload_id, self.committed, data)

    def close(self) -> None:
        """See Staging."""
        self._held = []


class _Object:
    """Implements Reading."""

    def __init__(self, blobs: ObjectBlobs, blob: Blob) -> None:
        self._blobs = blobs
        self._blob = blob

    def read(self, start: int, end: int) -> bytes:
        """See Reading."""
        return self._blobs.read(self._blob, start, end)

    def close(self) -> None:
        """See Reading: nothing is held."""


def _key(sha256: str, location: str) -> str:
    return f"{_BLOBS}/{sha256[:2]}/{sha256}/{location}"


def _staged_key(name: str) -> str:
    return f"{_STAGING}/{name}"


def _stored(key: str) -> Stored | None:
    if found := _BLOB_KEY.fullmatch(key):
        return Stored(key=key, sha256=found[1], upload_id=found[2])
    if found := _STAGED_KEY.fullmatch(key):
        return Stored(key=key, sha256="", upload_id=found[1])
    return None
