"""Stages, deletion and return, in a real database; and that watchers are told the same story."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mlmesh_registry.events import Change, DeletedModel, DeletedVersion
from mlmesh_registry.registry import Registry
from mlmesh_registry.search import Asked
from mlmesh_registry.versions import Alias, Model, Version
from mlmesh_runtime.errors import AlreadyExists, Conflict, MeshError, NotFound, WrongState
from tests.support.registry import alias, create_model, number, publish, put

DAY = 86_400
OPERATOR = "spiffe://cluster.local/ns/mlmesh/sa/operator"


@pytest.fixture
async def blob(registry: Registry) -> str:
    await create_model(registry)
    return await put(registry, b"bytes")


async def changes(registry: Registry, after: int = 0) -> Sequence[Change]:
    found, _ = await registry.store.changes_after(after, model_id=None, limit=1000)
    return found


async def state(registry: Registry) -> Sequence[Change]:
    """What a new watcher is told."""
    head = await registry.store.head()
    return await registry.store.present_state(None, after=0, upto=head, limit=1000)


def refused(kind: type[MeshError], reason: str) -> Any:
    return pytest.raises(kind, check=lambda error: error.reason == reason)


async def test_a_stage_moves_by_compare_and_set(registry: Registry, blob: str, clock: Any) -> None:
    version = await publish(registry, blob)
    assert (version.stage, version.etag) == ("ACTIVE", f"r{version.revision}")
    clock.advance(5)
    store = registry.store
    deprecated = await store.set_stage(number(1), "DEPRECATED", reason="slow", etag=version.etag, actor=OPERATOR)
    assert (deprecated.stage, deprecated.stage_reason) == ("DEPRECATED", "slow")
    assert deprecated.etag != version.etag
    assert (deprecated.revision, deprecated.digest) == (version.revision, version.digest)
    with refused(Conflict, "ETAG_MISMATCH"):
        await store.set_stage(number(1), "ACTIVE", reason="", etag=version.etag, actor="")
    # To where it is already: nothing changes, nobody is told.
    again = await store.set_stage(number(1), "DEPRECATED", reason="slow", etag="", actor="")
    assert again == deprecated == await store.get_version(number(1))
    assert [(change.subject, change.actor) for change in await changes(registry, version.revision)] == [
        (deprecated, OPERATOR)
    ]
    told = [change for change in await state(registry) if isinstance(change.subject, Version)]
    assert [(change.revision, change.time, change.actor) for change in told] == [
        (deprecated.meta_revision, clock.now, OPERATOR)
    ]


async def test_no_alias_moves_to_a_quarantined_version(registry: Registry, blob: str) -> None:
    for _ in range(2):
        await publish(registry, blob)
    store = registry.store
    stable = await store.set_alias(alias("stable"), number(1), etag="", actor="")
    for count in (1, 2):
        await store.set_stage(number(count), "QUARANTINED", reason="biased", etag="", actor="")
    with refused(WrongState, "VERSION_QUARANTINED") as error:
        await store.set_alias(alias("stable"), number(2), etag=stable.etag, actor="")
    assert "biased" in error.value.message
    with refused(WrongState, "VERSION_QUARANTINED"):
        await store.set_alias(alias("canary"), number(2), etag="", actor="")
    # Where it points already it stays, and can be taken away.
    assert await store.set_alias(alias("stable"), number(1), etag=stable.etag, actor="") == stable
    await store.set_stage(number(2), "ACTIVE", reason="", etag="", actor="")
    assert (await store.set_alias(alias("stable"), number(2), etag=stable.etag, actor="")).version == 2


async def test_corrupt_bytes_quarantine_every_version_that_uses_them(registry: Registry, blob: str) -> None:
    other = await put(registry, b"other")
    await create_model(registry, "n")
    first, second = await publish(registry, blob), await publish(registry, blob, "n")
    untouched = await publish(registry, other)
    gone = await publish(registry, blob, "n")
    await registry.store.delete_version(number(2, "n"), etag="", actor="")
    head = await registry.store.head()
    found = await registry.store.quarantine_blob(blob, "its bytes changed")
    assert [version.name for version in found] == [first.name, second.name, gone.name]
    assert {(version.stage, version.stage_reason) for version in found} == {("QUARANTINED", "its bytes changed")}
    told = await changes(registry, head)
    assert [change.actor for change in told] == ["registry"] * 3
    assert [change.subject for change in told[:2]] == list(found[:2])
    # To those who follow, what is deleted stays deleted.
    assert isinstance(told[2].subject, DeletedVersion)
    assert await registry.store.get_version(number(2)) == untouched
    assert await registry.store.quarantine_blob(blob, "again") == []
    assert await registry.store.head() == told[-1].revision
    entries, _ = await registry.store.list_audit(from_sequence=0, resource="", actor="registry", size=0, token="")
    assert [(entry.method, entry.resource) for entry in entries] == [("Quarantine", version.name) for version in found]


async def test_quarantine_for_bytes_is_lifted_after_a_verification(
    registry: Registry, blob: str, clock: Any, tmp_path: Path
) -> None:
    version = await publish(registry, blob)
    path = next(path for path in (tmp_path / "data" / "blobs").rglob("*") if path.is_file())
    path.write_bytes(b"BYTES")
    found = await registry.verification.verify(number(1), actor=OPERATOR)
    assert (found.corrupt_paths, found.version.stage) == (("model.onnx",), "QUARANTINED")
    assert found.version.verify_time is None
    for stage in ("ACTIVE", "DEPRECATED"):
        with refused(WrongState, "VERSION_QUARANTINED"):
            await registry.store.set_stage(number(1), stage, reason="", etag="", actor="")  # type: ignore[arg-type]
    path.write_bytes(b"bytes")
    clock.advance(1)
    found = await registry.verification.verify(number(1), actor=OPERATOR)
    # The verification lifts nothing; it allows that a person does.
    assert (found.corrupt_paths, found.version.stage) == ((), "QUARANTINED")
    assert (found.verified_bytes, found.version.verify_time) == (5, clock.now)
    active = await registry.store.set_stage(number(1), "ACTIVE", reason="restored", etag="", actor=OPERATOR)
    assert (active.stage, active.corrupt_time, active.digest) == ("ACTIVE", None, version.digest)


async def test_a_verification_does_not_clear_what_was_found_after_it_began(
    registry: Registry, blob: str, clock: Any
) -> None:
    await publish(registry, blob)
    began = clock.now
    clock.advance(1)
    await registry.store.quarantine_blob(blob, "later")
    after = await registry.store.record_verified(number(1), began=began, actor="")
    assert after.corrupt_time == clock.now


async def test_a_quarantine_by_a_person_needs_no_verification_until_bytes_are_found_corrupt(
    registry: Registry, blob: str
) -> None:
    await publish(registry, blob)
    await registry.store.set_stage(number(1), "QUARANTINED", reason="biased", etag="", actor="")
    head = await registry.store.head()
    (marked,) = await registry.store.quarantine_blob(blob, "its bytes changed")
    assert (marked.stage_reason, await registry.store.head()) == ("biased", head)
    with refused(WrongState, "VERSION_QUARANTINED"):
        await registry.store.set_stage(number(1), "ACTIVE", reason="", etag="", actor="")


async def test_a_deleted_version_is_read_but_not_listed_and_comes_back(
    registry: Registry, blob: str, clock: Any
) -> None:
    first, second = await publish(registry, blob), await publish(registry, blob)
    store = registry.store
    moved = await store.set_alias(alias("stable"), number(1), etag="", actor="")
    with refused(WrongState, "VERSION_IN_USE") as used:
        await store.delete_version(number(1), etag="", actor="")
    assert "models/m/aliases/stable" in used.value.message
    await store.delete_alias(alias("stable"), etag=moved.etag, actor="")
    with refused(Conflict, "ETAG_MISMATCH"):
        await store.delete_version(number(1), etag="r999", actor="")
    gone = await store.delete_version(number(1), etag=first.etag, actor=OPERATOR)
    assert gone.delete_time == clock.now
    assert gone.purge_time is not None
    assert (gone.purge_time - clock.now).days == 30
    assert await store.get_version(number(1)) == gone
    assert await store.delete_version(number(1), etag="", actor="") == gone
    listed, _ = await registry.search.list_versions("m", Asked())
    assert list(listed) == [second]
    listed, _ = await registry.search.list_versions("m", Asked(show_deleted=True))
    assert list(listed) == [second, gone]
    assert [change.subject for change in await state(registry) if isinstance(change.subject, Version)] == [second]
    last = (await changes(registry))[-1]
    assert isinstance(last.subject, DeletedVersion)
    assert (last.subject.number, last.subject.digest, last.actor) == (1, first.digest, OPERATOR)
    for refusing in (
        store.set_alias(alias("stable"), number(1), etag="", actor=""),
        store.set_stage(number(1), "DEPRECATED", reason="", etag="", actor=""),
    ):
        with refused(WrongState, "VERSION_DELETED"):
            await refusing
    back = await store.undelete_version(number(1), actor="")
    assert (back.delete_time, back.purge_time, back.digest) == (None, None, first.digest)
    assert await store.undelete_version(number(1), actor="") == back
    assert (await changes(registry))[-1].subject == back
    assert await store.get_version(number(1)) == back
    await store.delete_version(number(1), etag="", actor="")
    clock.advance(30 * DAY)
    with refused(NotFound, "MODEL_VERSION_NOT_FOUND"):
        await store.undelete_version(number(1), actor="")


async def test_a_model_takes_its_versions_along_and_brings_them_back(registry: Registry, blob: str, clock: Any) -> None:
    store = registry.store
    for _ in range(3):
        await publish(registry, blob)
    await store.delete_version(number(2), etag="", actor="")
    clock.advance(60)
    model = await store.get_model("m")
    with refused(WrongState, "MODEL_NOT_EMPTY"):
        await store.delete_model("m", etag="", force=False, actor="")
    moved = await store.set_alias(alias("stable"), number(1), etag="", actor="")
    with refused(WrongState, "MODEL_NOT_EMPTY"):
        await store.delete_model("m", etag="", force=True, actor="")
    await store.delete_alias(alias("stable"), etag=moved.etag, actor="")
    with refused(Conflict, "ETAG_MISMATCH"):
        await store.delete_model("m", etag="r999", force=True, actor="")
    head = await store.head()
    gone = await store.delete_model("m", etag=model.etag, force=True, actor=OPERATOR)
    told = [change.subject for change in await changes(registry, head)]
    # Its versions are announced before it.
    assert [each.number for each in told if isinstance(each, DeletedVersion)] == [1, 3]
    assert told[-1] == DeletedModel(model=gone)
    assert await state(registry) == []
    assert await store.get_model("m") == gone
    assert (await registry.search.list_models(Asked()))[0] == []
    assert (await registry.search.list_versions("m", Asked()))[0] == []
    assert (await store.get_version(number(3))).delete_time == clock.now
    with refused(AlreadyExists, "MODEL_EXISTS"):
        await create_model(registry)
    for refusing in (
        publish(registry, blob),
        store.update_model("m", description="x", labels={}, etag=gone.etag, actor=""),
        store.set_alias(alias("stable"), number(1), etag="", actor=""),
        store.set_stage(number(1), "DEPRECATED", reason="", etag="", actor=""),
        store.undelete_version(number(2), actor=""),
    ):
        with refused(WrongState, "MODEL_DELETED"):
            await refusing
    assert await store.delete_model("m", etag="", force=False, actor="") == gone
    head = await store.head()
    back = await store.undelete_model("m", actor="")
    told = [change.subject for change in await changes(registry, head)]
    assert told[0] == back
    # Not the one that had been deleted before.
    assert [each.number for each in told if isinstance(each, Version)] == [1, 3]
    assert (await store.get_version(number(2))).delete_time is not None
    assert await store.undelete_model("m", actor="") == back
    assert (await publish(registry, blob)).number == 4
    await store.delete_model("m", etag="", force=True, actor="")
    clock.advance(30 * DAY)
    with refused(NotFound, "MODEL_NOT_FOUND"):
        await store.undelete_model("m", actor="")


async def test_the_first_answer_is_repeated_whatever_became_of_the_version(registry: Registry, blob: str) -> None:
    first = await publish(registry, blob, request_id="r")
    await registry.store.set_stage(number(1), "QUARANTINED", reason="x", etag="", actor="")
    await registry.store.delete_version(number(1), etag="", actor="")
    assert await publish(registry, blob, request_id="r") == first


async def test_following_the_log_ends_where_the_present_state_is(registry: Registry, blob: str, clock: Any) -> None:
    """Whoever applies every change knows what a new watcher is told, whatever happened."""
    store = registry.store
    await create_model(registry, "n")

    async def story(model_id: str, seed: int) -> None:
        for step in range(6):
            with_alias = alias("stable", model_id)
            version = (await publish(registry, blob, model_id)).number
            name = number(version, model_id)
            if step % 3 == seed:
                await store.delete_version(name, etag="", actor="")
                if step % 2:
                    await store.undelete_version(name, actor="")
            elif step % 3 == (seed + 1) % 3:
                await store.set_stage(name, "DEPRECATED", reason="", etag="", actor="")
                found, _ = await store.list_aliases(model_id, size=1, token="")
                await store.set_alias(with_alias, name, etag=found[0].etag if found else "", actor="")
        found, _ = await store.list_aliases(model_id, size=1, token="")
        if seed:
            await store.delete_alias(with_alias, etag=found[0].etag, actor="")
            await store.delete_model(model_id, etag="", force=True, actor="")
            await store.undelete_model(model_id, actor="")

    await asyncio.gather(story("m", 0), story("n", 1))
    await store.quarantine_blob(blob, "at the end")
    followed: dict[object, Model | Version | Alias] = {}
    everything = await changes(registry)
    assert [change.revision for change in everything] == list(range(1, len(everything) + 1))
    for change in everything:
        match change.subject:
            case Model() | Version() | Alias() as subject:
                followed[subject.name] = subject
            case DeletedVersion() as subject:
                followed.pop(str(number(subject.number, subject.model)), None)
            case DeletedModel() as subject:
                followed.pop(subject.model.name, None)
            case subject:
                followed.pop(str(alias(subject.alias, subject.model)), None)
    told = {subject.name: subject for subject in (change.subject for change in await state(registry))}  # type: ignore[union-attr]
    assert set(followed) == set(told)
    for name, subject in followed.items():
        now = told[name]
        if isinstance(now, Version) and isinstance(subject, Version):
            assert (now.stage, now.meta_revision, now.digest) == (subject.stage, subject.meta_revision, subject.digest)
        elif isinstance(now, Alias):
            assert now == subject
