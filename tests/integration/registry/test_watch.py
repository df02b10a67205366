"""Watching: order, resumption, bookmarks, bounds."""

import asyncio
import contextlib
import itertools
import shutil
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from pathlib import Path

import pytest

from mlmesh_registry.events import Bookmark, Change, DeletedAlias
from mlmesh_registry.registry import Registry
from mlmesh_registry.versions import Alias, Model, Version
from mlmesh_runtime.errors import Overloaded, RevisionLost
from tests.support.postgres import PostgresServer, name_of
from tests.support.registry import alias, create_model, number, publish, put

Opener = Callable[..., AbstractAsyncContextManager[Registry]]
Events = AsyncGenerator[Change | Bookmark, None]


async def _take(events: Events, count: int) -> list[Change | Bookmark]:
    async with asyncio.timeout(20):
        return [await anext(events) for _ in range(count)]


async def _backlog(events: Events) -> list[Change]:
    """Changes up to the bookmark that ends the backlog."""
    found: list[Change] = []
    async with asyncio.timeout(20):
        async for event in events:
            if isinstance(event, Bookmark):
                return found
            found.append(event)
    raise AssertionError("ended without a bookmark")


def _revisions(events: list[Change] | list[Change | Bookmark]) -> list[int]:
    return [event.revision for event in events]


async def _history(registry: Registry) -> None:
    """Revisions 1 to 7: model m, two versions, an alias made, moved, deleted; then model n."""
    digest = await put(registry, b"bytes")
    await create_model(registry)
    await publish(registry, digest)
    await publish(registry, digest)
    first = await registry.store.set_alias(alias("stable"), number(1), etag="", actor="")
    moved = await registry.store.set_alias(alias("stable"), number(2), etag=first.etag, actor="")
    await registry.store.delete_alias(alias("stable"), etag=moved.etag, actor="")
    await create_model(registry, "n")


async def test_the_present_state_comes_first_then_what_follows(registry: Registry) -> None:
    await _history(registry)
    async with aclosing(registry.feed.watch(0, None)) as events:
        present = await _backlog(events)
        assert _revisions(present) == [1, 2, 3, 7]
        assert [type(change.subject) for change in present] == [Model, Version, Version, Model]
        await create_model(registry, "o")
        (change,) = await _take(events, 1)
        assert (change.revision, change.model) == (8, "o")  # type: ignore[union-attr]


async def test_the_present_state_has_versions_before_the_aliases_that_point_at_them(registry: Registry) -> None:
    digest = await put(registry, b"bytes")
    await create_model(registry)
    await publish(registry, digest)
    await registry.store.set_alias(alias("stable"), number(1), etag="", actor="")
    async with aclosing(registry.feed.watch(0, None)) as events:
        _, version, moved = await _backlog(events)
        assert isinstance(version.subject, Version)
        assert version.subject.aliases == ("stable",)
        assert isinstance(moved.subject, Alias)


@pytest.mark.parametrize("start", range(1, 9))
async def test_a_replay_begins_at_any_revision(registry: Registry, start: int) -> None:
    await _history(registry)
    async with aclosing(registry.feed.watch(start, None)) as events:
        changes = await _backlog(events)
    assert _revisions(changes) == list(range(start, 8))
    if start <= 6:
        assert next(c for c in changes if c.revision == 6).subject == DeletedAlias(model="m", alias="stable", version=2)


@pytest.mark.parametrize("start", [0, 1])
async def test_only_one_model_is_seen_when_asked(registry: Registry, start: int) -> None:
    await _history(registry)
    async with aclosing(registry.feed.watch(start, "n")) as events:
        assert _revisions(await _backlog(events)) == [7]
        await create_model(registry, "o")
        model = await registry.store.get_model("n")
        await registry.store.update_model("n", description="new", labels={}, etag=model.etag, actor="")
        assert _revisions(await _take(events, 1)) == [9]


