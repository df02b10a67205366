"""Whether a version may be where an alias is to point: every gate of its model, evaluated. Pure.

Figures are compared as people wrote them: 0.8 is 0.1 worse than 0.9, though not in binary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal

from mlmesh_registry.conditions import (
    Condition,
    DigestVerified,
    Gate,
    GateResult,
    HeldAlias,
    MetricBounds,
    MetricNoWorse,
    SignatureCompatible,
    Signed,
)
from mlmesh_registry.versions import Signature, TensorSpec, Version
from mlmesh_runtime.errors import WrongState

# 32 gates that all refuse must fit the trailers of a call, twice: 8 KiB is what most proxies take.
_MESSAGE_CHARS_MAX = 96
_NAME_CHARS_MAX = 32

Verdict = tuple[bool, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What gates ask about.

    Attributes:
        candidate: where the alias is to point.
        current: where it points now; None when it is new.
        key_ids: keys, trusted now, that signed the candidate.
        held: aliases that point or pointed at the candidate, and how long at most without a break.
        now: the time of the move.
    """

    candidate: Version
    current: Version | None
    now: datetime
    key_ids: frozenset[str] = frozenset()
    held: Mapping[str, timedelta] = field(default_factory=dict)


def guarding(gates: Sequence[Gate], alias: str) -> Sequence[Gate]:
    """Gates that moves of an alias must pass."""
    return [gate for gate in gates if gate.guards(alias)]


def evaluate(gates: Sequence[Gate], facts: Facts) -> tuple[GateResult, ...]:
    """What each gate finds, in their order."""
    found = ((gate.id, *_verdict(gate.condition, facts)) for gate in gates)
    return tuple(GateResult(gate=gate, passed=passed, message=message) for gate, passed, message in found)


def refusal(alias: str, version: str, results: Sequence[GateResult]) -> WrongState | None:
    """Build the error (GATE_REFUSED) that names the gates that refused and why; None when all let pass."""
    refused = {result.gate: _cut(result.message, _MESSAGE_CHARS_MAX) for result in results if not result.passed}
    if not refused:
        return None
    why = "; ".join(f"{gate}: {message}" for gate, message in refused.items())
    text = f"{alias} may not move to {version}. {len(refused)} of {len(results)} gates refuse. {why}"
    return WrongState(text, reason="GATE_REFUSED", metadata=refused)


def compatible(old: Signature, new: Signature) -> str:
    """Why a caller of the old could not call the new; "" when every caller can.

    Every input of the new was one of the old, of the same datatype and of a shape that takes all that the old one took;
    every output of the old is one of the new, of the same datatype and shape.
    """
    taken = {tensor.name: tensor for tensor in old.inputs}
    given = {tensor.name: tensor for tensor in new.outputs}
    for tensor in new.inputs:
        before = taken.get(tensor.name)
        if before is None:
            return f"input {_name(tensor)} is new"
        if tensor.datatype != before.datatype:
            return f"input {_name(tensor)} is {tensor.datatype}, was {before.datatype}"
        if not _takes(tensor.shape, before.shape):
            return f"input {_name(tensor)} is {_shape(tensor)}, was {_shape(before)}"
    for tensor in old.outputs:
        after = given.get(tensor.name)
        if after is None:
            return f"output {_name(tensor)} is missing"
        if (after.datatype, after.shape) != (tensor.datatype, tensor.shape):
            now, was = f"{after.datatype} {_shape(after)}", f"{tensor.datatype} {_shape(tensor)}"
            return f"output {_name(tensor)} is {now}, was {was}"
    return ""


def _verdict(condition: Condition, facts: Facts) -> Verdict:
    match condition:
        case MetricBounds():
            return _metric_bounds(condition, facts)
        case MetricNoWorse():
            return _metric_no_worse(condition, facts)
        case SignatureCompatible():
            return _signature_compatible(facts)
        case DigestVerified():
            return _digest_verified(condition, facts)
        case Signed():
            return _signed(condition, facts)
        case HeldAlias():
            return _held_alias(condition, facts)


