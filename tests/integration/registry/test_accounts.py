"""Quotas that are exact, and an audit log that tells everything in one chain."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
import sqlalchemy as sa

from mlmesh_registry import tables
from mlmesh_registry.audit import AuditEntry, broken_at
from mlmesh_registry.quotas import Limits
from mlmesh_registry.registry import Registry
from mlmesh_registry.versions import Artifact, Content
from mlmesh_runtime.errors import Conflict, InvalidInput, NotFound, Overloaded
from tests.support.registry import alias, create_model, number, publish, put, start

DAY = 86_400
OPERATOR = "spiffe://cluster.local/ns/mlmesh/sa/operator"


async def counted(registry: Registry, model_id: str | None) -> tuple[int, int, int]:
    quota = await registry.store.get_quota(model_id)
    return quota.bytes_used, quota.versions_used, quota.models_used


async def limit(registry: Registry, model_id: str | None, **limits: int) -> None:
    await registry.store.set_quota(model_id, Limits(**limits), etag="", actor="")


def exceeded(what: str) -> Any:
    def check(error: Overloaded) -> bool:
        return (error.reason, error.metadata["limit"], error.retry_after_s) == ("QUOTA_EXCEEDED", what, None)

    return pytest.raises(Overloaded, check=check)


async def entries(registry: Registry, **asked: Any) -> Sequence[AuditEntry]:
    everything = {"from_sequence": 0, "resource": "", "actor": "", "size": 1000, "token": "", **asked}
    return (await registry.store.list_audit(**everything))[0]


async def test_counts_follow_every_change(registry: Registry, clock: Any) -> None:
    await create_model(registry)
    await create_model(registry, "n")
    five, seven = await put(registry, b"5" * 5), await put(registry, b"7" * 7)
    assert await counted(registry, None) == (12, 0, 2)
    await publish(registry, five)
    both = Content(artifacts=(Artifact(path="a", sha256=five), Artifact(path="b", sha256=seven)))
    await registry.store.create_version("m", both, request_id="r", actor="")
    await registry.store.create_version("m", both, request_id="r", actor="")
    await publish(registry, seven, "n")
    assert await counted(registry, "m") == (12, 2, 0)
    assert await counted(registry, "n") == (7, 1, 0)
    assert await counted(registry, None) == (12, 3, 2)
    # What is deleted counts until it is purged.
    await registry.store.delete_version(number(2), etag="", actor="")
    assert await counted(registry, "m") == (12, 2, 0)
    clock.advance(30 * DAY)
    await registry.garbage.collect(grace=None, dry_run=False)
    assert await counted(registry, "m") == (5, 1, 0)
    assert await counted(registry, None) == (12, 2, 2)
    await registry.store.delete_model("n", etag="", force=True, actor="")
    clock.advance(30 * DAY)
    await registry.garbage.collect(grace=None, dry_run=False)
    clock.advance(7 * DAY)
    await registry.garbage.collect(grace=None, dry_run=False)
    assert await counted(registry, None) == (5, 1, 1)
    with pytest.raises(NotFound):
        await registry.store.get_quota("n")


async def test_a_quota_refuses_what_does_not_fit_and_nothing_else(registry: Registry) -> None:
    await limit(registry, None, models_max=1)
    await create_model(registry)
    with exceeded("models_max") as refused:
        await create_model(registry, "n")
    assert refused.value.metadata == {
        "quota": "models/-",
        "limit": "models_max",
        "max": "1",
        "used": "1",
        "wanted": "1",
    }
    small, large = await put(registry, b"5" * 5), await put(registry, b"7" * 7)
    await limit(registry, "m", bytes_max=11, versions_max=2)
    await publish(registry, small, request_id="first")
    with exceeded("bytes_max"):
        await publish(registry, large)
    # The same bytes again need no room.
    await publish(registry, small)
    with exceeded("versions_max"):
        await publish(registry, small)
    # What was answered before is answered again.
    assert (await publish(registry, small, request_id="first")).number == 1
    assert await counted(registry, "m") == (5, 2, 0)
    await limit(registry, "m")
    await limit(registry, None, versions_max=2)
    with exceeded("versions_max"):
        await publish(registry, large)
    await limit(registry, None)
    assert (await publish(registry, large)).number == 3
    # A limit below what is there: it stays, nothing more comes.
    await limit(registry, "m", bytes_max=1)
    assert await counted(registry, "m") == (12, 3, 0)
    assert (await publish(registry, small)).number == 4


async def test_uploads_are_let_in_as_far_as_there_is_room_for_all_of_them(registry: Registry) -> None:
    await limit(registry, None, bytes_max=20)
    await put(registry, b"5" * 5)
    await start(registry, b"1" * 10)
    with exceeded("bytes_max"):
        await start(registry, b"2" * 6)
    assert await start(registry, b"3" * 5)
    # What is here already needs no room.
    assert await registry.artifacts.start(await put(registry, b""), 0, request_id="", actor="")
    assert (await counted(registry, None))[0] == 5


async def test_of_concurrent_publishers_as_many_get_in_as_there_is_room_for(registry: Registry) -> None:
    await create_model(registry)
    digest = await put(registry, b"bytes")
    await limit(registry, "m", versions_max=3)
    outcomes = await asyncio.gather(*(publish(registry, digest) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 5
    assert await counted(registry, "m") == (5, 3, 0)


async def test_limits_are_set_by_compare_and_set(registry: Registry) -> None:
    await create_model(registry)
    store = registry.store
    before = await store.get_quota("m")
    after = await store.set_quota("m", Limits(bytes_max=10), etag=before.etag, actor=OPERATOR)
    assert (after.limits.bytes_max, after.name) == (10, "models/m")
    assert after.etag != before.etag
    assert await store.get_quota("m") == after
    with pytest.raises(Conflict):
        await store.set_quota("m", Limits(bytes_max=11), etag=before.etag, actor=OPERATOR)
    assert await store.set_quota("m", Limits(bytes_max=10), etag="", actor=OPERATOR) == after
    for limits, model_id in (
        (Limits(models_max=1), "m"),
        (Limits(bytes_max=-1), None),
        (Limits(versions_max=2**63), "m"),
    ):
        with pytest.raises(InvalidInput):
            await store.set_quota(model_id, limits, etag="", actor="")
    with pytest.raises(NotFound):
        await store.set_quota("none", Limits(), etag="", actor="")


async def test_every_change_is_told_once_in_one_chain(registry: Registry, clock: Any) -> None:
    store = registry.store
    model = await store.create_model("m", description="d", labels={}, request_id="r", actor=OPERATOR)
    await store.create_model("m", description="d", labels={}, request_id="r", actor=OPERATOR)
    digest = await put(registry, b"bytes")
    await publish(registry, digest)
    await store.update_model("m", description="x", labels={}, etag=model.etag, actor=OPERATOR)
    moved = await store.set_alias(alias("stable"), number(1), etag="", actor=OPERATOR, reason="first")
    await store.set_alias(alias("stable"), number(1), etag=moved.etag, actor=OPERATOR)
    await store.delete_alias(alias("stable"), etag=moved.etag, actor=OPERATOR)
    await store.set_stage(number(1), "DEPRECATED", reason="slow", etag="", actor=OPERATOR)
    await registry.verification.verify(number(1), actor=OPERATOR)
    await store.set_quota("m", Limits(versions_max=5), etag="", actor=OPERATOR)
    await store.delete_version(number(1), etag="", actor=OPERATOR)
    await store.undelete_version(number(1), actor=OPERATOR)
    await store.delete_model("m", etag="", force=True, actor=OPERATOR)
    await store.undelete_model("m", actor=OPERATOR)
    with pytest.raises(Conflict):
        await store.delete_model("m", etag="r0", force=True, actor=OPERATOR)
    found = await entries(registry)
    assert broken_at(found) is None
    assert [
        (entry.sequence, entry.method) for entry in found if entry.method not in ("StartUpload", "FinishUpload")
    ] == [
        (count, method)
        for count, method in (
            (1, "CreateModel"),
            (4, "CreateModelVersion"),
            (5, "UpdateModel"),
            (6, "SetModelAlias"),
            (7, "DeleteModelAlias"),
            (8, "SetModelVersionStage"),
            (9, "VerifyModelVersion"),
            (10, "SetQuota"),
            (11, "DeleteModelVersion"),
            (12, "UndeleteModelVersion"),
            (13, "DeleteModel"),
            (14, "UndeleteModel"),
        )
    ]
    move = found[5]
    assert (move.actor, move.resource, move.time) == (OPERATOR, "models/m/aliases/stable", clock.now)
    assert move.detail == (
        f'{{"from":"","gates":[],"reason":"first","revision":{moved.revision},"to":"models/m/versions/1"}}'
    )


async def test_the_log_is_read_by_resource_by_actor_and_in_pages(registry: Registry) -> None:
    digest = await put(registry, b"bytes")
    for name in ("m", "mm", "m-n"):
        await registry.store.create_model(name, description="", labels={}, request_id="", actor=f"spiffe://{name}")
        await publish(registry, digest, name)
    mine = await entries(registry, resource="models/m")
    assert [(entry.method, entry.resource) for entry in mine] == [
        ("CreateModel", "models/m"),
        ("CreateModelVersion", "models/m/versions/1"),
    ]
    assert await entries(registry, resource="models/m/versions/1/") == mine[1:]
    assert await entries(registry, resource="models/m", actor="spiffe://m") == mine[:1]
    assert len(await entries(registry, resource="models")) == 6
    assert await entries(registry, resource="models/%") == []
    everything = await entries(registry)
    assert await entries(registry, from_sequence=4) == everything[3:]
    seen: list[AuditEntry] = []
    token = ""
    while True:
        page, token = await registry.store.list_audit(from_sequence=2, resource="", actor="", size=3, token=token)
        assert broken_at(page, after=seen[-1] if seen else everything[0]) is None
        seen += page
        if not token:
            break
    assert seen == list(everything[1:])
    _, token = await registry.store.list_audit(from_sequence=0, resource="", actor="", size=1, token="")
    with pytest.raises(InvalidInput):
        await registry.store.list_audit(from_sequence=0, resource="models/m", actor="", size=1, token=token)


async def test_concurrent_writers_make_one_chain(registry: Registry) -> None:
    names = [f"m{count}" for count in range(20)]
    await asyncio.gather(*(create_model(registry, name) for name in names))
    found = await entries(registry)
    assert broken_at(found) is None
    assert sorted(entry.resource for entry in found) == sorted(f"models/{name}" for name in names)


@pytest.mark.parametrize("field", ["actor", "detail", "resource", "method", "time"])
async def test_tampering_with_a_row_is_found(registry: Registry, field: str) -> None:
    for count in range(4):
        await create_model(registry, f"m{count}")
    table = tables.audit_entries
    values = {field: 1 if field == "time" else "{}"}
    tampered = table.update().where(table.c.sequence == 2).values(**values)
    await registry.store._database.write(lambda write: write.connection.execute(tampered).close())
    assert broken_at(await entries(registry)) == 2


async def test_entries_cut_off_the_end_are_noticed_by_the_next(registry: Registry) -> None:
    for count in range(4):
        await create_model(registry, f"m{count}")
    table = tables.audit_entries
    cut = sa.delete(table).where(table.c.sequence == 4)
    await registry.store._database.write(lambda write: write.connection.execute(cut).close())
    assert broken_at(await entries(registry)) is None
    await create_model(registry, "m4")
    assert broken_at(await entries(registry)) == 4
