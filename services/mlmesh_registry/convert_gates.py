"""Gates and what they found: messages to values and back; nothing is decided here."""

from collections.abc import Iterable
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from mlmesh.registry.v1 import registry_pb2 as pb
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
from mlmesh_runtime.errors import InvalidInput


def gate(value: Gate) -> pb.Gate:
    """Gate → message."""
    message = pb.Gate(id=value.id, aliases=value.aliases)
    match value.condition:
        case MetricBounds(metric=metric, min_value=least, max_value=most):
            message.metric_bounds.CopyFrom(pb.MetricBounds(metric=metric, min_value=least, max_value=most))
        case MetricNoWorse(metric=metric, lower_is_better=lower, tolerance=tolerance):
            bound = pb.MetricNoWorse(metric=metric, lower_is_better=lower, tolerance=tolerance)
            message.metric_no_worse.CopyFrom(bound)
        case SignatureCompatible():
            message.signature_compatible.SetInParent()
        case DigestVerified(max_age=age):
            message.digest_verified.SetInParent()
            if age is not None:
                message.digest_verified.max_age.FromTimedelta(age)
        case Signed(key_id=key_id):
            message.signed.CopyFrom(pb.Signed(key_id=key_id))
        case HeldAlias(alias=alias, min_age=age):
            message.held_alias.alias = alias
            if age:
                message.held_alias.min_age.FromTimedelta(age)
    return message


def gates(messages: Iterable[pb.Gate], where: str) -> tuple[Gate, ...]:
    """Messages → gates. Errors: InvalidInput for one without a condition, and for durations that are none."""
    return tuple(
        Gate(id=each.id, aliases=tuple(each.aliases), condition=_condition(each, f"{where}[{position}]"))
        for position, each in enumerate(messages)
    )


def gate_result(value: GateResult) -> pb.GateResult:
    """What a gate found → message."""
    return pb.GateResult(gate=value.gate, passed=value.passed, message=value.message)


def timedelta_of(message: Duration, field: str) -> timedelta:
    """Duration → timedelta, to the microsecond. Errors: InvalidInput for one that is out of range."""
    try:
        return message.ToTimedelta()
    except (OverflowError, ValueError) as error:
        raise InvalidInput(f"{field}: not a duration that can be kept", field=field) from error


def _condition(message: pb.Gate, where: str) -> Condition:
    match message.WhichOneof("condition"):
        case "metric_bounds":
            bounds = message.metric_bounds
            return MetricBounds(
                metric=bounds.metric,
                min_value=bounds.min_value if bounds.HasField("min_value") else None,
                max_value=bounds.max_value if bounds.HasField("max_value") else None,
            )
        case "metric_no_worse":
            bound = message.metric_no_worse
            return MetricNoWorse(metric=bound.metric, lower_is_better=bound.lower_is_better, tolerance=bound.tolerance)
        case "signature_compatible":
            return SignatureCompatible()
        case "digest_verified":
            verified = message.digest_verified
            at = f"{where}.digest_verified.max_age"
            return DigestVerified(max_age=timedelta_of(verified.max_age, at) if verified.HasField("max_age") else None)
        case "signed":
            return Signed(key_id=message.signed.key_id)
        case "held_alias":
            held = message.held_alias
            return HeldAlias(alias=held.alias, min_age=timedelta_of(held.min_age, f"{where}.held_alias.min_age"))
        case _:
            raise InvalidInput(f"{where}: a gate has one condition", field=where)
