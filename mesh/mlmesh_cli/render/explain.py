"""An explanation of a call, for a terminal: what becomes of it, which rule decided, and each part with its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from mlmesh_local.explain.durations import text as duration
from mlmesh_local.explain.values import (
    Check,
    Destination,
    Explanation,
    Faulty,
    Outcome,
    Place,
    Rejected,
    Retried,
    Timed,
    Tls,
)

_GOOD, _BAD, _UNSURE = "green", "red", "yellow"
_STYLES = {"routed": _GOOD, "mixed": _UNSURE, "redirected": _UNSURE, "answered": _UNSURE, "unknown": _UNSURE}


def explanation_view(explanation: Explanation, *, verbose: bool = False) -> RenderableType:
    """The whole explanation; `verbose` with notes, endpoints and rules of other clients."""
    plain = bool(explanation.call["http"])
    parts: list[RenderableType] = [_head(explanation), _outcome(explanation.outcome, plain=plain)]
    parts += _section("rule", _rules(explanation))
    parts += _section("checks at the gateway", _checks(explanation.checks, verbose=verbose))
    for one in explanation.destinations:
        title = _destination_title(one, len(explanation.destinations))
        parts += _section(title, _destination(one, verbose=verbose, plain=plain))
    parts += _section("on the way", _on_the_way(explanation, verbose=verbose))
    if explanation.streams:
        parts += _section("streams", (Text(line) for line in explanation.streams))
    parts += _section("notes", (Text(line) for line in explanation.notes))
    return Group(*parts)


def _section(title: str, lines: Iterable[RenderableType]) -> list[RenderableType]:
    found = list(lines)
    return [Text(title, style="bold"), *(Padding(line, (0, 0, 0, 2)) for line in found)] if found else []


def _head(explanation: Explanation) -> Text:
    call = explanation.call
    who = str(call["from"] or "a client outside")
    at = f" at gateway {call['at_gateway']}" if call["at_gateway"] else ""
    verb = f"{call['http']} " if call["http"] else ""
    return Text(f"{who} → {verb}{call['to']}:{call['port']}{call['method']}{at}  ({explanation.proxy})", style="bold")


def _outcome(outcome: Outcome, *, plain: bool) -> Text:
    """`plain`: of a call that is not gRPC, which has no gRPC status."""
    style = _STYLES.get(outcome.kind, _BAD)
    status = (f", HTTP {outcome.http}" if outcome.http else "") if plain else f", {outcome.code}"
    return Text(f"{outcome.kind.replace('_', ' ')}{status}: {outcome.why}", style=style)


def _rules(explanation: Explanation) -> Iterator[Text]:
    for rejected in explanation.rejected:
        yield _rejected(rejected)
    if explanation.route is not None:
        name = explanation.route.route
        line = Text("✓ ", style=_GOOD)
        line.append(_named(explanation.route.place, name), style="bold")
        line.append(f"  matches {explanation.route.matches}")
        yield _placed(line, explanation.route.place)
    elif explanation.virtual_host:
        yield Text(f"no rule of {explanation.virtual_host} takes the call", style=_BAD)


def _rejected(rejected: Rejected) -> Text:
    line = Text("✗ ", style="dim")
    line.append(_named(rejected.place, rejected.route), style="dim")
    line.append(f"  {rejected.why}", style="default")
    return _placed(line, rejected.place)


def _named(place: Place | None, name: str) -> str:
    where = f"{place.kind} {place.name}" if place else "(default)"
    part = place.part.removeprefix("spec.") if place else ""
    quoted = f'"{name}"' if name and name != "default" else ""
    return " ".join(word for word in (where, part, quoted) if word)


def _placed(line: Text, place: Place | None) -> Text:
    if place and place.source:
        line.append(f"  {place.source}", style="cyan")
    return line


def _destination_title(one: Destination, count: int) -> str:
    share = f"{one.share:.1%} → " if count > 1 else "→ "
    subset = f" subset {one.subset}" if one.subset else ""
    return f"{share}{one.host}:{one.port}{subset}" if one.port else f"{share}{one.cluster}"


def _destination(one: Destination, *, verbose: bool, plain: bool) -> Iterator[Text]:
    yield _outcome(one.outcome, plain=plain)
    if one.rule is not None:
        yield _placed(Text(f"{one.rule.kind} {one.rule.name} {one.rule.part}"), one.rule)
    balanced = f"{one.load_balancer} over {len(one.endpoints)} endpoints"
    bounds = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in one.circuit_breakers.items())
    yield Text(f"{balanced}; at most {bounds}" if bounds else f"{balanced}; no circuit breaker")
    if one.outlier_detection:
        yield Text(f"outlier detection: {one.outlier_detection}")
    yield from (Text(f"headers: {line}") for line in one.headers)
    if verbose:
        yield Text(f"sent as {one.sent.method} {one.sent.authority}{one.sent.path}")
        yield Text(f"connections: {', '.join(one.connections)}")
        for endpoint in one.endpoints:
            extra = f" priority {endpoint.priority}" if endpoint.priority else ""
            yield Text(f"  {endpoint.address} {endpoint.instance or '(outside of the mesh)'}{extra}", style="dim")
    if one.tls is not None:
        yield _tls(one.tls)
        if one.tls.server_identity and not any(check.action in ("ALLOW", "DENY") for check in one.checks):
            yield Text("no AuthorizationPolicy speaks of the server: everybody may call it", style="dim")
    yield from _checks(one.checks, verbose=verbose)


def _tls(tls: Tls) -> Text:
    if tls.problem:
        return _placed(Text(f"TLS fails: {tls.problem}", style=_BAD), tls.place)
    who = f": {tls.client_identity} calls {tls.server_identity}" if tls.client_identity else ""
    return _placed(Text(f"{tls.used}{who}; the server is {tls.server}"), tls.place)


def _checks(checks: tuple[Check, ...], *, verbose: bool) -> Iterator[Text]:
    for check in checks:
        if not (verbose or check.verdict in ("deny", "ask") or check.policy):
            continue
        style = {"deny": _BAD, "allow": _GOOD}.get(check.verdict, _UNSURE)
        line = Text(f"{check.verdict}", style=style)
        line.append(f" {check.action}: {check.policy or check.filter}: {check.why}", style="default")
        yield _placed(line, check.place)


def _on_the_way(explanation: Explanation, *, verbose: bool) -> Iterator[Text]:
    if explanation.retries is not None:
        yield from _retries(explanation.retries, verbose=verbose)
    if explanation.timeout is not None:
        yield from _timeout(explanation.timeout)
    if explanation.faults is not None:
        yield _faults(explanation.faults)
    for mirror in explanation.mirrors:
        yield _placed(Text(f"mirrored to {mirror.cluster}: {mirror.share:.1%}"), mirror.rule)
    yield from (Text(f"headers: {line}") for line in explanation.headers)
    yield from (Text(line) for line in explanation.telemetry)


def _retries(retried: Retried, *, verbose: bool) -> Iterator[Text]:
    if retried.attempts == 1:
        yield Text("retries: none")
        return
    codes = f", HTTP {', '.join(map(str, retried.status_codes))}" if retried.status_codes else ""
    yield Text(f"retries: {retried.attempts - 1} more on {', '.join(retried.conditions)}{codes}")
    yield from (Text(f"  {note}", style="dim") for note in retried.notes if verbose or "load" in note)


def _timeout(timed: Timed) -> Iterator[Text]:
    bound = duration(timed.effective_s) if timed.effective_s else "none"
    yield Text(f"timeout: {bound}; {timed.notes[0]}" if timed.notes else f"timeout: {bound}")
    yield from (Text(f"  {note}", style="dim") for note in timed.notes[1:])


def _faults(faulty: Faulty) -> Text:
    parts: list[str] = []
    if faulty.delay_share:
        parts.append(f"{faulty.delay_share:.1%} delayed by {duration(faulty.delay_s)}")
    if faulty.abort_share:
        parts.append(f"{faulty.abort_share:.1%} ended with {faulty.abort_code}")
    return Text(f"faults on purpose: {', '.join(parts) or 'none'} (before the router: not retried)", style=_UNSURE)
