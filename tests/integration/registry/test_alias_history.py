"""Gates in the way of an alias, and the history that its moves leave, in a real database."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytest

from mlmesh_registry.conditions import (
    DigestVerified,
    Gate,
    HeldAlias,
    MetricBounds,
    MetricNoWorse,
    SignatureCompatible,
    Signed,
)
from mlmesh_registry.registry import Registry
from mlmesh_registry.store import SqlModelStore
from mlmesh_registry.versions import Artifact, Content, Version
from mlmesh_runtime.errors import Conflict, InvalidInput, NotFound, WrongState
from tests.support.registry import alias, create_model, number, publish, put

OPERATOR = "spiffe://cluster.local/ns/mlmesh/sa/operator"


@pytest.fixture
async def blob(registry: Registry) -> str:
    return await put(registry, b"bytes")


async def gated(registry: Registry, *gates: Gate) -> None:
    await registry.store.create_model("m", description="", labels={}, request_id="", actor="", gates=gates)


async def published(registry: Registry, blob: str, metrics: Mapping[str, float]) -> Version:
    content = Content(artifacts=(Artifact(path="model.onnx", sha256=blob),), metrics=metrics)
    return await registry.store.create_version("m", content, request_id="", actor="")


async def test_a_refused_move_changes_nothing_and_says_which_gates_and_why(registry: Registry, blob: str) -> None:
    await gated(
        registry,
        Gate(id="accurate", aliases=("stable",), condition=MetricBounds(metric="accuracy", min_value=0.9)),
        Gate(id="verified", aliases=("stable",), condition=DigestVerified()),
        Gate(id="callable", condition=SignatureCompatible()),
    )
    await published(registry, blob, {"accuracy": 0.8})
    store, before = registry.store, await registry.store.head()
    with pytest.raises(WrongState) as refused:
        await store.set_alias(alias("stable"), number(1), etag="", actor=OPERATOR)
    assert refused.value.reason == "GATE_REFUSED"
    assert dict(refused.value.metadata) == {
        "accurate": "accuracy is 0.8, at least 0.9 is wanted",
        "verified": "its bytes were never verified",
    }
    assert "2 of 3 gates refuse" in refused.value.message
    assert await store.head() == before
    assert (await store.list_moves("m", None, size=0, token=""))[0] == []
    # The same, asked beforehand: an answer, not an error.
    asked = await store.move_alias(alias("stable"), number(1), etag="", actor=OPERATOR, validate_only=True)
    assert asked.alias is None
    assert [(result.gate, result.passed) for result in asked.results] == [
        ("accurate", False),
        ("verified", False),
        ("callable", True),
    ]
    # Other aliases are not guarded by those two.
    assert (await store.set_alias(alias("canary"), number(1), etag="", actor=OPERATOR)).version == 1
    await registry.verification.verify(number(1), actor="")
    await published(registry, blob, {"accuracy": 0.95})
    await registry.verification.verify(number(2), actor="")
    asked = await store.move_alias(alias("stable"), number(2), etag="", actor=OPERATOR, validate_only=True)
    assert asked.alias is not None
    assert (asked.alias.version, asked.alias.etag) == (2, "")
    with pytest.raises(NotFound):
        await store.get_version(alias("stable"))
    moved = await store.move_alias(alias("stable"), number(2), etag="", actor=OPERATOR, reason="it is better")
    assert all(result.passed for result in moved.results)
    (move,), _ = await store.list_moves("m", "stable", size=0, token="")
    assert (move.actor, move.reason, move.gate_results) == (OPERATOR, "it is better", moved.results)


async def test_a_promotion_is_judged_against_where_the_alias_points(registry: Registry, blob: str) -> None:
    condition = MetricNoWorse(metric="loss", lower_is_better=True, tolerance=0.01)
    await gated(registry, Gate(id="no-worse", condition=condition))
    for loss in (0.5, 0.52, 0.51):
        await published(registry, blob, {"loss": loss})
    store = registry.store
    first = await store.set_alias(alias("stable"), number(1), etag="", actor="")
    with pytest.raises(WrongState, match=r"loss is 0\.52, version 1 has 0\.5; worse by 0\.02, 0\.01 is allowed"):
        await store.set_alias(alias("stable"), number(2), etag=first.etag, actor="")
    second = await store.set_alias(alias("stable"), number(3), etag=first.etag, actor="")
    # What was refused is not worse than where the alias points now.
    assert (await store.set_alias(alias("stable"), number(2), etag=second.etag, actor="")).version == 2
    with pytest.raises(Conflict):
        await store.move_alias(alias("stable"), number(1), etag=first.etag, actor="", validate_only=True)


async def test_of_concurrent_promotions_none_slips_past_a_gate(registry: Registry, blob: str) -> None:
    """Gates are asked inside the move's transaction: a chain of moves never goes down."""
    await gated(registry, Gate(id="no-worse", condition=MetricNoWorse(metric="f1")))
    for value in range(8):
        await published(registry, blob, {"f1": value / 8})
    store = registry.store
    await store.set_alias(alias("stable"), number(1), etag="", actor="")

    async def promote(version: int) -> None:
        for _ in range(12):
            (now,), _ = await store.list_aliases("m", size=1, token="")
            try:
                await store.set_alias(alias("stable"), number(version), etag=now.etag, actor="")
            except Conflict:
                continue
            except WrongState:
                return
            return

    await asyncio.gather(*(promote(version) for version in range(1, 9)))
    moves, _ = await store.list_moves("m", "stable", size=0, token="")
    history = [move.to_version or 0 for move in reversed(moves)]
    assert history == sorted(history)
    assert history[-1] == 8


