"""What goes for good, what stays, and that nobody's bytes go with what nobody wants."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from mlmesh_registry.ledger import Blob
from mlmesh_registry.registry import Registry
from mlmesh_registry.versions import Artifact, Content
from mlmesh_runtime.errors import InvalidInput, NotFound, WrongState
from tests.support.registry import alias, append, chunk, create_model, number, publish, put, read, sha256, start

Opener = Callable[..., AbstractAsyncContextManager[Registry]]
DAY = 86_400
GRACE = 7 * DAY


def files(tmp_path: Path) -> set[str]:
    """Digests of the blobs whose bytes are here."""
    return {path.name.split(".")[0] for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file()}


async def here(registry: Registry, *digests: str) -> list[bool]:
    """Which of these blobs are here."""

    async def one(digest: str) -> bool:
        try:
            return bool(await registry.artifacts.blob(digest))
        except NotFound:
            return False

    return [await one(digest) for digest in digests]


async def collect(registry: Registry, **asked: Any) -> Any:
    return await registry.garbage.collect(**{"grace": None, "dry_run": False, **asked})


async def test_bytes_that_nobody_used_go_after_the_grace_period(registry: Registry, clock: Any, tmp_path: Path) -> None:
    await create_model(registry)
    used, unused = await put(registry, b"used"), await put(registry, b"unused!")
    await publish(registry, used)
    clock.advance(GRACE - 1)
    assert (await collect(registry)).blob_count == 0
    clock.advance(1)
    foreseen = await collect(registry, dry_run=True)
    assert await here(registry, used, unused) == [True, True]
    report = await collect(registry)
    assert foreseen == report
    assert (report.freed_bytes, report.blobs, report.blob_count) == (7, [f"blobs/sha256-{unused}"], 1)
    assert await here(registry, used, unused) == [True, False]
    assert await read(registry, used) == b"used"
    assert files(tmp_path) == {used}
    assert (await collect(registry)).blob_count == 0
    # The same bytes may come again.
    assert await read(registry, await put(registry, b"unused!")) == b"unused!"


async def test_what_was_deleted_goes_with_what_only_it_used(registry: Registry, clock: Any, tmp_path: Path) -> None:
    await create_model(registry)
    await create_model(registry, "n")
    shared, own = await put(registry, b"shared"), await put(registry, b"own")
    content = Content(artifacts=(Artifact(path="a", sha256=shared), Artifact(path="b", sha256=own)))
    await registry.store.create_version("m", content, request_id="", actor="")
    await publish(registry, shared, "n")
    await registry.store.delete_version(number(1), etag="", actor="")
    clock.advance(30 * DAY - 1)
    assert (await collect(registry)).purged_count == 0
    clock.advance(1)
    foreseen = await collect(registry, dry_run=True)
    report = await collect(registry)
    assert foreseen == report
    assert (report.purged, report.purged_count, report.blob_count) == (["models/m/versions/1"], 1, 0)
    with pytest.raises(NotFound):
        await registry.store.get_version(number(1))
    # Its own file is unused from now on, and has its grace; the number is never used again.
    assert await here(registry, shared, own) == [True, True]
    assert (await publish(registry, shared)).number == 2
    clock.advance(GRACE)
    report = await collect(registry)
    assert report.blobs == [f"blobs/sha256-{own}"]
    assert await here(registry, shared, own) == [True, False]
    assert files(tmp_path) == {shared}


async def test_a_purged_model_leaves_its_name_and_nothing_else(registry: Registry, clock: Any) -> None:
    await registry.store.create_model("m", description="words", labels={"a": "b"}, request_id="", actor="")
    digest = await put(registry, b"bytes")
    content = Content(
        artifacts=(Artifact(path="a", sha256=digest),), metrics={"f1": 1}, labels={"a": "b"}, description="words"
    )
    for _ in range(3):
        await registry.store.create_version("m", content, request_id="", actor="")
    moved = await registry.store.set_alias(alias("stable"), number(1), etag="", actor="")
    await registry.store.delete_alias(alias("stable"), etag=moved.etag, actor="")
    await registry.store.delete_model("m", etag="", force=True, actor="")
    clock.advance(30 * DAY)
    report = await collect(registry)
    assert report.purged == [*(f"models/m/versions/{count}" for count in (1, 2, 3)), "models/m"]
    with pytest.raises(NotFound):
        await registry.store.get_model("m")
    assert (await create_model(registry)).latest_version == 0
    # Another model of that name: no history, no versions of the first.
    assert (await registry.store.list_moves("m", None, size=0, token=""))[0] == []
    assert (await publish(registry, digest)).number == 1


async def test_a_dry_run_may_ask_for_less_grace_than_a_run(registry: Registry, clock: Any) -> None:
    await create_model(registry)
    kept, shared, own = [await put(registry, data) for data in (b"kept", b"shared", b"own")]
    for digest in (shared, own, shared):
        await publish(registry, digest)
    for count in (1, 2):
        await registry.store.delete_version(number(count), etag="", actor="")
    clock.advance(30 * DAY)
    fresh = await put(registry, b"fresh")
    foreseen = await collect(registry, dry_run=True, grace=timedelta())
    # With no grace, what is purged frees its bytes at once, and what has just come goes too.
    assert set(foreseen.blobs) == {f"blobs/sha256-{digest}" for digest in (kept, own, fresh)}
    assert foreseen.purged_count == 2
    for refused in (timedelta(), timedelta(seconds=GRACE - 1)):
        with pytest.raises(InvalidInput) as error:
            await collect(registry, grace=refused)
        assert error.value.field == "grace"
    assert await here(registry, kept, shared, own, fresh) == [True] * 4
    assert (await collect(registry, grace=timedelta(days=31))).blob_count == 0
    assert (await collect(registry, grace=timedelta(seconds=GRACE))).blobs == [f"blobs/sha256-{kept}"]


async def test_an_upload_under_way_keeps_the_bytes_that_it_brings(registry: Registry, clock: Any) -> None:
    data = b"bytes"
    digest = await put(registry, data)
    clock.advance(GRACE)
    # Somebody asked for it: it is here already, and stays for another grace period.
    assert isinstance(await registry.artifacts.start(digest, len(data), request_id="", actor=""), Blob)
    assert (await collect(registry)).blob_count == 0
    clock.advance(GRACE)
    assert (await collect(registry)).blob_count == 1
    upload = await start(registry, data)
    await append(registry, upload, chunk(data))
    assert (await collect(registry)).blob_count == 0
    assert (await registry.artifacts.finish(upload.id)).sha256 == digest
    assert await read(registry, digest) == data


async def test_collecting_beside_uploads_and_publishing_never_leaves_a_row_without_bytes(
    open_here: Opener, clock: Any
) -> None:
    """Everything at once, with next to no grace: whatever version is there can be read."""
    async with open_here(garbage_grace_s=1e-6, deleted_kept_s=1e-6) as registry:
        await create_model(registry)
        removed = published = 0
        chance = random.Random(7)  # noqa: S311

        async def use(data: bytes) -> None:
            nonlocal removed, published
            for _ in range(12):
                with contextlib.suppress(NotFound, WrongState):
                    # Where another was faster, its blob may have gone again before this one is told.
                    if await brought(registry, data):
                        version = await publish(registry, sha256(data))
                        published += 1
                        assert await read(registry, sha256(data)) == data
                        await registry.store.delete_version(number(version.number), etag="", actor="")
                for _ in range(chance.randrange(4)):
                    clock.advance(1)
                    removed += (await collect(registry)).blob_count

        await asyncio.gather(*(use(data) for data in (b"a" * 100, b"b" * 200, b"b" * 200)))
        assert removed > 0
        assert published > 0
        for data in (b"a" * 100, b"b" * 200):
            await brought(registry, data)
            assert await read(registry, sha256(data)) == data


async def eventually(asked: Callable[[], Awaitable[list[bool]]]) -> None:
    """Wait until nothing of it is there; what runs by itself tells nobody."""
    async with asyncio.timeout(20):
        while any(await asked()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def brought(registry: Registry, data: bytes) -> bool:
    """Upload bytes unless they are here; an upload that came to nothing is cancelled."""
    answer = await registry.artifacts.start(sha256(data), len(data), request_id="", actor="")
    if isinstance(answer, Blob):
        return True
    try:
        await append(registry, answer, chunk(data))
        return bool(await registry.artifacts.finish(answer.id))
    except (NotFound, WrongState):
        await registry.artifacts.cancel(answer.id, actor="")
        return False


async def test_it_runs_by_itself_and_tells_who_did_what(open_here: Opener, clock: Any) -> None:
    async with open_here() as registry:
        digest = await put(registry, b"bytes")
    clock.advance(GRACE)
    # Four rounds of upkeep in the time that an upload may rest.
    async with open_here(upload_ttl_s=0.1) as registry:
        await eventually(lambda: here(registry, digest))
        entries, _ = await registry.store.list_audit(from_sequence=0, resource="", actor="registry", size=0, token="")
        assert [(entry.method, entry.resource) for entry in entries] == [("Purge", f"blobs/sha256-{digest}")]
    async with open_here() as registry:
        other = await put(registry, b"other")
        clock.advance(GRACE)
        await collect(registry, actor="spiffe://someone")
        entries, _ = await registry.store.list_audit(
            from_sequence=0, resource=f"blobs/sha256-{other}", actor="spiffe://someone", size=0, token=""
        )
        assert [entry.method for entry in entries] == ["CollectGarbage"]
