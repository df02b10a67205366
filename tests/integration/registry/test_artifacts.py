"""Uploads and blobs, in a folder and on a real S3 server."""

import asyncio
import contextlib
import dataclasses
import os
import pickle
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from mlmesh_registry import tables, uploading
from mlmesh_registry.artifacts import Artifacts
from mlmesh_registry.config import RegistrySettings
from mlmesh_registry.database import Write
from mlmesh_registry.ledger import Blob, Upload
from mlmesh_registry.names import VersionName
from mlmesh_registry.registry import Registry, open_registry
from mlmesh_runtime.chunks import CHUNK_BYTES, Chunk
from mlmesh_runtime.errors import AlreadyExists, Conflict, Corrupt, InvalidInput, NotFound, WrongState
from tests.integration.registry.conftest import ManualClock
from tests.support.blob_places import FolderPlace, Place, lying, new_place, only, remove
from tests.support.postgres import PostgresServer
from tests.support.registry import append, chunk, create_model, publish, put, read, sha256, some_bytes, start

Opener = Callable[..., AbstractAsyncContextManager[Registry]]

DATA = some_bytes("artifacts", 2 * CHUNK_BYTES + 12345)
PIECES = [chunk(DATA[at : at + CHUNK_BYTES], at) for at in range(0, len(DATA), CHUNK_BYTES)]


# S3 once: what it has to do with the database is the same on both.
STORES = [("sqlite", "folder"), ("postgresql", "folder"), ("sqlite", "s3")]


@pytest.fixture(params=STORES, ids="-".join)
def stores(request: pytest.FixtureRequest) -> tuple[str, str]:
    found: tuple[str, str] = request.param
    return found


@pytest.fixture
def database_url(request: pytest.FixtureRequest, stores: tuple[str, str]) -> str:
    if stores[0] == "sqlite":
        return ""
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.create(template=request.getfixturevalue("registry_template"))