def _metric_bounds(condition: MetricBounds, facts: Facts) -> Verdict:
    name, value = _cut(condition.metric), facts.candidate.content.metrics.get(condition.metric)
    if value is None:
        return False, f"the version has no metric {name}"
    if condition.min_value is not None and value < condition.min_value:
        return False, f"{name} is {value:.9g}, at least {condition.min_value:.9g} is wanted"
    if condition.max_value is not None and value > condition.max_value:
        return False, f"{name} is {value:.9g}, at most {condition.max_value:.9g} is allowed"
    return True, f"{name} is {value:.9g}"


def _metric_no_worse(condition: MetricNoWorse, facts: Facts) -> Verdict:
    name, value = _cut(condition.metric), facts.candidate.content.metrics.get(condition.metric)
    if value is None:
        return False, f"the version has no metric {name}"
    if facts.current is None:
        return True, f"{name} is {value:.9g}; the alias is new"
    before = facts.current.content.metrics.get(condition.metric)
    if before is None:
        return True, f"{name} is {value:.9g}; version {facts.current.number} has none to compare with"
    worse = _exact(value) - _exact(before) if condition.lower_is_better else _exact(before) - _exact(value)
    against = f"{name} is {value:.9g}, version {facts.current.number} has {before:.9g}"
    if worse <= _exact(condition.tolerance):
        return True, against
    return False, f"{against}; worse by {worse:.4g}, {condition.tolerance:.4g} is allowed"


def _signature_compatible(facts: Facts) -> Verdict:
    if facts.current is None:
        return True, "the alias is new"
    if problem := compatible(facts.current.content.signature, facts.candidate.content.signature):
        return False, problem
    return True, f"callers of version {facts.current.number} can call this one"


def _digest_verified(condition: DigestVerified, facts: Facts) -> Verdict:
    if facts.candidate.verify_time is None:
        return False, "its bytes were never verified"
    if facts.candidate.corrupt_time is not None:
        return False, "its bytes were found corrupt"
    age = facts.now - facts.candidate.verify_time
    told = f"its bytes were verified {_seconds(age)} ago"
    if condition.max_age is not None and age > condition.max_age:
        return False, f"{told}, at most {_seconds(condition.max_age)} is allowed"
    return True, told


def _signed(condition: Signed, facts: Facts) -> Verdict:
    if condition.key_id:
        if condition.key_id in facts.key_ids:
            return True, f"key {_cut(condition.key_id)} signed it"
        return False, f"key {_cut(condition.key_id)} did not sign it, or is not trusted"
    if facts.key_ids:
        return True, f"key {_cut(min(facts.key_ids))} signed it"
    return False, "no trusted key signed it"


def _held_alias(condition: HeldAlias, facts: Facts) -> Verdict:
    held = facts.held.get(condition.alias)
    if held is None:
        return False, f"alias {_cut(condition.alias)} does not point at it, and never did"
    told = f"alias {_cut(condition.alias)} held it for {_seconds(held)}"
    if held < condition.min_age:
        return False, f"{told}, at least {_seconds(condition.min_age)} is wanted"
    return True, told


def _takes(new: Sequence[int], old: Sequence[int]) -> bool:
    return len(new) == len(old) and all(size in (-1, before) for size, before in zip(new, old, strict=True))


def _exact(value: float) -> Decimal:
    return Decimal(repr(float(value)))


def _seconds(time: timedelta) -> str:
    return f"{time.total_seconds():.6g} s"


def _shape(tensor: TensorSpec) -> str:
    return f"[{','.join(map(str, tensor.shape))}]"


def _name(tensor: TensorSpec) -> str:
    return _cut(tensor.name)


def _cut(text: str, chars_max: int = _NAME_CHARS_MAX) -> str:
    return text if len(text) <= chars_max else text[: chars_max - 1] + "…"
