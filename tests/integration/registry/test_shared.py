"""Registries that share a PostgreSQL database: one log for all, whoever writes and whoever watches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from mlmesh_registry import postgresql
from mlmesh_registry.backends import Backend
from mlmesh_registry.config import RegistrySettings
from mlmesh_registry.database import ATTEMPTS_MAX, Database, Write
from mlmesh_registry.events import Bookmark, Change
from mlmesh_registry.postgresql import PostgresBackend, parse_url
from mlmesh_registry.registry import Registry, open_registry, utc_now
from mlmesh_registry.search import Asked
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.errors import NotReady, RevisionLost
from mlmesh_runtime.executors import Executors
from tests.support.postgres import PostgresServer, name_of
from tests.support.registry import create_model, number, publish, put

Opener = Callable[..., AbstractAsyncContextManager[Registry]]


@pytest.fixture
def open_one(tmp_path: Path, shared_url: str) -> Opener:
    """Open one more registry on this test's database and folder."""

    def opener(**changes: object) -> AbstractAsyncContextManager[Registry]:
        settings = RegistrySettings(**{"database_url": shared_url, **changes})  # type: ignore[arg-type]
        return open_registry(tmp_path / "data", settings)

    return opener


@pytest.fixture
async def two(open_one: Opener) -> AsyncIterator[tuple[Registry, Registry]]:
    # Polling would hide that nobody was told.
    async with open_one(poll_s=3600.0) as first, open_one(poll_s=3600.0) as second:
        yield first, second


async def _revisions(registry: Registry, start: int, upto: int) -> list[int]:
    seen: list[int] = []
    async with asyncio.timeout(20), aclosing(registry.feed.watch(start, None)) as events:
        async for event in events:
            if isinstance(event, Change):
                seen.append(event.revision)
            if event.revision >= upto:
                return seen
    raise AssertionError("ended")


async def _end(events: AsyncGenerator[Change | Bookmark, None]) -> None:
    async with asyncio.timeout(30):
        async for _ in events:
            pass


async def test_watchers_of_one_see_what_the_other_wrote(two: tuple[Registry, Registry]) -> None:
    first, second = two
    async with aclosing(first.feed.watch(0, None)) as events:
        assert isinstance(await anext(events), Bookmark)
        for name, registry in (("a", second), ("b", first), ("c", second)):
            waiting = asyncio.ensure_future(anext(events))
            await create_model(registry, name)
            async with asyncio.timeout(30):
                event = await waiting
            assert isinstance(event, Change)
            assert event.model == name


async def test_all_watchers_see_one_order_without_gap_or_repeat(two: tuple[Registry, Registry]) -> None:
    first, second = two
    digest = await put(first, b"bytes")
    await create_model(first)
    each = 30
    total = 1 + 2 * each

    async def write(registry: Registry) -> None:
        for _ in range(each):
            await publish(registry, digest)

    async def move_on() -> list[int]:
        """Watch one registry for a while, then go on at the other, behind the last revision seen."""
        seen: list[int] = []
        while len(seen) < total:
            for registry in two:
                upto = min(len(seen) + 7, total)
                seen += await _revisions(registry, len(seen) + 1, upto)
        return seen

    async with asyncio.TaskGroup() as group:
        watchers = [group.create_task(_revisions(registry, start, total)) for registry in two for start in (0, 1, 2)]
        watchers += [group.create_task(move_on()) for _ in range(2)]
        for registry in two:
            group.create_task(write(registry))
    expected = list(range(1, total + 1))
    for watcher, start in zip(watchers, (1, 1, 2, 1, 1, 2, 1, 1), strict=True):
        assert watcher.result() == expected[start - 1 :]
    assert (await second.store.get_model("m")).latest_version == 2 * each


async def test_revisions_are_committed_in_their_order(two: tuple[Registry, Registry], shared_url: str) -> None:
    """Nobody, not even a reader of the tables, sees a revision before the one below it."""
    done = threading.Event()
    looked: list[int] = []

    def look() -> None:
        with psycopg.connect(shared_url, autocommit=True) as connection:
            while not done.is_set():
                row = connection.execute("SELECT count(*), coalesce(max(revision), 0) FROM changes").fetchone()
                assert row is not None
                assert row[0] == row[1], "a hole in the log"
                looked.append(row[0])

    looking = asyncio.ensure_future(asyncio.to_thread(look))

    async def write(registry: Registry, name: str) -> None:
        for count in range(40):
            await create_model(registry, f"{name}{count}")

    await asyncio.gather(write(two[0], "a"), write(two[1], "b"))
    done.set()
    await looking
    assert looked == sorted(looked)
    assert len(set(looked)) > 10, "too few looks to have seen anything"


