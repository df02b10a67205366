"""Gates: what each condition finds, and why it says so."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_registry.conditions import (
    Condition,
    DigestVerified,
    Gate,
    HeldAlias,
    MetricBounds,
    MetricNoWorse,
    SignatureCompatible,
    Signed,
)
from mlmesh_registry.gates import Facts, compatible, evaluate, guarding, refusal
from mlmesh_registry.versions import Artifact, Content, Signature, TensorSpec, Version

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


def version(number: int, metrics: Mapping[str, float] | None = None, signature: Signature | None = None) -> Version:
    content = Content(
        artifacts=(Artifact(path="model.onnx", sha256="ab" * 32),),
        metrics=metrics or {},
        signature=signature or Signature(),
    )
    return Version(
        model="m",
        number=number,
        content=content,
        digest="",
        create_time=NOW,
        creator="",
        revision=number,
        meta_revision=number,
    )


def asked(condition: Condition, facts: Facts) -> tuple[bool, str]:
    (result,) = evaluate([Gate(id="g", condition=condition)], facts)
    return result.passed, result.message


def of(candidate: Version, current: Version | None = None, **facts: object) -> Facts:
    return replace(Facts(candidate=candidate, current=current, now=NOW), **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("condition", "value", "passed", "message"),
    [
        (MetricBounds(metric="f1", min_value=0.9), 0.9, True, "f1 is 0.9"),
        (MetricBounds(metric="f1", min_value=0.9), 0.89, False, "f1 is 0.89, at least 0.9 is wanted"),
        (MetricBounds(metric="f1", max_value=5), 5.0, True, "f1 is 5"),
        (MetricBounds(metric="f1", max_value=5), 5.01, False, "f1 is 5.01, at most 5 is allowed"),
        (MetricBounds(metric="f1"), -1e9, True, "f1 is -1e+09"),
        (MetricBounds(metric="f1"), None, False, "the version has no metric f1"),
    ],
)
def test_metric_bounds(condition: MetricBounds, value: float | None, passed: bool, message: str) -> None:
    candidate = version(2, {} if value is None else {"f1": value})
    assert asked(condition, of(candidate)) == (passed, message)


@pytest.mark.parametrize(
    ("condition", "old", "new", "passed"),
    [
        (MetricNoWorse(metric="f1"), 0.9, 0.9, True),
        (MetricNoWorse(metric="f1"), 0.9, 0.8999, False),
        (MetricNoWorse(metric="f1", tolerance=0.1), 0.8, 0.7, True),
        (MetricNoWorse(metric="f1", tolerance=0.1), 0.9, 0.8, True),
        (MetricNoWorse(metric="f1", tolerance=0.1), 0.9, 0.79, False),
        (MetricNoWorse(metric="f1", lower_is_better=True), 0.2, 0.1, True),
        (MetricNoWorse(metric="f1", lower_is_better=True), 0.1, 0.2, False),
        (MetricNoWorse(metric="f1", lower_is_better=True, tolerance=0.1), 0.1, 0.2, True),
        (MetricNoWorse(metric="f1"), None, 0.1, True),
        (MetricNoWorse(metric="f1"), 0.9, None, False),
    ],
)
def test_metric_no_worse(condition: MetricNoWorse, old: float | None, new: float | None, passed: bool) -> None:
    before = version(1, {} if old is None else {"f1": old})
    after = version(2, {} if new is None else {"f1": new})
    assert asked(condition, of(after, before))[0] is passed
    # A new alias compares with nothing, but the metric must be there.
    assert asked(condition, of(after))[0] is (new is not None)


def test_how_much_worse_is_told() -> None:
    facts = of(version(7, {"loss": 0.75}), version(3, {"loss": 0.5}))
    condition = MetricNoWorse(metric="loss", lower_is_better=True, tolerance=0.01)
    message = "loss is 0.75, version 3 has 0.5; worse by 0.25, 0.01 is allowed"
    assert asked(condition, facts) == (False, message)


def test_digest_verified() -> None:
    fresh = DigestVerified(max_age=HOUR)
    never = version(1)
    verified = replace(never, verify_time=NOW - HOUR)
    old = replace(never, verify_time=NOW - HOUR - timedelta(seconds=1))
    assert asked(fresh, of(never)) == (False, "its bytes were never verified")
    assert asked(DigestVerified(), of(never))[0] is False
    assert asked(fresh, of(verified)) == (True, "its bytes were verified 3600 s ago")
    assert asked(fresh, of(old)) == (False, "its bytes were verified 3601 s ago, at most 3600 s is allowed")
    assert asked(DigestVerified(), of(old))[0] is True
    assert asked(DigestVerified(), of(replace(verified, corrupt_time=NOW)))[0] is False


def test_signed() -> None:
    one = frozenset({"aa"})
    assert asked(Signed(), of(version(1), key_ids=one)) == (True, "key aa signed it")
    assert asked(Signed(), of(version(1))) == (False, "no trusted key signed it")
    assert asked(Signed(key_id="aa"), of(version(1), key_ids=one))[0] is True
    message = "key bb did not sign it, or is not trusted"
    assert asked(Signed(key_id="bb"), of(version(1), key_ids=one)) == (False, message)


def test_held_alias() -> None:
    held = {"canary": HOUR}
    condition = HeldAlias(alias="canary", min_age=HOUR)
    assert asked(condition, of(version(1), held=held)) == (True, "alias canary held it for 3600 s")
    longer = replace(condition, min_age=2 * HOUR)
    message = "alias canary held it for 3600 s, at least 7200 s is wanted"
    assert asked(longer, of(version(1), held=held)) == (False, message)
    assert asked(replace(condition, alias="beta"), of(version(1), held=held))[0] is False
    assert asked(HeldAlias(alias="canary"), of(version(1), held={"canary": timedelta()}))[0] is True


def test_a_gate_guards_the_aliases_it_names() -> None:
    some = Gate(id="some", aliases=("stable",), condition=SignatureCompatible())
    every = Gate(id="every", condition=SignatureCompatible())
    assert guarding([some, every], "stable") == [some, every]
    assert guarding([some, every], "canary") == [every]


def test_a_refusal_names_every_gate_that_refused_and_why() -> None:
    gates = [
        Gate(id="accurate", condition=MetricBounds(metric="f1", min_value=0.9)),
        Gate(id="small", condition=MetricBounds(metric="mb", max_value=5)),
        Gate(id="signed", condition=Signed()),
    ]
    results = evaluate(gates, of(version(4, {"f1": 0.8, "mb": 4.0})))
    error = refusal("models/m/aliases/stable", "models/m/versions/4", results)
    assert error is not None
    assert error.reason == "GATE_REFUSED"
    assert dict(error.metadata) == {
        "accurate": "f1 is 0.8, at least 0.9 is wanted",
        "signed": "no trusted key signed it",
    }
    assert error.message == (
        "models/m/aliases/stable may not move to models/m/versions/4. 2 of 3 gates refuse. "
        "accurate: f1 is 0.8, at least 0.9 is wanted; signed: no trusted key signed it"
    )
    assert refusal("a", "v", results[1:2]) is None


TENSORS = st.builds(
    TensorSpec,
    name=st.sampled_from("abc"),
    datatype=st.sampled_from(["FP32", "INT64"]),
    shape=st.lists(st.sampled_from([-1, 1, 2]), max_size=2).map(tuple),
)
SIDES = st.lists(TENSORS, max_size=3, unique_by=lambda tensor: tensor.name).map(tuple)
SIGNATURES = st.builds(Signature, inputs=SIDES, outputs=SIDES)


def _can_call(caller: Signature, served: Signature) -> bool:
    """Said another way: each input that is served was offered, with every size it was offered in."""
    sizes = (1, 2, 3)

    def instances(tensor: TensorSpec) -> set[tuple[int, ...]]:
        found: set[tuple[int, ...]] = {()}
        for size in tensor.shape:
            found = {(*shape, each) for shape in found for each in (sizes if size == -1 else (size,))}
        return found

    offered = {tensor.name: tensor for tensor in caller.inputs}
    for tensor in served.inputs:
        was = offered.get(tensor.name)
        if was is None or was.datatype != tensor.datatype or not instances(was) <= instances(tensor):
            return False
    return set(caller.outputs) <= set(served.outputs)


@given(SIGNATURES, SIGNATURES)
def test_compatible_means_that_every_call_still_works(old: Signature, new: Signature) -> None:
    assert (compatible(old, new) == "") is _can_call(old, new)


@given(SIGNATURES, SIGNATURES, SIGNATURES)
def test_compatibility_is_reflexive_and_transitive(one: Signature, two: Signature, three: Signature) -> None:
    assert compatible(one, one) == ""
    if not compatible(one, two) and not compatible(two, three):
        assert compatible(one, three) == ""


@pytest.mark.parametrize(
    ("side", "old", "new", "why"),
    [
        ("inputs", [], [("x", "FP32", (1,))], "input x is new"),
        ("inputs", [("x", "FP32", (1,))], [("x", "FP16", (1,))], "input x is FP16, was FP32"),
        ("inputs", [("x", "FP32", (-1, 3))], [("x", "FP32", (8, 3))], "input x is [8,3], was [-1,3]"),
        ("inputs", [("x", "FP32", (8, 3))], [("x", "FP32", (-1, 3))], ""),
        ("inputs", [("x", "FP32", (8, 3))], [("x", "FP32", (8, 3, 1))], "input x is [8,3,1], was [8,3]"),
        ("inputs", [("x", "FP32", (1,))], [], ""),
        ("outputs", [("y", "FP32", (1,))], [], "output y is missing"),
        ("outputs", [], [("y", "FP32", (1,))], ""),
        ("outputs", [("y", "FP32", (1,))], [("y", "FP32", (-1,))], "output y is FP32 [-1], was FP32 [1]"),
    ],
)
def test_why_signatures_are_not_compatible(
    side: str, old: list[tuple[str, str, tuple[int, ...]]], new: list[tuple[str, str, tuple[int, ...]]], why: str
) -> None:
    before, after = (
        Signature(**{side: tuple(TensorSpec(name=n, datatype=d, shape=s) for n, d, s in tensors)})
        for tensors in (old, new)
    )
    assert compatible(before, after) == why
    facts = of(version(2, signature=after), version(1, signature=before))
    assert asked(SignatureCompatible(), facts)[0] is (why == "")
    assert asked(SignatureCompatible(), of(version(2, signature=after)))[0] is True