@pytest.fixture
def place(
    request: pytest.FixtureRequest, stores: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Place:
    s3 = request.getfixturevalue("s3") if stores[1] == "s3" else None
    return new_place(stores[1], tmp_path, s3, monkeypatch)


@pytest.fixture
def open_here(tmp_path: Path, clock: ManualClock, database_url: str, place: Place) -> Opener:
    def opener(**changes: Any) -> AbstractAsyncContextManager[Registry]:
        settings = dataclasses.replace(RegistrySettings(database_url=database_url, blobs_url=place.url), **changes)
        return open_registry(tmp_path / "data", settings, clock=clock)

    return opener


def _keys(place: Place) -> list[str]:
    return [each.key for each in lying(place)]


async def test_bytes_come_back_as_they_went_in(registry: Registry, place: Place) -> None:
    upload = await start(registry, DATA)
    await append(registry, upload, *PIECES)
    assert (await registry.artifacts.upload(upload.id)).committed_bytes == len(DATA)
    blob = await registry.artifacts.finish(upload.id)
    assert blob == await registry.artifacts.finish(upload.id) == await registry.artifacts.blob(sha256(DATA))
    assert await read(registry, blob.sha256) == DATA
    (stored,) = lying(place)
    assert (stored.sha256, stored.upload_id) == (blob.sha256, upload.id)
    assert blob.format == "safetensors"


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
    blob = await registry.artifacts.finish(upload.id)
    assert (blob.sha256, blob.size_bytes, blob.format) == (sha256(b""), 0, "text")
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
    data = some_bytes("cancelled", 20_000)
    pieces = [chunk(data[at : at + 1000], at) for at in range(0, 20_000, 1000)]
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
    take_for_real = uploading._take

    def held_back(*arguments: Any) -> None:
        entered.set()
        proceed.wait(10)
        take_for_real(*arguments)

    monkeypatch.setattr(uploading, "_take", held_back)
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


async def test_who_sent_a_bad_chunk_hears_of_it_and_nobody_else(registry: Registry) -> None:
    upload = await start(registry, DATA)
    async with registry.artifacts.appending(upload.id) as live:
        await live.append(PIECES[0])
        await live.append(PIECES[1]._replace(crc32c=PIECES[1].crc32c ^ 1))
        assert (await registry.artifacts.upload(upload.id)).committed_bytes == CHUNK_BYTES
        with pytest.raises(Corrupt) as bad:
            await live.append(PIECES[2]._replace(offset=2 * CHUNK_BYTES))
        assert bad.value.reason == "CHUNK_CHECKSUM_MISMATCH"
        # It is as if it never came.
        await live.append(PIECES[1])
    assert (await registry.artifacts.upload(upload.id)).committed_bytes == 2 * CHUNK_BYTES


async def test_what_was_already_sent_is_refused_and_changes_nothing(registry: Registry) -> None:
    upload = await start(registry, DATA)
    await append(registry, upload, PIECES[0])
    for wrong in (PIECES[0], PIECES[2]):
        with pytest.raises(Conflict):
            await append(registry, upload, wrong)
    assert (await registry.artifacts.upload(upload.id)).committed_bytes == CHUNK_BYTES


async def test_more_than_is_stored_in_one_go(registry: Registry, place: Place) -> None:
    data = some_bytes("large", 20 * CHUNK_BYTES + 7)
    pieces = [chunk(data[at : at + CHUNK_BYTES], at) for at in range(0, len(data), CHUNK_BYTES)]
    upload = await start(registry, data)
    await append(registry, upload, *pieces)
    await registry.artifacts.finish(upload.id)
    assert sha256(await read(registry, sha256(data))) == sha256(data)
    assert await read(registry, sha256(data), 9 * CHUNK_BYTES - 1, 2) == data[9 * CHUNK_BYTES - 1 :][:2]
    # What is found out at the very end leaves nothing either.
    other = sha256(b"other")
    wrong = await registry.artifacts.start(other, len(data), request_id="", actor="")
    assert isinstance(wrong, Upload)
    await append(registry, wrong, *pieces)
    with pytest.raises(Corrupt) as refused:
        await registry.artifacts.finish(wrong.id)
    assert refused.value.reason == "DIGEST_MISMATCH"
    assert [each.sha256 for each in lying(place)] == [sha256(data)]


async def test_wrong_bytes_are_discarded(registry: Registry, place: Place) -> None:
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
    assert _keys(place) == []


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
    assert isinstance(known, Blob)
    assert (known.sha256, known.size_bytes) == (sha256(b"here"), 4)
    with pytest.raises(InvalidInput):
        await registry.artifacts.start(sha256(b"here"), 5, request_id="", actor="")


async def test_two_uploads_of_the_same_bytes_end_as_one_blob(registry: Registry, place: Place) -> None:
    uploads = [await start(registry, b"same") for _ in range(4)]
    for upload in uploads:
        await append(registry, upload, chunk(b"same"))
    blobs = await asyncio.gather(*(registry.artifacts.finish(upload.id) for upload in uploads))
    assert len(set(blobs)) == 1
    assert await read(registry, sha256(b"same")) == b"same"
    assert len(_keys(place)) == 1


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


async def test_an_abandoned_upload_expires(registry: Registry, clock: Any, place: Place) -> None:
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
    assert _keys(place) == []
    # The same request opens a new one.
    assert (await start(registry, DATA, "r")).id != upload.id


async def test_what_no_row_knows_is_swept(open_here: Opener, place: Place) -> None:
    async with open_here() as registry:
        digest = await put(registry, b"kept")
        upload = await start(registry, DATA)
        await append(registry, upload, PIECES[0])
        kept = _keys(place)
        other = "ab" * 32
        for orphan in (
            ("staging/unknown.1", f"sha256/{digest[:2]}/{digest}.unknown", f"sha256/ab/{other}", f"sha256/ab/{other}#1")
            if place.url == ""
            else ("staging/unknown/0.1", f"sha256/{digest[:2]}/{digest}/unknown", f"sha256/ab/{other}/{upload.id}0")
        ):
            (place.folder / "sha256" / "ab").mkdir(exist_ok=True) if isinstance(place, FolderPlace) else None
            place.write(orphan, b"left")
        assert len(_keys(place)) > len(kept)
        await registry.artifacts.sweep()
        assert _keys(place) == kept
        await append(registry, upload, PIECES[1])
    async with open_here() as registry:
        await registry.artifacts.sweep()
        assert await read(registry, digest) == b"kept"
        assert (await registry.artifacts.upload(upload.id)).committed_bytes == 2 * CHUNK_BYTES


@pytest.mark.parametrize(
    ("bit", "offset", "limit"),
    [
        (0, 0, 0),
        (8 * CHUNK_BYTES, 0, 0),
        (8 * len(DATA) - 1, 0, 0),
        # Of a range, too, and when the bit is beside what was asked for in the same block.
        (8 * CHUNK_BYTES + 77, CHUNK_BYTES + 5, 10),
        (8 * len(DATA) - 1, len(DATA) - 100, 5),
    ],
)
async def test_a_flipped_bit_is_never_given(
    registry: Registry, place: Place, bit: int, offset: int, limit: int
) -> None:
    digest = await _stored(registry)
    await create_model(registry)
    version = await publish(registry, digest)
    damaged = bytearray(DATA)
    damaged[bit // 8] ^= 1 << bit % 8
    place.write(only(place, digest), bytes(damaged))
    parts: list[Chunk] = []

    async def download() -> None:
        async for part, _ in registry.artifacts.read(digest, offset=offset, limit_bytes=limit):
            parts.append(part)

    with pytest.raises(Corrupt) as noticed:
        await download()
    # What comes before it is right.
    assert all(part.data == DATA[part.offset :][: len(part.data)] for part in parts)
    assert noticed.value.reason == "BLOB_CORRUPT"
    found = await registry.store.get_version(VersionName(model="m", number=version.number))
    assert found.stage == "QUARANTINED"
    assert not await registry.artifacts.verify(digest)


async def test_blocks_beside_a_flipped_bit_can_be_read(registry: Registry, place: Place) -> None:
    digest = await _stored(registry)
    damaged = bytearray(DATA)
    damaged[-1] ^= 1
    place.write(only(place, digest), bytes(damaged))
    assert await read(registry, digest, 5, 2 * CHUNK_BYTES - 5) == DATA[5 : 2 * CHUNK_BYTES]


@pytest.mark.parametrize("size", [0, 1, len(DATA) - 1, len(DATA) + 1, None])
async def test_a_cut_grown_or_lost_blob_is_noticed(registry: Registry, place: Place, size: int | None) -> None:
    digest = await _stored(registry)
    key = only(place, digest)
    if size is None:
        remove(place, key)
    else:
        place.write(key, (DATA + b"x")[:size])
    for offset in (0, 5, len(DATA)):
        with pytest.raises(Corrupt) as noticed:
            await read(registry, digest, offset)
        assert noticed.value.reason == "BLOB_CORRUPT"


async def test_bytes_that_were_lost_can_be_brought_again(registry: Registry, place: Place) -> None:
    digest = await _stored(registry)
    place.write(only(place, digest), DATA[:-1] + b"?")
    reading = registry.artifacts.read(digest, offset=0, limit_bytes=0)
    assert (await anext(reading))[0].data == DATA[:CHUNK_BYTES]
    with pytest.raises(Corrupt):
        await read(registry, digest)
    # Not "here already": here are other bytes.
    upload = await start(registry, DATA)
    await append(registry, upload, *PIECES)
    await registry.artifacts.finish(upload.id)
    assert await read(registry, digest) == DATA
    assert only(place, digest).endswith(upload.id)
    assert await registry.artifacts.verify(digest)
    # A download that began before goes on with the right bytes.
    assert b"".join([part.data async for part, _ in reading]) == DATA[CHUNK_BYTES:]


async def test_lost_staging_bytes_end_the_upload_so_that_it_can_start_again(open_here: Opener, place: Place) -> None:
    async with open_here() as registry:
        upload = await start(registry, DATA, "r")
        await append(registry, upload, *PIECES)
        place.write(_keys(place)[0], DATA[:1])
        with pytest.raises(Corrupt):
            await registry.artifacts.finish(upload.id)
        fresh = await start(registry, DATA, "r")
        assert (fresh.id != upload.id, fresh.committed_bytes) == (True, 0)


async def test_a_cancelled_upload_is_gone_and_cancelling_it_again_is_fine(registry: Registry, place: Place) -> None:
    upload = await start(registry, DATA, "r")
    async with registry.artifacts.appending(upload.id) as live:
        await live.append(PIECES[0])
        await registry.artifacts.cancel(upload.id)
        with pytest.raises(NotFound) as gone:
            await live.append(PIECES[1])
    assert gone.value.reason == "UPLOAD_NOT_FOUND"
    await registry.artifacts.cancel(upload.id)
    assert _keys(place) == []
    # A finished one may be cancelled, too: what it became is not its own any more.
    digest = await put(registry, b"became a blob")
    (stored,) = lying(place)
    await registry.artifacts.cancel(stored.upload_id)
    assert await read(registry, digest) == b"became a blob"
    assert (await start(registry, DATA, "r")).id != upload.id


async def test_two_registries_go_on_with_one_upload(open_here: Opener, tmp_path: Path, place: Place) -> None:
    # A client is cut off from one process and lands on the other, while the first still waits for it.
    async with open_here() as one, _another(one, place) as other:
        upload = await start(one, DATA)
        async with one.artifacts.appending(upload.id) as hanging:
            await hanging.append(PIECES[0])
            await hanging.commit()
            await hanging.append(PIECES[1])
            # What the first has not committed, nobody was promised.
            assert (await other.upload(upload.id)).committed_bytes == CHUNK_BYTES
            async with other.appending(upload.id) as live:
                await live.append(PIECES[1])
            with pytest.raises(Conflict) as late:
                await hanging.commit()
            assert late.value.metadata["expected_offset"] == str(2 * CHUNK_BYTES)
        await append(one, upload, PIECES[2])
        blobs = await asyncio.gather(other.finish(upload.id), one.artifacts.finish(upload.id))
        assert blobs[0] == blobs[1]
        for reader in (one.artifacts, other):
            parts = [part.data async for part, _ in reader.read(sha256(DATA), offset=0, limit_bytes=0)]
            assert b"".join(parts) == DATA
        assert [each.sha256 for each in lying(place)] == [sha256(DATA)]


async def test_an_upload_goes_on_while_everything_unknown_is_swept(open_here: Opener, place: Place) -> None:
    async with open_here() as one, _another(one, place) as other:
        upload = await start(one, DATA)
        async with one.artifacts.appending(upload.id) as live:
            for piece in PIECES:
                await live.append(piece)
                await other.sweep()
        sweeping = asyncio.ensure_future(other.sweep())
        await one.artifacts.finish(upload.id)
        await sweeping
        await other.sweep()
        assert await read(one, sha256(DATA)) == DATA


@contextlib.asynccontextmanager
async def _another(registry: Registry, place: Place) -> AsyncIterator[Artifacts]:
    """What a second process does with the same ledger and the same place."""
    first = registry.artifacts
    second = Artifacts(
        await asyncio.to_thread(place.blobs),
        first._ledger,
        disk=first._disk,
        bulk=first._bulk,
        clock=first._clock,
        blob_bytes_max=first._blob_bytes_max,
        commit_bytes=1 << 24,
    )
    yield second


async def _stored(registry: Registry) -> str:
    upload = await start(registry, DATA)
    await append(registry, upload, *PIECES)
    return (await registry.artifacts.finish(upload.id)).sha256


@pytest.mark.parametrize(
    ("data", "recognised"),
    [
        (pickle.dumps(os.system), "a pickle of protocol 4"),
        (pickle.dumps(os.system, 0), "it reads as a pickle"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (bytes(range(256)) * 5000, "not text"),
    ],
    ids=["pickle", "pickle-0", "zip", "noise"],
)
async def test_nothing_is_kept_of_what_may_not_be_stored(
    registry: Registry, place: Place, data: bytes, recognised: str
) -> None:
    upload = await start(registry, data)
    await append(registry, upload, *(chunk(data[at : at + 500_000], at) for at in range(0, len(data), 500_000)))
    with pytest.raises(InvalidInput, match=recognised) as refused:
        await registry.artifacts.finish(upload.id)
    assert refused.value.reason == "FORMAT_NOT_ALLOWED"
    assert _keys(place) == []
    with pytest.raises(NotFound):
        await registry.artifacts.finish(upload.id)


async def test_what_has_no_row_any_more_is_removed_and_what_comes_again_stays(registry: Registry, place: Place) -> None:
    digest = await put(registry, b"to go")
    await registry.artifacts.remove([digest])
    assert await read(registry, digest) == b"to go"

    def forget(write: Write) -> None:
        write.connection.execute(tables.uploads.delete())
        write.connection.execute(tables.blobs.delete())

    await registry.artifacts._ledger._database.write(forget)
    again = await start(registry, b"to go")
    await append(registry, again, chunk(b"to go"))
    # The bytes come again, and are not known yet, while those of before go.
    blob, _ = await asyncio.gather(registry.artifacts.finish(again.id), registry.artifacts.remove([digest]))
    await registry.artifacts.remove([digest])
    assert await read(registry, digest) == b"to go"
    assert [each.upload_id for each in lying(place)] == [again.id] == [blob.location]


@pytest.mark.parametrize("stores", STORES[:2], indirect=True, ids="-".join)
async def test_a_blob_of_before_is_looked_at_when_it_is_needed(open_here: Opener, place: Place) -> None:
    """Older releases kept no digests of blocks, no formats, and blobs under their digest alone, in a folder."""
    assert isinstance(place, FolderPlace)
    noise = bytes(range(256)) * 8192

    def as_before(write: Write) -> None:
        write.connection.execute(tables.blob_blocks.delete())
        write.connection.execute(tables.blobs.update().values(format="", location=""))

    async with open_here() as registry:
        digest = await _stored(registry)
        small = await put(registry, b"small")
        await registry.artifacts._ledger._database.write(as_before)
        for sha in (digest, small):
            (place.folder / only(place, sha)).rename(place.folder / "sha256" / sha[:2] / sha)
        # Nobody asked then what it was.
        (place.folder / "sha256" / sha256(noise)[:2]).mkdir(exist_ok=True)
        place.write(f"sha256/{sha256(noise)[:2]}/{sha256(noise)}", noise)
        row = {"sha256": sha256(noise), "size_bytes": len(noise), "create_time": 0, "unused_since": None}
        await registry.artifacts._ledger._database.write(
            lambda write: write.connection.execute(tables.blobs.insert().values(row)).close()
        )
    async with open_here() as registry:
        assert await read(registry, digest, 5, 10) == DATA[5:15]
        assert await read(registry, sha256(noise), CHUNK_BYTES, 5) == noise[:5]
        await registry.artifacts.examine()
        formats = [(await registry.artifacts.blob(sha)).format for sha in (digest, small, sha256(noise))]
        assert formats == ["safetensors", "text", "none"]
        assert await registry.artifacts.verify(digest)
        place.write(only(place, digest), DATA[:-1] + b"?")
        with pytest.raises(Corrupt):
            await read(registry, digest, len(DATA) - 1)


async def test_a_version_keeps_its_bytes_whatever_happens_to_the_upload(registry: Registry, clock: Any) -> None:
    digest = await put(registry, b"bytes")
    await create_model(registry)
    await publish(registry, digest)
    clock.advance(10**6)
    await registry.artifacts.expire()
    assert await read(registry, digest) == b"bytes"
