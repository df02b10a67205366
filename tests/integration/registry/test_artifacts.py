"""Uploads and blobs on a real disk."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from mlmesh_registry.ledger import Blob
from mlmesh_registry.registry import Registry
from mlmesh_registry.staging import StagedFile
from mlmesh_runtime.chunks import CHUNK_BYTES, Chunk
from mlmesh_runtime.errors import AlreadyExists, Conflict, Corrupt, InvalidInput, NotFound, WrongState
from tests.support.registry import append, chunk, create_model, publish, put, read, sha256, start

Opener = Callable[..., AbstractAsyncContextManager[Registry]]

DATA = os.urandom(2 * CHUNK_BYTES + 12345)
PIECES = [chunk(DATA[at : at + CHUNK_BYTES], at) for at in range(0, len(DATA), CHUNK_BYTES)]


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _blob_path(tmp_path: Path, data: bytes) -> Path:
    return tmp_path / "data" / "blobs" / "sha256" / sha256(data)[:2] / sha256(data)


async def test_bytes_come_back_as_they_went_in(registry: Registry, tmp_path: Path) -> None:
    upload = await start(registry, DATA)
    await append(registry, upload, *PIECES)
    assert (await registry.artifacts.upload(upload.id)).committed_bytes == len(DATA)
    blob = await registry.artifacts.finish(upload.id)
    assert blob == await registry.artifacts.finish(upload.id) == await registry.artifacts.blob(sha256(DATA))
    assert await read(registry, blob.sha256) == DATA
    assert _files(tmp_path / "data" / "blobs") == {f"sha256/{blob.sha256[:2]}/{blob.sha256}"}


@pytest.mark.parametrize(("offset", "limit"), [(0, 1), (1, 0), (CHUNK_BYTES - 1, 2), (len(DATA), 0), (5, 10**9)])
async def test_any_range_can_be_read(registry: Registry, offset: int, limit: int) -> None:
    digest = sha256(DATA)
    upload = await start(registry, DATA)
    await append(registry, upload, *PIECES)
    await registry.artifacts.finish(upload.id)
    parts = [part async for part, _ in registry.artifacts.read(digest, offset=offset, limit_bytes=limit)]
    assert b"".join(part.data for part in parts) == DATA[offset:][: limit or None]
    assert parts[0].offset == offset
    assert all(len(part.data) <= CHUNK_BYTES and part == chunk(part.data, part.offset) for part in parts)
    with pytest.raises(InvalidInput):
        await read(registry, digest, len(DATA) + 1)


async def test_the_empty_blob(registry: Registry) -> None:
    upload = await start(registry, b"")
    assert await registry.artifacts.finish(upload.id) == Blob(sha256=sha256(b""), size_bytes=0)
    assert await read(registry, sha256(b"")) == b""


async def test_a_cut_stream_goes_on_after_a_restart(open_here: Opener) -> None:
    async with open_here() as registry:
        upload = await start(registry, DATA, "r")
        with pytest.raises(Corrupt) as damaged:
            await append(registry, upload, PIECES[0], Chunk(CHUNK_BYTES, PIECES[1].data, 0))
        assert damaged.value.reason == "CHUNK_CHECKSUM_MISMATCH"
    async with open_here() as registry:
        again = await start(registry, DATA, "r")
        assert (again.id, again.committed_bytes) == (upload.id, CHUNK_BYTES)
        await append(registry, upload, *PIECES[1:])
        assert await read(registry, (await registry.artifacts.finish(upload.id)).sha256) == DATA


async def test_a_cancelled_stream_commits_what_it_had(registry: Registry) -> None:
    upload = await start(registry, DATA)
    reached = asyncio.Event()

    async def stream() -> None:
        async with registry.artifacts.appending(upload.id) as live:
            await live.append(PIECES[0])
            reached.set()
            await asyncio.Event().wait()

    task = asyncio.ensure_future(stream())
    await reached.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert (await registry.artifacts.upload(upload.id)).committed_bytes == CHUNK_BYTES


async def test_cancelling_at_any_moment_of_an_append_leaves_a_usable_upload(registry: Registry) -> None:
    pieces = [chunk(DATA[at : at + 1000], at) for at in range(0, 20_000, 1000)]
    data = DATA[:20_000]
    upload = await start(registry, data)
    for turns in range(30):
        committed = (await registry.artifacts.upload(upload.id)).committed_bytes
        rest = [piece for piece in pieces if piece.offset >= committed]
        task = asyncio.ensure_future(append(registry, upload, *rest[:2]))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    committed = (await registry.artifacts.upload(upload.id)).committed_bytes
    await append(registry, upload, *(piece for piece in pieces if piece.offset >= committed))
    await registry.artifacts.finish(upload.id)
    assert await read(registry, sha256(data)) == data


async def test_a_cancelled_append_leaves_only_after_its_write(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await start(registry, DATA)
    entered, proceed = threading.Event(), threading.Event()
    append_for_real = StagedFile.append

    def held_back(*arguments: Any) -> None:
        entered.set()
        proceed.wait(10)
        append_for_real(*arguments)

    monkeypatch.setattr(StagedFile, "append", held_back)
    task = asyncio.ensure_future(append(registry, upload, PIECES[0]))
    await asyncio.to_thread(entered.wait)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    # Had it left, the next stream would write while this one still does.
    assert not task.done()
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await registry.artifacts.upload(upload.id)).committed_bytes == CHUNK_BYTES


async def test_asking_commits_what_a_stream_that_hangs_has_sent(registry: Registry) -> None:
    # The client of a half-open connection comes back while the server still waits on the old one.
    upload = await start(registry, DATA)
    async with registry.artifacts.appending(upload.id) as old:
        await old.append(PIECES[0])
        assert (await registry.artifacts.upload(upload.id)).committed_bytes == CHUNK_BYTES
        await append(registry, upload, PIECES[1])
        with pytest.raises(Conflict) as late:
            await old.append(PIECES[1])
        assert late.value.reason == "UPLOAD_OFFSET_MISMATCH"
        assert late.value.metadata["expected_offset"] == str(2 * CHUNK_BYTES)


async def test_what_was_already_sent_is_refused_and_changes_nothing(registry: Registry) -> None:
    upload = await start(registry, DATA)
    await append(registry, upload, PIECES[0])
    for wrong in (PIECES[0], PIECES[2]):
        with pytest.raises(Conflict):
            await append(registry, upload, wrong)
    assert (await registry.artifacts.upload(upload.id)).committed_bytes == CHUNK_BYTES


async def test_wrong_bytes_are_discarded(registry: Registry, tmp_path: Path) -> None:
    upload = await start(registry, b"right")
    await append(registry, upload, chunk(b"wrong"))
    with pytest.raises(Corrupt) as refused:
        await registry.artifacts.finish(upload.id)
    assert refused.value.reason == "DIGEST_MISMATCH"
    for missing, reason in (
        (registry.artifacts.upload(upload.id), "UPLOAD_NOT_FOUND"),
        (registry.artifacts.finish(upload.id), "UPLOAD_NOT_FOUND"),
        (registry.artifacts.blob(sha256(b"right")), "BLOB_NOT_FOUND"),
        (read(registry, sha256(b"wrong")), "BLOB_NOT_FOUND"),
    ):
        with pytest.raises(NotFound) as gone:
            await missing
        assert gone.value.reason == reason
    assert _files(tmp_path / "data" / "blobs") == set()


async def test_finish_before_the_end_keeps_the_upload(registry: Registry) -> None:
    upload = await start(registry, DATA)
    await append(registry, upload, PIECES[0])
    with pytest.raises(WrongState) as early:
        await registry.artifacts.finish(upload.id)
    assert early.value.reason == "UPLOAD_OFFSET_MISMATCH"
    await append(registry, upload, *PIECES[1:])
    assert await registry.artifacts.finish(upload.id)


async def test_bytes_that_are_here_need_not_be_sent(registry: Registry) -> None:
    await put(registry, b"here")
    known = await registry.artifacts.start(sha256(b"here"), 4, request_id="", actor="")
    assert known == Blob(sha256=sha256(b"here"), size_bytes=4)
    with pytest.raises(InvalidInput):
        await registry.artifacts.start(sha256(b"here"), 5, request_id="", actor="")


async def test_two_uploads_of_the_same_bytes_end_as_one_blob(registry: Registry, tmp_path: Path) -> None:
    uploads = [await start(registry, b"same") for _ in range(4)]
    for upload in uploads:
        await append(registry, upload, chunk(b"same"))
    blobs = await asyncio.gather(*(registry.artifacts.finish(upload.id) for upload in uploads))
    assert len(set(blobs)) == 1
    assert await read(registry, sha256(b"same")) == b"same"
    assert len(_files(tmp_path / "data" / "blobs")) == 1


async def test_a_request_id_with_other_content_is_refused(registry: Registry) -> None:
    await start(registry, b"one", "r")
    with pytest.raises(AlreadyExists) as reused:
        await start(registry, b"two", "r")
    assert reused.value.reason == "REQUEST_ID_REUSED"


async def test_too_large_is_refused_before_a_byte_is_stored(open_here: Opener) -> None:
    async with open_here(blob_bytes_max=10) as registry:
        with pytest.raises(InvalidInput) as refused:
            await start(registry, bytes(11))
        assert refused.value.reason == "UPLOAD_TOO_LARGE"
        upload = await start(registry, bytes(10))
        with pytest.raises(InvalidInput) as refused:
            await append(registry, upload, chunk(bytes(11)))
        assert refused.value.reason == "UPLOAD_TOO_LARGE"


async def test_an_abandoned_upload_expires(registry: Registry, clock: Any, tmp_path: Path) -> None:
    upload = await start(registry, DATA, "r")
    await append(registry, upload, PIECES[0])
    clock.advance(86_000)
    await append(registry, upload, PIECES[1])
    clock.advance(86_000)
    await registry.artifacts.expire()
    assert (await registry.artifacts.upload(upload.id)).committed_bytes == 2 * CHUNK_BYTES
    clock.advance(401)
    with pytest.raises(NotFound):
        await registry.artifacts.upload(upload.id)
    await registry.artifacts.expire()
    assert _files(tmp_path / "data" / "blobs") == set()
    # The same request opens a new one.
    assert (await start(registry, DATA, "r")).id != upload.id


async def test_files_that_no_row_knows_are_swept_at_start(open_here: Opener, tmp_path: Path) -> None:
    async with open_here() as registry:
        digest = await put(registry, b"kept")
        upload = await start(registry, DATA)
        await append(registry, upload, PIECES[0])
    blobs = tmp_path / "data" / "blobs"
    kept = _files(blobs)
    for orphan in ("staging/unknown", f"sha256/{digest[:2]}/{'ab' * 32}", f"sha256/{digest[:2]}/{digest}#1"):
        (blobs / orphan).write_bytes(b"left")
    async with open_here() as registry:
        assert _files(blobs) == kept
        assert await read(registry, digest) == b"kept"
        assert (await registry.artifacts.upload(upload.id)).committed_bytes == CHUNK_BYTES


async def test_a_blob_left_by_a_failed_finish_is_replaced(registry: Registry, tmp_path: Path) -> None:
    path = _blob_path(tmp_path, b"right")
    path.parent.mkdir()
    path.write_bytes(b"torn")
    await put(registry, b"right")
    assert await read(registry, sha256(b"right")) == b"right"


@pytest.mark.parametrize("bit", [0, 8 * CHUNK_BYTES, 8 * len(DATA) - 1])
async def test_a_flipped_bit_is_noticed_before_the_last_chunk(registry: Registry, tmp_path: Path, bit: int) -> None:
    upload = await start(registry, DATA)
    await append(registry, upload, *PIECES)
    await registry.artifacts.finish(upload.id)
    damaged = bytearray(DATA)
    damaged[bit // 8] ^= 1 << bit % 8
    _blob_path(tmp_path, DATA).write_bytes(damaged)
    parts: list[bytes] = []

    async def download() -> None:
        async for part, _ in registry.artifacts.read(sha256(DATA), offset=0, limit_bytes=0):
            parts.append(part.data)

    with pytest.raises(Corrupt) as noticed:
        await download()
    assert noticed.value.reason == "BLOB_CORRUPT"
    assert len(b"".join(parts)) < len(DATA)


@pytest.mark.parametrize("size", [0, 1, len(DATA) - 1, None])
async def test_a_cut_or_lost_blob_is_noticed(registry: Registry, tmp_path: Path, size: int | None) -> None:
    upload = await start(registry, DATA)
    await append(registry, upload, *PIECES)
    await registry.artifacts.finish(upload.id)
    path = _blob_path(tmp_path, DATA)
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    for offset in (0, 5):
        with pytest.raises(Corrupt) as noticed:
            await read(registry, sha256(DATA), offset)
        assert noticed.value.reason == "BLOB_CORRUPT"


async def test_lost_staging_bytes_end_the_upload_so_that_it_can_start_again(open_here: Opener, tmp_path: Path) -> None:
    async with open_here() as registry:
        upload = await start(registry, DATA, "r")
        await append(registry, upload, PIECES[0])
    os.truncate(tmp_path / "data" / "blobs" / "staging" / upload.id, 1)
    async with open_here() as registry:
        with pytest.raises(Corrupt) as lost:
            await append(registry, upload, PIECES[1])
        assert lost.value.reason == "BLOB_CORRUPT"
        fresh = await start(registry, DATA, "r")
        assert (fresh.id != upload.id, fresh.committed_bytes) == (True, 0)


async def test_a_version_keeps_its_bytes_whatever_happens_to_the_upload(registry: Registry, clock: Any) -> None:
    digest = await put(registry, b"bytes")
    await create_model(registry)
    await publish(registry, digest)
    clock.advance(10**6)
    await registry.artifacts.expire()
    assert await read(registry, digest) == b"bytes"