async def test_an_idle_watch_gets_bookmarks(open_here: Opener) -> None:
    async with open_here(bookmark_s=0.01) as registry:
        await create_model(registry)
        async with aclosing(registry.feed.watch(0, None)) as events:
            found = await _take(events, 4)
            assert [type(event) for event in found] == [Change, Bookmark, Bookmark, Bookmark]
            assert _revisions(found) == [1, 1, 1, 1]
        async with aclosing(registry.feed.watch(0, "other")) as events:
            # Nothing for this watcher, but it learns how far it has come.
            assert _revisions(await _take(events, 2)) == [1, 1]


async def test_changes_of_others_do_not_put_bookmarks_off(open_here: Opener) -> None:
    async with open_here(bookmark_s=0.1) as registry:
        model = await create_model(registry)

        async def others() -> None:
            etag = model.etag
            for count in itertools.count():
                changed = registry.store.update_model("m", description=str(count), labels={}, etag=etag, actor="")
                etag = (await changed).etag

        async with aclosing(registry.feed.watch(0, "none")) as events:
            writing = asyncio.ensure_future(others())
            found = await _take(events, 4)
            writing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await writing
        revisions = _revisions(found)
        assert all(isinstance(event, Bookmark) for event in found)
        assert revisions == sorted(set(revisions))


async def test_a_commit_wakes_a_watcher_at_once(open_here: Opener) -> None:
    async with open_here(bookmark_s=3600) as registry, aclosing(registry.feed.watch(0, None)) as events:
        assert await _backlog(events) == []
        waiting = asyncio.ensure_future(anext(events))
        await create_model(registry)
        async with asyncio.timeout(30):
            assert (await waiting).revision == 1


async def test_neither_gap_nor_repeat_under_concurrent_writes_and_cuts(open_here: Opener) -> None:
    writers, each = 4, 25
    async with open_here(watch_queue_items_max=16) as registry:
        digest = await put(registry, b"bytes")
        await create_model(registry)
        total = 1 + writers * each

        async def write(writer: int) -> None:
            for count in range(each):
                await publish(registry, digest, description=f"{writer} {count}")

        async def follow(first: int, cut_after: int) -> list[int]:
            """Watch, cut after some events, resume behind the last seen, until all is seen."""
            seen: list[int] = []
            resume = first
            while not seen or seen[-1] < total:
                taken = 0
                try:
                    async with aclosing(registry.feed.watch(resume, None)) as events:
                        async for event in events:
                            if isinstance(event, Change):
                                seen.append(event.revision)
                                taken += 1
                            resume = event.revision + 1
                            if taken >= cut_after or event.revision == total:
                                break
                except Overloaded as slow:
                    # Sixteen changes in one turn of the loop are allowed to be too much; nothing is lost by it.
                    resume = int(slow.metadata["revision"]) + 1
            return seen

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            followers = [group.create_task(follow(first, cut)) for first in (0, 1) for cut in (1, 3, 7, 1000)]
            for writer in range(writers):
                group.create_task(write(writer))
        for follower in followers:
            assert follower.result() == list(range(1, total + 1))


async def test_a_watcher_that_falls_behind_is_ended_and_can_resume(open_here: Opener) -> None:
    async with open_here(watch_queue_items_max=5) as registry:
        await create_model(registry)
        async with aclosing(registry.feed.watch(0, None)) as events:
            await _backlog(events)
            for name in "abcdefg":
                await create_model(registry, name)
            with pytest.raises(Overloaded) as ended:
                await _take(events, 10)
        assert ended.value.reason == "WATCHER_TOO_SLOW"
        resume = int(ended.value.metadata["revision"]) + 1
        async with aclosing(registry.feed.watch(resume, None)) as events:
            assert _revisions(await _backlog(events)) == list(range(2, 9))


async def test_what_is_no_longer_kept_is_said_so(open_here: Opener) -> None:
    async with open_here(changes_kept=3, watch_queue_items_max=2) as registry:
        for name in "abcde":
            await create_model(registry, name)
        for start in (1, 2):
            with pytest.raises(RevisionLost) as lost:
                await _take(registry.feed.watch(start, None), 1)
            assert (lost.value.reason, lost.value.metadata["oldest_revision"]) == ("REVISION_LOST", "3")
        async with aclosing(registry.feed.watch(3, None)) as events:
            assert _revisions(await _backlog(events)) == [3, 4, 5]
        async with aclosing(registry.feed.watch(0, None)) as events:
            assert _revisions(await _backlog(events)) == [1, 2, 3, 4, 5]


