"""A folder of blobs when the disk is not what it was, and where a URL says that blobs are."""

import errno
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mlmesh_registry.folder import FolderBlobs
from mlmesh_registry.inspection import Inspection
from mlmesh_registry.ledger import Blob, Part, Upload
from mlmesh_registry.objects import ObjectBlobs
from mlmesh_registry.places import open_blobs
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.errors import Corrupt, MeshError, NotReady
from tests.support.registry import sha256, some_bytes

DATA = some_bytes("folder", 3_000_000)


def _upload(data: bytes, committed: int = 0) -> Upload:
    time = datetime(2026, 1, 1, tzinfo=UTC)
    return Upload(id="u", sha256=sha256(data), size_bytes=len(data), committed_bytes=committed, expire_time=time)


def _put(blobs: FolderBlobs, data: bytes) -> Blob:
    staged = blobs.stage(_upload(data), [])
    staged.write(data)
    part = staged.sync()
    staged.close()
    blobs.admit(_upload(data, len(data)), [part], Inspection(len(data)))
    blobs.drop("u")
    return Blob(sha256=sha256(data), size_bytes=len(data), location="u")


def _fail(number: int) -> MeshError | OSError:
    return OSError(number, os.strerror(number))


def test_bytes_that_two_processes_brought_are_put_together(tmp_path: Path) -> None:
    one, other = FolderBlobs(tmp_path), FolderBlobs(tmp_path)
    first = one.stage(_upload(DATA), [])
    first.write(DATA[:1_000_000])
    parts = [first.sync()]
    # Written, and never recorded: the first process hangs, and holds the file.
    first.write(b"what nobody was promised")
    second = other.stage(_upload(DATA, 1_000_000), parts)
    second.write(DATA[1_000_000:])
    parts.append(second.sync())
    assert len({part.key for part in parts}) == 2
    found = other.admit(_upload(DATA, len(DATA)), parts, Inspection(len(DATA)))
    assert (found.format, len(found.digests)) == ("safetensors", 3 * 32)
    blob = Blob(sha256=sha256(DATA), size_bytes=len(DATA), location="u")
    assert one.open(blob).read(0, len(DATA)) == DATA
    # Again, as after a crash before it was recorded.
    other.admit(_upload(DATA, len(DATA)), parts, Inspection(len(DATA)))
    other.drop("u")
    assert [each.sha256 for page in one.stored() for each in page] == [blob.sha256]


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, Corrupt), (errno.ESTALE, NotReady), (errno.EMFILE, NotReady)])
def test_a_disk_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[MeshError]
) -> None:
    blobs = FolderBlobs(tmp_path)
    reading = blobs.open(_put(blobs, DATA))

    def pread(*_: object) -> bytes:
        raise _fail(number)

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(kind) as told:
        reading.read(0, 10)
    assert told.value.reason == ("BLOB_CORRUPT" if kind is Corrupt else "STORAGE_UNAVAILABLE")


def test_a_folder_that_is_not_mounted_says_nothing_of_its_blobs(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path / "mounted")
    blob = _put(blobs, DATA)
    shutil.rmtree(tmp_path / "mounted")
    with pytest.raises(NotReady) as told:
        blobs.open(blob)
    assert told.value.reason == "STORAGE_UNAVAILABLE"
    (tmp_path / "mounted" / "sha256").mkdir(parents=True)
    with pytest.raises(Corrupt):
        blobs.open(blob)


def test_committed_bytes_that_are_gone_are_noticed(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    staged = blobs.stage(_upload(DATA), [])
    staged.write(DATA[:1000])
    part = staged.sync()
    staged.close()
    os.truncate(tmp_path / "staging" / part.key, 999)
    for parts in ([part], [Part(start=0, size_bytes=1, key="u.gone")]):
        with pytest.raises(Corrupt) as told:
            blobs.stage(_upload(DATA, 1000), parts)
        assert told.value.reason == "BLOB_CORRUPT"


def test_a_url_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "x")
    open_blobs("", tmp_path / "default")
    open_blobs(f"file://{tmp_path}/given%20name", tmp_path / "unused")
    assert {path.name for path in tmp_path.iterdir()} == {"default", "given name"}
    assert isinstance(open_blobs("s3://bucket/prefix", tmp_path), ObjectBlobs)


@pytest.mark.parametrize(
    "url", ["ftp://x", "/path", "file://host/path", "file:relative", "s3://", "http://x/y", "az://"]
)
def test_a_wrong_url_names_its_variable(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="MLMESH_REGISTRY_BLOBS_URL"):
        open_blobs(url, tmp_path)


def test_a_folder_that_cannot_be_made_names_its_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="MLMESH_DATA_DIR"):
        open_blobs("", tmp_path / "file" / "blobs")
    with pytest.raises(ConfigError, match="MLMESH_REGISTRY_BLOBS_URL"):
        open_blobs(f"file://{tmp_path}/file/blobs", tmp_path)