async def test_a_version_is_promoted_after_it_was_held_long_enough(registry: Registry, blob: str, clock: Any) -> None:
    hour = timedelta(hours=1)
    condition = HeldAlias(alias="canary", min_age=hour)
    await gated(registry, Gate(id="baked", aliases=("stable",), condition=condition))
    for _ in range(3):
        await published(registry, blob, {})
    store = registry.store

    async def may(version: int) -> tuple[bool, str]:
        asked = await store.move_alias(alias("stable"), number(version), etag="", actor="", validate_only=True)
        return asked.results[0].passed, asked.results[0].message

    assert await may(1) == (False, "alias canary does not point at it, and never did")
    canary = await store.set_alias(alias("canary"), number(1), etag="", actor="")
    clock.advance(3599)
    assert await may(1) == (False, "alias canary held it for 3599 s, at least 3600 s is wanted")
    clock.advance(1)
    assert (await may(1))[0]
    canary = await store.set_alias(alias("canary"), number(2), etag=canary.etag, actor="")
    clock.advance(100)
    # It was there for long enough, even though the canary went on.
    assert await may(1) == (True, "alias canary held it for 3600 s")
    assert not (await may(2))[0]
    # Two short stays are not a long one.
    canary = await store.set_alias(alias("canary"), number(3), etag=canary.etag, actor="")
    clock.advance(2000)
    canary = await store.set_alias(alias("canary"), number(2), etag=canary.etag, actor="")
    await store.delete_alias(alias("canary"), etag=canary.etag, actor="")
    clock.advance(9000)
    assert await may(3) == (False, "alias canary held it for 2000 s, at least 3600 s is wanted")
    assert await may(2) == (False, "alias canary held it for 100 s, at least 3600 s is wanted")


async def test_a_signature_is_asked_for_in_the_same_transaction(registry: Registry, blob: str) -> None:
    await gated(registry, Gate(id="signed", condition=Signed(key_id="aa")))
    for _ in range(2):
        await published(registry, blob, {})
    asked: list[tuple[str, int]] = []

    def key_ids(_connection: Any, model_id: str, version: int) -> set[str]:
        asked.append((model_id, version))
        return {"aa"} if version == 2 else {"bb"}

    store = SqlModelStore(registry.store._database, valid_key_ids=key_ids)
    with pytest.raises(WrongState, match="key aa did not sign it"):
        await store.set_alias(alias("stable"), number(1), etag="", actor="")
    assert (await store.set_alias(alias("stable"), number(2), etag="", actor="")).version == 2
    assert asked == [("m", 1), ("m", 2)]


async def test_gates_are_set_and_replaced_with_the_model(registry: Registry) -> None:
    gates = (Gate(id="a", condition=Signed()), Gate(id="b", condition=DigestVerified(max_age=timedelta(days=1))))
    store = registry.store

    async def create(*asked: Gate) -> Any:
        return await store.create_model("m", description="", labels={}, request_id="r", actor="", gates=asked)

    model = await create(*gates)
    assert (await create(*gates), await store.get_model("m")) == (model, model)
    with pytest.raises(InvalidInput, match="twice"):
        await store.update_model("m", description=None, labels={}, etag=model.etag, actor="", gates=gates[:1] * 2)
    kept = await store.update_model("m", description="x", labels={}, etag=model.etag, actor="")
    assert kept.gates == gates
    none = await store.update_model("m", description=None, labels={}, etag=kept.etag, actor="", gates=())
    assert (none.gates, none.description) == ((), "x")


async def test_a_history_holds_every_move_and_removal_in_pages(registry: Registry, blob: str, clock: Any) -> None:
    await create_model(registry)
    for _ in range(3):
        await publish(registry, blob)
    store, etag = registry.store, ""
    for version in (1, 2, 2, 3):
        clock.advance(10)
        moved = await store.set_alias(alias("stable"), number(version), etag=etag, actor=OPERATOR, reason=f"{version}")
        etag = moved.etag
    await store.set_alias(alias("canary"), number(1), etag="", actor="")
    await store.delete_alias(alias("stable"), etag=etag, actor=OPERATOR)
    await store.set_alias(alias("stable"), number(1), etag="", actor="")
    seen, token = [], ""
    while True:
        page, token = await store.list_moves("m", "stable", size=2, token=token)
        seen += page
        if not token:
            break
    assert [(move.from_version, move.to_version, move.reason) for move in seen] == [
        (None, 1, ""),
        (3, None, ""),
        (2, 3, "3"),
        (1, 2, "2"),
        (None, 1, "1"),
    ]
    everything, _ = await store.list_moves("m", None, size=0, token="")
    assert [move.alias for move in everything] == ["stable", "stable", "canary", "stable", "stable", "stable"]
    # Each is one change of the log, by the same author, at the same time.
    changes, _ = await store.changes_after(0, model_id="m", limit=100)
    made = {change.revision: (change.time, change.actor) for change in changes}
    assert all(made[move.revision] == (move.time, move.actor) for move in everything)
    assert (await store.list_moves("m", "never", size=0, token=""))[0] == []
    with pytest.raises(NotFound):
        await store.list_moves("none", None, size=0, token="")
    _, token = await store.list_moves("m", "stable", size=1, token="")
    with pytest.raises(InvalidInput):
        await store.list_moves("m", None, size=1, token=token)
