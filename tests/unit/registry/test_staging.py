"""One staging file: in order, bounded, and cut back to what was promised."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlmesh_registry.staging import StagedFile
from mlmesh_runtime.chunks import CHUNK_BYTES, crc32c
from mlmesh_runtime.errors import Conflict, Corrupt, InvalidInput, MeshError, Overloaded


def _append(file: StagedFile, data: bytes) -> None:
    file.append(file.written, data, crc32c(data))


def test_what_was_not_committed_is_cut_off_when_it_is_taken_up_again(tmp_path: Path) -> None:
    file = StagedFile(tmp_path / "u", size_bytes=10, committed_bytes=0)
    _append(file, b"abc")
    file.committed = file.sync()
    _append(file, b"def")
    file.close()
    again = StagedFile(tmp_path / "u", size_bytes=10, committed_bytes=3)
    _append(again, b"xyz")
    again.close()
    assert (tmp_path / "u").read_bytes() == b"abcxyz"


@pytest.mark.parametrize("left", [None, b"", b"ab"])
def test_committed_bytes_that_are_gone_are_noticed(tmp_path: Path, left: bytes | None) -> None:
    if left is not None:
        (tmp_path / "u").write_bytes(left)
    with pytest.raises(Corrupt) as lost:
        StagedFile(tmp_path / "u", size_bytes=10, committed_bytes=3)
    assert lost.value.reason == "BLOB_CORRUPT"


@pytest.mark.parametrize(
    ("offset", "data", "checksum", "error", "reason"),
    [
        (3, b"x", crc32c(b"x"), Conflict, "UPLOAD_OFFSET_MISMATCH"),
        (5, b"x", crc32c(b"x"), Conflict, "UPLOAD_OFFSET_MISMATCH"),
        (-1, b"x", crc32c(b"x"), Conflict, "UPLOAD_OFFSET_MISMATCH"),
        (4, b"x", 0, Corrupt, "CHUNK_CHECKSUM_MISMATCH"),
        (4, b"1234567", crc32c(b"1234567"), InvalidInput, "UPLOAD_TOO_LARGE"),
        (4, bytes(CHUNK_BYTES + 1), 0, InvalidInput, "INVALID_FIELD"),
    ],
)
def test_a_refused_chunk_changes_nothing(
    tmp_path: Path, offset: int, data: bytes, checksum: int, error: type[MeshError], reason: str
) -> None:
    file = StagedFile(tmp_path / "u", size_bytes=10, committed_bytes=0)
    _append(file, b"abcd")
    with pytest.raises(error) as refused:
        file.append(offset, data, checksum)
    assert refused.value.reason == reason
    _append(file, b"efghij")
    file.close()
    assert (tmp_path / "u").read_bytes() == b"abcdefghij"


def test_a_disk_that_fails_to_sync_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StagedFile(tmp_path / "u", size_bytes=10, committed_bytes=0)
    _append(file, b"abcd")

    def failing(number: int) -> Callable[[int], None]:
        def fsync(_fd: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", failing(5))
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    monkeypatch.setattr(os, "fsync", failing(28))
    with pytest.raises(Overloaded) as full:
        file.sync()
    assert full.value.reason == "DISK_FULL"
    # What was not synced is gone from the count, so that it is sent again.
    assert file.written == file.committed == (tmp_path / "u").stat().st_size == 0
    file.close()
