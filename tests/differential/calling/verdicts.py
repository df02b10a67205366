"""What `mlmesh explain` says of a call, beside what became of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlmesh_local.explain.policies import GRPC_CODES
from mlmesh_local.explain.values import Destination, Explanation, Outcome
from tests.differential.calling.echo import Response
from tests.differential.calling.worlds import RandomCall

Arrived = list[tuple[str, dict[str, str]]]
EDITED = ("x-a", "x-b", "x-c", "x-r", "x", "end-user", "x-set", "x-add")
"""Headers that routes may change; what a token's filter takes away or adds is not among them."""
_TOKEN = re.compile(r"[?&](access_)?token=[^&]*")
# How the application fails where it is told to, for clients of both kinds.
_FAILED_HTTP, _FAILED_GRPC = 503, 14
# The client's sidecar says UNAVAILABLE, the server's, at the same time, DEADLINE_EXCEEDED.
_TIMED_OUT = (14, 4)


@dataclass(frozen=True, kw_only=True)
class Became:
    """One call as it went."""

    call: RandomCall
    response: Response
    arrived: Arrived


def differences(said: Explanation, became: Became) -> list[str]:
    """What is not as it was said."""
    return list(_differences(said, became))


def _differences(said: Explanation, became: Became) -> Iterator[str]:
    call, response = became.call, became.response
    reached = any(one.outcome.kind in ("routed", "mixed") for one in said.destinations)
    if "x-slow" in call.headers and reached and said.outcome.kind != "aborted":
        yield from _slow(said, became)
        return
    options = _options(said)
    fitting = [one for one, outcome in options if _fits(outcome, one, said, became)]
    if not fitting:
        shown = f"HTTP {response.status} gRPC {response.grpc} of {response.app or 'the mesh'} {response.body[:80]!r}"
        wanted = "; ".join(sorted({f"{o.kind} {o.code} HTTP {o.http}" for _, o in options}))
        yield f"said {wanted}; came {shown} {became.arrived}"
        return
    if said.outcome.location and response.headers.get("location") != said.outcome.location:
        yield f"location is {response.headers.get('location')}, not {said.outcome.location}"
    yield from _edits(said, fitting[0], response)
    if response.app and fitting[0] is not None:
        first = next((headers for name, headers in became.arrived if name == response.app), {})
        yield from min((list(_arrival(one, first)) for one in fitting if one is not None), key=len)
    yield from _arrivals(said, became)


def _options(said: Explanation) -> list[tuple[Destination | None, Outcome]]:
    if said.outcome.kind == "aborted" or not said.destinations:
        return [(None, said.outcome)]
    return [(one, one.outcome) for one in said.destinations]


def _fits(outcome: Outcome, one: Destination | None, said: Explanation, became: Became) -> bool:
    if one is not None and one.tls is not None and one.tls.used == "TLS":
        # Applications here speak no TLS.
        return not became.response.app
    if outcome.kind == "routed":
        return _answered(one, said, became)
    if outcome.kind == "mixed":
        return _answered(one, said, became) or _refused(outcome, became)
    return _refused(outcome, became)


def _refused(outcome: Outcome, became: Became) -> bool:
    response = became.response
    if not outcome.http:
        return response.status == 0
    if response.app:
        return False
    if became.call.grpc:
        return response.grpc == GRPC_CODES.index(outcome.code)
    return response.status == outcome.http


def _answered(one: Destination | None, said: Explanation, became: Became) -> bool:
    response = became.response
    if one is None or response.app not in {endpoint.instance or "outside" for endpoint in one.endpoints}:
        return False
    failed = response.grpc == _FAILED_GRPC if became.call.grpc else response.status == _FAILED_HTTP
    if failed:
        return _fails(said, became.call)
    return not _fails(said, became.call) and response.status == 200 and response.grpc in (None, 0)


def _attempts(said: Explanation, call: RandomCall) -> int:
    """How often the application is tried when it fails as it was told to."""
    _, star, times = call.headers.get("x-fail", "").partition("*")
    if not star:
        return 1
    tried = 1
    if said.retries is not None:
        words = set(said.retries.conditions)
        again = bool(words & {"5xx", "gateway-error"}) or (
            bool(words & {"unavailable"}) if call.grpc else 503 in said.retries.status_codes
        )
        if call.grpc:
            # Envoy: HTTP conditions look at the HTTP status, which is 200.
            again = "unavailable" in words
        tried = said.retries.attempts if again else 1
    return min(int(times) + 1, tried)


def _fails(said: Explanation, call: RandomCall) -> bool:
    _, star, times = call.headers.get("x-fail", "").partition("*")
    return bool(star) and _attempts(said, call) <= int(times)


def _slow(said: Explanation, became: Became) -> Iterator[str]:
    limit = said.timeout.effective_s if said.timeout else None
    limit = limit or (said.retries.per_try_timeout_s if said.retries else None)
    response = became.response
    if any(one.outcome.kind != "routed" for one in said.destinations):
        return
    if limit is None:
        if response.status:
            yield f"no timeout was said, HTTP {response.status} gRPC {response.grpc} came"
    elif response.app or (response.grpc not in _TIMED_OUT if became.call.grpc else response.status != 504):
        yield f"a timeout of {limit:g} s was said, {response} came: {said.retries} {said.timeout}"


def _edits(said: Explanation, one: Destination | None, response: Response) -> Iterator[str]:
    """Headers of the answer: looked at where the application, or the route itself, answered."""
    if not response.app and said.outcome.kind not in ("answered", "redirected"):
        return
    lines = [*said.headers, *(one.headers if one else ())]
    for line in lines:
        way, _, rest = line.partition(": ")
        verb, _, what = rest.partition(" ")
        name, _, value = what.partition(": ")
        if way == "response" and verb in ("add", "set") and value not in response.headers.get(name.lower(), ""):
            yield f"the answer has {name}: {response.headers.get(name.lower())}, not {value}"
    if "x-out" in response.headers and not any("x-out" in line for line in lines):
        yield "the answer has x-out, which was not said"


def _arrival(one: Destination, headers: Mapping[str, str]) -> Iterator[str]:
    for name, wanted in ((":method", one.sent.method), (":path", one.sent.path), (":authority", one.sent.authority)):
        # The server's sidecar takes tokens away that are not to be forwarded.
        if _TOKEN.sub("", headers.get(name, "")) != _TOKEN.sub("", wanted):
            yield f"{name} arrived as {headers.get(name)}, not {wanted}"
    for name in EDITED:
        if "%DOWN" in one.sent.headers.get(name, ""):
            continue
        if headers.get(name) != one.sent.headers.get(name):
            yield f"{name} arrived as {headers.get(name)}, not {one.sent.headers.get(name)}"


def _arrivals(said: Explanation, became: Became) -> Iterator[str]:
    """How often applications were called."""
    # Copies look as the call does, and may be on their way still.
    copies = sum(1 for mirror in said.mirrors if mirror.share)
    wanted = _attempts(said, became.call) if became.response.app else 0
    if not wanted <= len(became.arrived) <= wanted + copies:
        yield f"{len(became.arrived)} attempts arrived, not {wanted} and {copies} copies: {became.arrived}"
