"""What a model asks of a version before an alias moves to it: gates as values, and their stored form. Pure.

gates.py tells whether a version meets them.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from typing import Any

from mlmesh_registry import names
from mlmesh_runtime.errors import InvalidInput

GATES_MAX = 32
GATE_ALIASES_MAX = 64
METRIC_CHARS_MAX = 128
KEY_ID_CHARS_MAX = 128

_GATE_ID = re.compile(r"[a-z][a-z0-9-]{0,62}")
_ALIAS_ID = re.compile(names.ALIAS_ID)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricBounds:
    """The version has the metric, within the bounds (both inclusive, None: no bound)."""

    metric: str
    min_value: float | None = None
    max_value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricNoWorse:
    """The version has the metric, and it is not worse than where the alias points now by more than the tolerance."""

    metric: str
    lower_is_better: bool = False
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureCompatible:
    """Whoever can call the version that the alias points at now can call this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestVerified:
    """Its bytes were read and found whole, not longer ago than this (None: ever)."""

    max_age: timedelta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A trusted key signed it: this one, or ("") any."""

    key_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldAlias:
    """Another alias points, or pointed, at it, for at least this long."""

    alias: str
    min_age: timedelta = timedelta()


Condition = MetricBounds | MetricNoWorse | SignatureCompatible | DigestVerified | Signed | HeldAlias

_KINDS: Mapping[str, type[Condition]] = {
    "metric_bounds": MetricBounds,
    "metric_no_worse": MetricNoWorse,
    "signature_compatible": SignatureCompatible,
    "digest_verified": DigestVerified,
    "signed": Signed,
    "held_alias": HeldAlias,
}
_KIND_OF = {condition: kind for kind, condition in _KINDS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A condition under a name within its model, and the aliases that it guards (none: all of the model's)."""

    id: str
    aliases: tuple[str, ...] = ()
    condition: Condition

    def guards(self, alias: str) -> bool:
        """Whether moves of an alias must pass here."""
        return not self.aliases or alias in self.aliases


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """What a gate found, and why, for a person, with the figures."""

    gate: str
    passed: bool
    message: str


def plain(gate: Gate) -> dict[str, Any]:
    """Gate as plain JSON values; durations are whole microseconds. `gate_from` is the inverse."""
    values = {field.name: getattr(gate.condition, field.name) for field in fields(gate.condition)}
    durations = {key: value // _MICROSECOND for key, value in values.items() if isinstance(value, timedelta)}
    return {
        "id": gate.id,
        "aliases": list(gate.aliases),
        "condition": _KIND_OF[type(gate.condition)],
        "values": {**values, **durations},
    }


def gate_from(data: Mapping[str, Any]) -> Gate:
    """Gate of its plain values."""
    values = {
        key: timedelta(microseconds=value) if key in ("max_age", "min_age") and value is not None else value
        for key, value in data["values"].items()
    }
    make: Callable[..., Condition] = _KINDS[data["condition"]]
    return Gate(id=data["id"], aliases=tuple(data["aliases"]), condition=make(**values))


def check_gates(gates: Sequence[Gate], where: str = "gates") -> Sequence[Gate]:
    """Everything that must hold of a model's gates whatever the transport checked. Errors: InvalidInput."""
    if len(gates) > GATES_MAX:
        raise InvalidInput(f"{where}: {len(gates)} gates, at most {GATES_MAX}", field=where)
    seen: set[str] = set()
    for position, gate in enumerate(gates):
        at = f"{where}[{position}]"
        if not _GATE_ID.fullmatch(gate.id):
            raise InvalidInput(f"{at}.id: expected lower-case letters, digits and dashes", field=f"{at}.id")
        if gate.id in seen:
            raise InvalidInput(f"{at}.id: {gate.id} twice; ids are unique in a model", field=f"{at}.id")
        seen.add(gate.id)
        if len(gate.aliases) > GATE_ALIASES_MAX or not all(map(_ALIAS_ID.fullmatch, gate.aliases)):
            raise InvalidInput(f"{at}.aliases: expected at most {GATE_ALIASES_MAX} alias ids", field=f"{at}.aliases")
        _check_condition(gate.condition, at)
    return gates


def _check_condition(condition: Condition, at: str) -> None:
    match condition:
        case MetricBounds():
            _check_metric(condition.metric, at)
            least, most = condition.min_value, condition.max_value
            if any(bound is not None and not math.isfinite(bound) for bound in (least, most)):
                raise InvalidInput(f"{at}.metric_bounds: bounds are finite", field=f"{at}.metric_bounds")
            if least is not None and most is not None and least > most:
                text = f"{at}.metric_bounds: no figure is at least {least!r} and at most {most!r}"
                raise InvalidInput(text, field=f"{at}.metric_bounds")
        case MetricNoWorse():
            _check_metric(condition.metric, at)
            if not (math.isfinite(condition.tolerance) and condition.tolerance >= 0):
                raise InvalidInput(f"{at}.tolerance: expected a finite figure of at least 0", field=f"{at}.tolerance")
        case DigestVerified(max_age=age) | HeldAlias(min_age=age) if age is not None and age < timedelta():
            raise InvalidInput(f"{at}: a duration is negative", field=at)
        case HeldAlias():
            if not _ALIAS_ID.fullmatch(condition.alias):
                raise InvalidInput(f"{at}.held_alias.alias: expected an alias id", field=f"{at}.held_alias.alias")
        case Signed():
            if len(condition.key_id) > KEY_ID_CHARS_MAX or "\0" in condition.key_id:
                raise InvalidInput(f"{at}.signed.key_id: expected a key id", field=f"{at}.signed.key_id")
        case DigestVerified() | SignatureCompatible():
            pass


def _check_metric(metric: str, at: str) -> None:
    if not 0 < len(metric) <= METRIC_CHARS_MAX or "\0" in metric:
        raise InvalidInput(f"{at}.metric: expected 1 to {METRIC_CHARS_MAX} characters", field=f"{at}.metric")