async def test_what_notify_did_not_bring_is_found_by_polling(open_one: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    async def deaf(_self: PostgresBackend, _heard: Callable[[int], None]) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(PostgresBackend, "listen", deaf)
    async with open_one(poll_s=0.05) as first, open_one() as second:
        await create_model(second)
        assert await _revisions(first, 1, 1) == [1]


async def test_listening_goes_on_after_its_connection_was_ended(
    two: tuple[Registry, Registry], postgres: PostgresServer, shared_url: str
) -> None:
    first, second = two
    for revision, (writes, watches) in enumerate(((first, second), (second, first)), 1):
        # Once they heard this they listen, and once they heard the next they listen again.
        await create_model(writes, f"before-{revision}")
        assert await _revisions(watches, 1, revision) == list(range(1, revision + 1))
    assert postgres.disconnect(name_of(shared_url), "query LIKE 'LISTEN%'") == 2
    await create_model(second)
    assert await _revisions(first, 3, 3) == [3]


async def test_registries_that_start_together_on_an_empty_database(tmp_path: Path, postgres: PostgresServer) -> None:
    settings = RegistrySettings(database_url=postgres.create())
    async with AsyncExitStack() as stack:
        opened = await asyncio.gather(
            *(stack.enter_async_context(open_registry(tmp_path / "data", settings)) for _ in range(3))
        )
        await create_model(opened[0])
        assert [(await registry.store.get_model("m")).revision for registry in opened] == [1, 1, 1]


async def test_text_is_ordered_by_its_bytes_whatever_the_database_says(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    postgres.execute("CREATE DATABASE english TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en' LOCALE 'C.UTF-8'")
    settings = RegistrySettings(database_url=postgres.url("english"))
    async with open_registry(tmp_path / "data", settings) as registry:
        for name in ("a-b", "aa", "a1"):
            await create_model(registry, name)
        models, _ = await registry.search.list_models(Asked())
    assert [model.id for model in models] == sorted(["a-b", "aa", "a1"])
    left = "SELECT * FROM information_schema.columns WHERE table_schema = 'public' AND data_type = 'text'"
    tables = "AND collation_name IS NULL AND table_name <> 'alembic_version'"
    assert postgres.execute(f"{left} {tables}", "english") == []


async def test_another_encoding_is_refused(tmp_path: Path, postgres: PostgresServer) -> None:
    postgres.execute("CREATE DATABASE latin TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    with pytest.raises(ConfigError, match="LATIN1; expected UTF8"):
        async with open_registry(tmp_path, RegistrySettings(database_url=postgres.url("latin"))):
            pass


async def test_a_schema_of_a_newer_release_is_refused(
    tmp_path: Path, postgres: PostgresServer, shared_url: str
) -> None:
    database = name_of(shared_url)
    postgres.execute("UPDATE alembic_version SET version_num = '9999'", database)
    with pytest.raises(ConfigError, match="newer release"):
        async with open_registry(tmp_path, RegistrySettings(database_url=shared_url)):
            pass


async def test_a_folder_of_sqlite_is_not_shared_and_the_other_way_round(tmp_path: Path, open_one: Opener) -> None:
    sqlite = RegistrySettings()
    async with open_one():
        with pytest.raises(ConfigError, match="another registry"):
            async with open_registry(tmp_path / "data", sqlite):
                pass


async def test_a_restored_copy_ends_watches_also_while_registries_serve(
    two: tuple[Registry, Registry], postgres: PostgresServer, shared_url: str
) -> None:
    """The database goes back two changes under running registries, and on to other changes with the same numbers."""
    first, second = two
    for name in "abcd":
        await create_model(first, name)
    database = name_of(shared_url)
    async with aclosing(first.feed.watch(0, None)) as events, aclosing(second.feed.watch(0, None)) as others:
        for watching in (events, others):
            assert [(await anext(watching)).revision for _ in range(5)] == [1, 2, 3, 4, 4]
        postgres.execute("UPDATE log_head SET revision = 2", database)
        postgres.execute("DELETE FROM changes WHERE revision > 2", database)
        postgres.execute("DELETE FROM models WHERE revision > 2", database)
        # Beyond the head: what its giver saw is gone.
        with pytest.raises(RevisionLost):
            await _revisions(second, 6, 6)
        for name in "xyz":
            await create_model(second, name)
        for watching in (events, others):
            with pytest.raises(RevisionLost) as lost:
                await _end(watching)
            assert lost.value.reason == "REVISION_LOST"
    for registry in two:
        assert await _revisions(registry, 0, 5) == [1, 2, 3, 4, 5]


class Databases:
    """A Database on a backend, without all else."""

    def __init__(self, url: str, pools: Executors) -> None:
        self.backend: Backend = PostgresBackend(parse_url(url))
        self.doubts = 0
        self.database = Database(
            self.backend,
            writer=pools["writer"],
            readers=pools["readers"],
            clock=utc_now,
            changes_kept=10,
            on_commit=lambda _changes: None,
            on_doubt=self._doubt,
        )

    def _doubt(self) -> None:
        self.doubts += 1


@pytest.fixture
async def bare(shared_url: str) -> AsyncIterator[Databases]:
    async with Executors({"writer": 1, "readers": 2}) as pools:
        opened = Databases(shared_url, pools)
        yield opened
        opened.database.close()


def _fail(connection: sa.Connection, state: str) -> None:
    connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'told to' USING ERRCODE = '{state}'; END $$")


@pytest.mark.parametrize("state", ["40001", "40P01"])
async def test_what_the_database_undid_is_done_again(bare: Databases, state: str) -> None:
    tries = 0

    def transact(write: Write) -> int:
        nonlocal tries
        tries += 1
        revision = write.next_revision()
        if tries < 3:
            _fail(write.connection, state)
        return revision

    assert await bare.database.write(transact) == 1
    assert tries == 3


async def test_doing_it_again_has_a_bound(bare: Databases) -> None:
    tries = 0

    def transact(write: Write) -> None:
        nonlocal tries
        tries += 1
        _fail(write.connection, "40001")

    with pytest.raises(NotReady) as refused:
        await bare.database.write(transact)
    assert (refused.value.reason, tries) == ("STORAGE_UNAVAILABLE", ATTEMPTS_MAX)


@pytest.mark.parametrize("state", ["08006", "25006", "53300", "55P03", "57P01", "57P03"])
async def test_states_of_a_database_that_is_away(bare: Databases, state: str) -> None:
    with pytest.raises(NotReady) as refused:
        await bare.database.write(lambda write: _fail(write.connection, state))
    assert refused.value.reason == "STORAGE_UNAVAILABLE"


async def test_a_bug_is_no_outage(bare: Databases) -> None:
    with pytest.raises(sa.exc.DBAPIError):
        await bare.database.write(lambda write: _fail(write.connection, "22012"))


async def test_what_one_reads_is_of_one_moment(bare: Databases, two: tuple[Registry, Registry]) -> None:
    loop = asyncio.get_running_loop()

    def transact(connection: sa.Connection) -> tuple[int, int]:
        query = sa.text("SELECT count(*) FROM models")
        before = connection.execute(query).scalar_one()
        asyncio.run_coroutine_threadsafe(create_model(two[0]), loop).result(10)
        return before, connection.execute(query).scalar_one()

    assert await bare.database.read(transact) == (0, 0)
    assert await bare.database.read(lambda connection: connection.execute(sa.text("SELECT 1")).scalar_one()) == 1


async def test_stale_connections_are_made_again_unnoticed(
    bare: Databases, postgres: PostgresServer, shared_url: str
) -> None:
    for _ in range(2):
        assert await bare.database.read(lambda connection: connection.execute(sa.text("SELECT 1")).scalar_one()) == 1
        assert await bare.database.write(lambda write: write.now) is not None
        assert postgres.disconnect(name_of(shared_url)) == 2


async def test_a_lost_connection_is_told_and_not_done_twice(bare: Databases, postgres: PostgresServer) -> None:
    def transact(write: Write) -> None:
        write.next_revision()
        pid = write.connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        postgres.execute(f"SELECT pg_terminate_backend({pid}, 5000)")
        write.next_revision()

    with pytest.raises(NotReady):
        await bare.database.write(transact)
    assert await bare.database.write(lambda write: write.next_revision()) == 1


async def test_a_server_that_became_read_only_is_left(
    bare: Databases, postgres: PostgresServer, shared_url: str
) -> None:
    """As a failover does it: the old connection goes to a server that no longer takes writes."""
    database = name_of(shared_url)
    postgres.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    with pytest.raises(NotReady):
        await bare.database.write(lambda write: write.next_revision())
    postgres.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")
    assert await bare.database.write(lambda write: write.next_revision()) == 1


async def test_a_writer_that_stands_still_holds_the_others_up_for_a_bounded_time(
    bare: Databases, open_one: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgresql._SESSION, "idle_in_transaction_session_timeout", "300ms")
    holds, go_on = threading.Event(), threading.Event()

    def stand_still(write: Write) -> None:
        write.next_revision()
        holds.set()
        go_on.wait(20)
        write.next_revision()

    async with open_one() as other:
        still = asyncio.ensure_future(bare.database.write(stand_still))
        await asyncio.to_thread(holds.wait, 10)
        async with asyncio.timeout(30):
            assert (await create_model(other)).revision == 1
        go_on.set()
        with pytest.raises(NotReady):
            await still


async def test_blobs_and_uploads_are_of_all(two: tuple[Registry, Registry]) -> None:
    first, second = two
    digest = await put(first, b"bytes")
    await create_model(second)
    await publish(second, digest)
    assert (await first.store.get_version(number(1))).content.artifacts[0].size_bytes == 5
