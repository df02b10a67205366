"""One staging file: in order, cut back to what was promised, one writer at a time."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlmesh_registry.ledger import Part
from mlmesh_registry.staging import StagedFile
from mlmesh_runtime.errors import Overloaded


def test_what_was_not_committed_is_cut_off_when_it_is_taken_up_again(tmp_path: Path) -> None:
    file = StagedFile.begin(tmp_path / "u", 0)
    file.write(b"abc")
    part = file.sync()
    file.write(b"def")
    file.close()
    again = StagedFile.take_up(tmp_path / "u", part)
    assert again is not None
    assert (again.written, again.committed) == (3, 3)
    # Not before the first write: until then it may turn out that more was committed.
    assert (tmp_path / "u").read_bytes() == b"abcdef"
    again.write(b"x")
    assert (tmp_path / "u").read_bytes() == b"abcx"
    assert again.sync() == Part(start=0, size_bytes=4, key="u")
    again.close()
    again.close()


def test_a_file_may_hold_what_follows_the_bytes_of_another(tmp_path: Path) -> None:
    file = StagedFile.begin(tmp_path / "u", 100)
    file.write(b"abc")
    assert file.sync() == Part(start=100, size_bytes=3, key="u")
    file.write(b"def")
    assert file.sync() == Part(start=100, size_bytes=6, key="u")
    assert file.written == 106


def test_a_file_that_somebody_writes_to_is_not_taken_up(tmp_path: Path) -> None:
    file = StagedFile.begin(tmp_path / "u", 0)
    file.write(b"abc")
    part = file.sync()
    assert StagedFile.take_up(tmp_path / "u", part) is None
    file.close()
    assert StagedFile.take_up(tmp_path / "u", part) is not None


def test_a_disk_that_fails_to_sync_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = StagedFile.begin(tmp_path / "u", 0)
    file.write(b"abcd")

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
    assert file.committed == 0