async def test_a_revision_that_is_yet_to_come_is_lost_too(registry: Registry) -> None:
    # Its giver was restored from an older copy; waiting would skip what happens until then.
    await create_model(registry)
    async with aclosing(registry.feed.watch(2, None)) as events:
        assert await _backlog(events) == []
    with pytest.raises(RevisionLost):
        await _take(registry.feed.watch(3, None), 1)


async def test_a_restored_copy_is_told_to_who_saw_more(
    open_here: Opener, tmp_path: Path, database_url: str, postgres: PostgresServer
) -> None:
    """A backup of revision 2 comes back after revision 4 was seen."""
    path = tmp_path / "data" / "registry.sqlite"
    async with open_here() as registry:
        for name in "ab":
            await create_model(registry, name)
    if database_url:
        backup = name_of(postgres.create(template=name_of(database_url)))
    else:
        shutil.copy(path, tmp_path / "backup")
    async with open_here() as registry:
        for name in "cd":
            await create_model(registry, name)
    if database_url:
        postgres.execute(f"DROP DATABASE {name_of(database_url)}")
        postgres.execute(f"ALTER DATABASE {backup} RENAME TO {name_of(database_url)}")
    else:
        shutil.copy(tmp_path / "backup", path)
    async with open_here() as registry:
        for seen in (3, 4):
            with pytest.raises(RevisionLost) as lost:
                await _take(registry.feed.watch(seen + 1, None), 1)
            assert lost.value.metadata["head_revision"] == "2"
        async with aclosing(registry.feed.watch(3, None)) as events:
            assert await _backlog(events) == []


async def test_the_log_goes_on_after_a_restart(open_here: Opener) -> None:
    async with open_here() as registry:
        await _history(registry)
    async with open_here() as registry:
        await create_model(registry, "o")
        async with aclosing(registry.feed.watch(5, None)) as events:
            assert _revisions(await _backlog(events)) == [5, 6, 7, 8]


async def test_a_large_present_state_is_read_in_pages(open_here: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlmesh_registry.watch.PAGE_ITEMS", 3)
    async with open_here() as registry:
        await _history(registry)
        for name in "opqrst":
            await create_model(registry, name)
        async with aclosing(registry.feed.watch(0, None)) as events:
            first = await _take(events, 2)
            # Changed between two pages: it leaves the present state and comes from the log.
            model = await registry.store.get_model("t")
            await registry.store.update_model("t", description="new", labels={}, etag=model.etag, actor="")
            rest = await _take(events, 8)
        assert _revisions([*first, *rest]) == [1, 2, 3, 7, 8, 9, 10, 11, 12, 14]


async def test_a_long_replay_is_read_in_pages(open_here: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlmesh_registry.watch.PAGE_ITEMS", 3)
    async with open_here(watch_queue_items_max=2) as registry:
        for name in "abcdefghij":
            await create_model(registry, name)
        async with aclosing(registry.feed.watch(1, None)) as events:
            assert _revisions(await _backlog(events)) == list(range(1, 11))
        async with aclosing(registry.feed.watch(2, "i")) as events:
            assert _revisions(await _backlog(events)) == [9]


async def test_a_thousand_watchers_see_every_change(registry: Registry) -> None:
    await create_model(registry)
    ready = asyncio.Semaphore(0)

    async def follow() -> list[int]:
        async with aclosing(registry.feed.watch(2, None)) as events:
            await _backlog(events)
            ready.release()
            return _revisions(await _take(events, 3))

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        followers = [group.create_task(follow()) for _ in range(1000)]
        for _ in followers:
            await ready.acquire()
        for name in "abc":
            await create_model(registry, name)
    assert all(follower.result() == [2, 3, 4] for follower in followers)
