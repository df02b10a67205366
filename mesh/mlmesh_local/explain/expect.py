"""What a script expects of an explanation: "subset=v2", "outcome=denied", "share.v2=0.1"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from mlmesh_local.explain.values import Explanation, Place
from mlmesh_runtime.errors import InvalidInput

_SHARE_TOLERANCE = 0.0005


def unmet(explanation: Explanation, expectations: Mapping[str, str]) -> list[str]:
    """A line for each expectation that is not met. Raises InvalidInput for one that is not known."""
    return [line for key, wanted in expectations.items() if (line := _unmet(explanation, key, wanted))]


def _unmet(explanation: Explanation, key: str, wanted: str) -> str:
    if key.startswith("share."):
        name = key.removeprefix("share.")
        have = sum(one.share for one in explanation.destinations if name in (one.subset, one.host, one.cluster))
        try:
            met = math.isclose(have, float(wanted), abs_tol=_SHARE_TOLERANCE)
        except ValueError:
            raise InvalidInput(f'{key}: "{wanted}" is no share from 0 to 1', field="expect") from None
        return "" if met else f"{key} is {have:g}, not {wanted}"
    if key not in _FACTS:
        raise InvalidInput(f'nothing is called "{key}"; there are {", ".join(_FACTS)}, share.SUBSET', field="expect")
    values = list(dict.fromkeys(_FACTS[key](explanation)))
    return "" if values and all(value == wanted for value in values) else f"{key} is {_shown(values)}, not {wanted}"


def _shown(values: list[str]) -> str:
    return ", ".join(value or '""' for value in values) or "not decided"


def _rule(place: Place | None, route: str) -> Iterator[str]:
    part = place.part if place else ""
    index = part.partition("[")[2].partition("]")[0]
    yield route or index


def _policies(explanation: Explanation) -> Iterator[str]:
    for checks in (explanation.checks, *(one.checks for one in explanation.destinations)):
        if not checks:
            continue
        decided = [check for check in checks if check.policy]
        yield decided[-1].place.name if decided and decided[-1].place else ""


_FACTS: dict[str, Callable[[Explanation], Iterator[str]]] = {
    "outcome": lambda e: iter((e.outcome.kind,)),
    "code": lambda e: iter((e.outcome.code,)),
    "virtual_service": lambda e: iter((e.route.place.name if e.route and e.route.place else "",)),
    "rule": lambda e: _rule(e.route.place, e.route.route) if e.route else iter(()),
    "subset": lambda e: (one.subset for one in e.destinations),
    "host": lambda e: (one.host for one in e.destinations),
    "cluster": lambda e: (one.cluster for one in e.destinations),
    "tls": lambda e: (one.tls.used if one.tls else "none" for one in e.destinations),
    "policy": _policies,
    "attempts": lambda e: iter((str(e.retries.attempts),)) if e.retries else iter(()),
    "timeout": lambda e: iter((f"{e.timeout.route_s:g}" if e.timeout.route_s else "none",)) if e.timeout else iter(()),
    "fault": lambda e: iter((e.faults.abort_code or "delay" if e.faults else "none",)),
}
"""Facts that can be expected; each must hold for every destination."""

FACTS = tuple(_FACTS)
