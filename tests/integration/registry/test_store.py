"""Models, versions and aliases in a real database."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from mlmesh_registry import tables
from mlmesh_registry.postgresql import PostgresBackend, parse_url
from mlmesh_registry.registry import Registry
from mlmesh_registry.search import Asked
from mlmesh_registry.sqlite import SqliteBackend
from mlmesh_registry.versions import Artifact, Content
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.errors import AlreadyExists, Conflict, InvalidInput, MeshError, NotFound, WrongState
from tests.support.registry import alias, create_model, number, publish, put

Opener = Callable[..., AbstractAsyncContextManager[Registry]]


@pytest.fixture
async def blob(registry: Registry) -> str:
    return await put(registry, b"bytes")


async def test_a_repeated_request_gets_the_first_answer(registry: Registry, clock: Any) -> None:
    create = registry.store.create_model
    first = await create("m", description="d", labels={"a": "b"}, request_id="1", actor="x")
    clock.advance(5)
    await registry.store.update_model("m", description="other", labels={}, etag=first.etag, actor="x")
    assert await create("m", description="d", labels={"a": "b"}, request_id="1", actor="x") == first
    with pytest.raises(AlreadyExists) as reused:
        await create("m2", description="d", labels={"a": "b"}, request_id="1", actor="x")
    assert reused.value.reason == "REQUEST_ID_REUSED"
    # Another caller's ids are another caller's.
    with pytest.raises(AlreadyExists) as taken:
        await create("m", description="d", labels={"a": "b"}, request_id="1", actor="y")
    assert taken.value.reason == "MODEL_EXISTS"


async def test_concurrent_repeats_of_a_publish_make_one_version(registry: Registry, blob: str) -> None:
    await create_model(registry)
    answers = await asyncio.gather(*(publish(registry, blob, request_id="same") for _ in range(10)))
    assert {answer.number for answer in answers} == {1}
    assert (await registry.store.get_model("m")).latest_version == 1


async def test_first_answers_are_kept_for_their_time(registry: Registry, clock: Any, blob: str) -> None:
    await create_model(registry)
    await publish(registry, blob, request_id="r")
    clock.advance(100)
    await registry.store.forget_requests(keep_s=101)
    assert (await publish(registry, blob, request_id="r")).number == 1
    await registry.store.forget_requests(keep_s=99)
    assert (await publish(registry, blob, request_id="r")).number == 2


async def test_versions_count_up_and_carry_sizes_and_digest(registry: Registry, blob: str) -> None:
    await create_model(registry)
    versions = await asyncio.gather(*(publish(registry, blob) for _ in range(5)))
    assert sorted(version.number for version in versions) == [1, 2, 3, 4, 5]
    assert {version.digest for version in versions} == {versions[0].digest}
    assert versions[0].content.artifacts[0].size_bytes == 5
    for version in versions:
        assert await registry.store.get_version(number(version.number)) == version


async def test_a_version_needs_all_its_blobs(registry: Registry, blob: str) -> None:
    await create_model(registry)
    content = Content(artifacts=(Artifact(path="a", sha256=blob), Artifact(path="b", sha256="ab" * 32)))
    with pytest.raises(WrongState) as refused:
        await registry.store.create_version("m", content, request_id="r", actor="")
    assert refused.value.reason == "BLOB_NOT_FOUND"
    assert refused.value.metadata["blob"] == "blobs/sha256-" + "ab" * 32
    # Nothing of it was stored, not even the request.
    assert (await publish(registry, blob, request_id="r")).number == 1


async def test_update_is_compare_and_set(registry: Registry) -> None:
    model = await create_model(registry)
    update = registry.store.update_model
    changed = await update("m", description="new", labels={}, etag=model.etag, actor="")
    assert changed.description == "new"
    assert changed.etag != model.etag
    with pytest.raises(Conflict) as lost:
        await update("m", description="newer", labels={}, etag=model.etag, actor="")
    assert lost.value.reason == "ETAG_MISMATCH"
    labelled = await update("m", description=None, labels={"a": "b"}, etag=changed.etag, actor="")
    assert (labelled.description, dict(labelled.labels)) == ("new", {"a": "b"})
    assert await update("m", description="new", labels={"a": "b"}, etag=labelled.etag, actor="") == labelled


async def test_an_alias_moves_by_compare_and_set(registry: Registry, blob: str) -> None:
    await create_model(registry)
    for _ in range(3):
        await publish(registry, blob)
    move = registry.store.set_alias
    first = await move(alias("stable"), number(1), etag="", actor="spiffe://someone")
    assert first.updater == "spiffe://someone"
    for etag in ("", "r999"):
        with pytest.raises(Conflict):
            await move(alias("stable"), number(2), etag=etag, actor="")
    second = await move(alias("stable"), number(2), etag=first.etag, actor="")
    assert second.etag != first.etag
    assert await move(alias("stable"), number(2), etag=second.etag, actor="") == second
    assert (await registry.store.get_version(alias("stable"))).number == 2
    assert (await registry.store.get_version(number(2))).aliases == ("stable",)
    assert (await registry.store.get_version(number(1))).aliases == ()
    with pytest.raises(NotFound) as missing:
        await move(alias("stable"), number(9), etag=second.etag, actor="")
    assert missing.value.reason == "MODEL_VERSION_NOT_FOUND"


async def test_of_many_concurrent_moves_exactly_one_wins(registry: Registry, blob: str) -> None:
    await create_model(registry)
    for _ in range(2):
        await publish(registry, blob)
    before = await registry.store.set_alias(alias("stable"), number(1), etag="", actor="")
    moves = [registry.store.set_alias(alias("stable"), number(2), etag=before.etag, actor=str(n)) for n in range(8)]
    outcomes = await asyncio.gather(*moves, return_exceptions=True)
    won = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len(won) == 1
    assert all(isinstance(outcome, Conflict) for outcome in outcomes if outcome is not won[0])
    found, _ = await registry.store.list_aliases("m", size=0, token="")
    assert list(found) == won


async def test_a_deleted_alias_comes_back_with_another_etag(registry: Registry, blob: str) -> None:
    await create_model(registry)
    await publish(registry, blob)
    first = await registry.store.set_alias(alias("stable"), number(1), etag="", actor="")
    with pytest.raises(Conflict):
        await registry.store.delete_alias(alias("stable"), etag="r999", actor="")
    await registry.store.delete_alias(alias("stable"), etag=first.etag, actor="")
    with pytest.raises(NotFound) as gone:
        await registry.store.delete_alias(alias("stable"), etag=first.etag, actor="")
    assert gone.value.reason == "MODEL_ALIAS_NOT_FOUND"
    with pytest.raises(Conflict):
        await registry.store.set_alias(alias("stable"), number(1), etag=first.etag, actor="")
    again = await registry.store.set_alias(alias("stable"), number(1), etag="", actor="")
    assert again.etag != first.etag


async def test_what_is_not_there_says_which_part(registry: Registry, blob: str) -> None:
    store = registry.store
    for missing in (
        store.get_model("m"),
        store.get_version(number(1)),
        registry.search.list_versions("m", Asked()),
        store.list_aliases("m", size=0, token=""),
        store.set_alias(alias("a"), number(1), etag="", actor=""),
        store.delete_alias(alias("a"), etag="x", actor=""),
        publish(registry, blob),
    ):
        with pytest.raises(NotFound) as refused:
            await missing
        assert refused.value.reason == "MODEL_NOT_FOUND"
    await create_model(registry)
    with pytest.raises(NotFound) as refused:
        await store.get_version(number(1))
    assert refused.value.reason == "MODEL_VERSION_NOT_FOUND"
    with pytest.raises(NotFound) as refused:
        await store.get_version(alias("stable"))
    assert refused.value.reason == "MODEL_ALIAS_NOT_FOUND"
    with pytest.raises(InvalidInput):
        await store.set_alias(alias("a"), number(1, "other"), etag="", actor="")


async def test_pages_are_whole_and_stay_so_while_things_are_added(registry: Registry, blob: str) -> None:
    for name in "abc":
        await create_model(registry, name)
        for _ in range(4):
            version = await publish(registry, blob, name)
            await registry.store.set_alias(
                alias(f"v{version.number}", name), number(version.number, name), etag="", actor=""
            )
    seen: list[str] = []
    token, added = "", False
    while True:
        page, token = await registry.search.list_versions(None, Asked(size=5, token=token))
        seen += [version.name for version in page]
        if not added:
            added = True
            await publish(registry, blob, "a")
        if not token:
            break
    assert seen == [f"models/{name}/versions/{count}" for name in "cba" for count in (4, 3, 2, 1)]
    first, token = await registry.store.list_aliases(None, size=7, token="")
    rest, end = await registry.store.list_aliases(None, size=7, token=token)
    assert [each.name for each in (*first, *rest)] == [f"models/{n}/aliases/v{c}" for n in "abc" for c in range(1, 5)]
    assert end == ""
    models, token = await registry.search.list_models(Asked(size=2))
    assert [model.id for model in models] == ["a", "b"]
    models, token = await registry.search.list_models(Asked(size=2, token=token))
    assert ([model.id for model in models], token) == (["c"], "")


async def test_a_token_is_good_for_its_own_list_only(registry: Registry, blob: str) -> None:
    for name in "ab":
        await create_model(registry, name)
        for _ in range(2):
            await publish(registry, blob, name)
    _, token = await registry.search.list_versions("a", Asked(size=1))
    with pytest.raises(InvalidInput):
        await registry.search.list_versions("b", Asked(size=1, token=token))
    with pytest.raises(InvalidInput):
        await registry.search.list_models(Asked(size=1, token=token))


async def test_everything_is_there_after_a_restart(open_here: Opener) -> None:
    async with open_here() as registry:
        digest = await put(registry, b"bytes")
        model = await create_model(registry, request_id="1")
        version = await publish(registry, digest, request_id="2")
        moved = await registry.store.set_alias(alias("stable"), number(1), etag="", actor="")
    async with open_here() as registry:
        assert await create_model(registry, request_id="1") == model
        assert await publish(registry, digest, request_id="2") == version
        assert (await registry.store.list_aliases(None, size=0, token=""))[0] == [moved]
        assert await registry.store.head() == 3


async def test_a_failed_transaction_leaves_no_hole_in_the_log(registry: Registry) -> None:
    await create_model(registry)
    for _ in range(3):
        with pytest.raises(MeshError):
            await create_model(registry)
    second = await create_model(registry, "n")
    assert second.revision == 2


async def test_a_second_process_is_refused(open_here: Opener, database_url: str) -> None:
    if database_url:
        pytest.skip("registries that share PostgreSQL may share the folder; test_shared.py shows it")
    async with open_here():
        with pytest.raises(ConfigError, match="another registry"):
            async with open_here():
                pass
    async with open_here():
        pass


async def test_migrations_make_the_tables_of_the_code(open_here: Opener, tmp_path: Path, database_url: str) -> None:
    async with open_here():
        pass
    path = tmp_path / "data" / "registry.sqlite"
    backend = PostgresBackend(parse_url(database_url)) if database_url else SqliteBackend(path)
    engine = backend.read_engine
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
        if not database_url:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()
