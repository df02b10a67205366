"""Chunks and the verifying writer: cut anywhere and go on, wrong bytes never get the file's name."""

import hashlib
import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_runtime.chunks import Chunk, VerifyingWriter, crc32c, read_chunks, sha256_of
from mlmesh_runtime.errors import Conflict, Corrupt, MeshError, WrongState

DATA = bytes(range(256)) * 9
SHA = hashlib.sha256(DATA).hexdigest()


def test_crc32c_is_castagnoli() -> None:
    # RFC 3720 appendix B.4.
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=200), st.integers(0, 220), st.integers(1, 64))
def test_chunks_put_together_are_the_rest_of_the_file(data: bytes, offset: int, chunk_bytes: int) -> None:
    chunks = list(read_chunks(io.BytesIO(data), offset=offset, chunk_bytes=chunk_bytes))
    assert b"".join(chunk.data for chunk in chunks) == data[offset:]
    assert all(0 < len(chunk.data) <= chunk_bytes and chunk.crc32c == crc32c(chunk.data) for chunk in chunks)
    assert [chunk.offset for chunk in chunks] == list(range(offset, len(data), chunk_bytes))


def test_a_path_is_read_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(DATA)
    assert list(read_chunks(path, offset=5, chunk_bytes=100)) == list(
        read_chunks(io.BytesIO(DATA), offset=5, chunk_bytes=100)
    )
    assert sha256_of(path) == (SHA, len(DATA))


def _chunks(offset: int = 0) -> list[Chunk]:
    return list(read_chunks(io.BytesIO(DATA), offset=offset, chunk_bytes=100))


def test_a_whole_file_appears_only_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "f"
    with VerifyingWriter(target, SHA, len(DATA)) as writer:
        for chunk in _chunks():
            writer.write(*chunk)
        assert not target.exists()
        writer.finish()
    assert target.read_bytes() == DATA
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("cut", [0, 1, 7, len(DATA) // 100])
def test_a_cut_transfer_goes_on_where_it_ended(tmp_path: Path, cut: int) -> None:
    target = tmp_path / "f"
    with VerifyingWriter(target, SHA, len(DATA)) as writer:
        for chunk in _chunks()[:cut]:
            writer.write(*chunk)
    with VerifyingWriter(target, SHA, len(DATA)) as writer:
        assert writer.committed == cut * 100
        for chunk in _chunks(writer.committed):
            writer.write(*chunk)
        writer.finish()
    assert target.read_bytes() == DATA


def test_wrong_bytes_never_get_the_name(tmp_path: Path) -> None:
    target = tmp_path / "f"
    wrong = bytes(len(DATA))
    with VerifyingWriter(target, SHA, len(DATA)) as writer:
        writer.write(0, wrong, crc32c(wrong))
        with pytest.raises(Corrupt) as refused:
            writer.finish()
    assert refused.value.reason == "DIGEST_MISMATCH"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("chunk", "error", "reason"),
    [
        (Chunk(1, b"a", crc32c(b"a")), Conflict, "CHUNK_OFFSET_MISMATCH"),
        (Chunk(0, b"a", crc32c(b"b")), Corrupt, "CHUNK_CHECKSUM_MISMATCH"),
        (Chunk(0, bytes(len(DATA) + 1), 0), Corrupt, "DIGEST_MISMATCH"),
    ],
)
def test_a_refused_chunk_changes_nothing(tmp_path: Path, chunk: Chunk, error: type[MeshError], reason: str) -> None:
    with VerifyingWriter(tmp_path / "f", SHA, len(DATA)) as writer:
        with pytest.raises(error) as refused:
            writer.write(*chunk)
        assert refused.value.reason == reason
        for good in _chunks():
            writer.write(*good)
        writer.finish()
    assert (tmp_path / "f").read_bytes() == DATA


def test_finish_before_the_end_is_refused(tmp_path: Path) -> None:
    with VerifyingWriter(tmp_path / "f", SHA, len(DATA)) as writer:
        writer.write(*_chunks()[0])
        with pytest.raises(Conflict):
            writer.finish()


def test_more_than_the_whole_left_behind_starts_over(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(bytes(len(DATA) + 1))
    with VerifyingWriter(tmp_path / "f", SHA, len(DATA)) as writer:
        assert writer.committed == 0


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with VerifyingWriter(tmp_path / "f", SHA, len(DATA)) as writer:
        with pytest.raises(WrongState) as refused:
            VerifyingWriter(tmp_path / "f", SHA, len(DATA))
        assert refused.value.reason == "WRITER_BUSY"
        writer.discard()
    VerifyingWriter(tmp_path / "f", SHA, len(DATA)).close()


def test_an_empty_file_is_a_file(tmp_path: Path) -> None:
    with VerifyingWriter(tmp_path / "f", hashlib.sha256().hexdigest(), 0) as writer:
        writer.finish()
    assert (tmp_path / "f").read_bytes() == b""


def test_no_room_leaves_what_was_there(tmp_path: Path) -> None:
    # In a process of its own, because a file size limit holds for all of one.
    script = f"""
import resource, signal, sys
from pathlib import Path
from mlmesh_runtime.chunks import VerifyingWriter, crc32c
from mlmesh_runtime.errors import Overloaded
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150, {resource.RLIM_INFINITY}))
writer = VerifyingWriter(Path(sys.argv[1]), "{SHA}", 300)
writer.write(0, bytes(100), crc32c(bytes(100)))
try:
    writer.write(100, bytes(100), crc32c(bytes(100)))
except Overloaded as error:
    assert error.reason == "DISK_FULL", error.reason
    assert error.retry_after_s
else:
    sys.exit("not refused")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))
assert writer.write(100, bytes(100), crc32c(bytes(100))) == 200
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "f")], check=True, env=dict(os.environ))
    assert (tmp_path / "f.part").stat().st_size == 200
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
