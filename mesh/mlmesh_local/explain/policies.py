"""What a route says besides where it sends: retries, timeout, faults, header edits, tracing."""

from __future__ import annotations

from collections.abc import Iterator

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.answers import http_as_grpc
from mlmesh_local.explain.durations import grpc_timeout, number, seconds, text
from mlmesh_local.explain.requests import Request
from mlmesh_local.explain.routing import share
from mlmesh_local.explain.values import Faulty, Retried, Timed

STREAM_WINDOW_BYTES = 16 * 1024 * 1024
"""Envoy's default HTTP/2 stream window; a request that is longer is not kept and so not sent again (measured)."""

GRPC_CODES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
    "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
_AMPLIFYING = frozenset({"resource-exhausted", "5xx", "retriable-4xx", "deadline-exceeded", "internal"})


def retries(action: Json, host: Json, *, window_bytes: int = STREAM_WINDOW_BYTES) -> Retried:
    """The retry policy of a route, or its virtual host's."""
    policy = action.get("retry_policy") or host.get("retry_policy")
    if policy is None:
        off = ("nothing is sent again",)
        return Retried(attempts=1, conditions=(), status_codes=(), per_try_timeout_s=None, notes=off)
    conditions = tuple(word for word in str(policy.get("retry_on", "")).split(",") if word)
    count = number(policy.get("num_retries"), 1)
    per_try = seconds(policy.get("per_try_timeout"))
    notes = [
        f"a request of more than {window_bytes // 1024 // 1024} MiB is not sent again: Envoy keeps no more of it",
        "a stream is sent again only while nothing of its answer has come; later its end is the client's to handle",
    ]
    if policy.get("retry_host_predicate"):
        notes.append("another endpoint is preferred for each attempt")
    if per_try:
        notes.append(f"each attempt may take {text(per_try)}; the last one to run out ends as UNAVAILABLE")
    back_off = policy.get("retry_back_off")
    if back_off:
        notes.append(f"attempts are {text(seconds(back_off.get('base_interval')) or 0.025)} apart and more")
    loud = sorted(_AMPLIFYING & set(conditions))
    if loud:
        notes.append(f"{', '.join(loud)} is retried: a server that sheds load gets more of it")
    return Retried(
        attempts=1 + count,
        conditions=conditions,
        status_codes=tuple(int(code) for code in policy.get("retriable_status_codes", ())),
        per_try_timeout_s=per_try,
        notes=tuple(notes),
    )


def timeout(action: Json, request: Request) -> Timed:
    """What bounds the call's time: Envoy's rules for gRPC (source/common/router/router.cc, finalTimeout)."""
    asked = grpc_timeout(request.headers.get("grpc-timeout", ""))
    streams = action.get("max_stream_duration", {})
    if "max_grpc_timeout" in action:
        bound = seconds(action["max_grpc_timeout"]) or None
        notes = _bounded(bound)
    elif "grpc_timeout_header_max" in streams:
        bound = seconds(streams["grpc_timeout_header_max"]) or None
        notes = ["the route's own timeout does not count for gRPC"]
        if bound:
            notes.append("when it runs out a unary call ends with DEADLINE_EXCEEDED, a stream with INTERNAL")
    else:
        # Envoy's own default where nothing is said.
        bound = seconds(action.get("timeout", "15s")) or None
        notes = [*_bounded(bound), "the client's deadline is not looked at by the proxy"]
    duration = seconds(streams.get("max_stream_duration"))
    if duration:
        notes.append(f"no call or stream lives longer than {text(duration)}")
        bound = duration if bound is None else min(bound, duration)
    limits = [limit for limit in (bound, asked) if limit]
    return Timed(route_s=bound, deadline_s=asked, effective_s=min(limits) if limits else None, notes=tuple(notes))


def _bounded(bound: float | None) -> list[str]:
    if bound is None:
        return ["no timeout: the client's deadline holds, and it gets DEADLINE_EXCEEDED when that passes"]
    return [
        f"all attempts together may take {text(bound)}; a client that asks for more gets no more",
        "when it runs out a unary call ends with UNAVAILABLE (DEADLINE_EXCEEDED only where the server's sidecar, which "
        "is told what is left of it, comes first), an open stream with INTERNAL",
    ]


def faults(config: Json | None) -> Faulty | None:
    """The fault filter's configuration on a route, None where there is no fault."""
    if config is None:
        return None
    delay, abort = config.get("delay", {}), config.get("abort", {})
    code, http = "", 0
    if "grpc_status" in abort:
        code = GRPC_CODES[int(abort["grpc_status"])]
        # Envoy's fault filter: the HTTP status of an abort by a gRPC status is 200 for every client.
        http = 200
    elif "http_status" in abort:
        http = int(abort["http_status"])
        code = http_as_grpc(http)
    if not (delay or abort):
        return None
    return Faulty(
        delay_s=seconds(delay.get("fixed_delay")) or 0.0,
        delay_share=share(delay.get("percentage", {})) if delay else 0.0,
        abort_code=code,
        abort_http=http,
        abort_share=share(abort.get("percentage", {})) if abort else 0.0,
    )


def header_edits(levels: tuple[Json, ...], action: Json) -> Iterator[str]:
    """What is changed about a request and its answer, for a person."""
    for level in levels:
        for way in ("request", "response"):
            yield from (f"{way}: remove {name}" for name in level.get(f"{way}_headers_to_remove", ()))
            for option in level.get(f"{way}_headers_to_add", ()):
                verb = "add" if str(option.get("append_action", "APPEND")).startswith("APPEND") else "set"
                header = option.get("header", {})
                yield f"{way}: {verb} {header.get('key', '')}: {header.get('value', '')}"
    for name, label in (("host_rewrite_literal", "authority"), ("prefix_rewrite", "path prefix")):
        if name in action:
            yield f'request: {label} becomes "{action[name]}"'
    if "regex_rewrite" in action:
        pattern = action["regex_rewrite"].get("pattern", {}).get("regex", "")
        yield f'request: path "{pattern}" becomes "{action["regex_rewrite"].get("substitution", "")}"'


def telemetry(manager: Json, route: Json) -> Iterator[str]:
    """What is seen of the call, for a person."""
    tracing = manager.get("tracing")
    if tracing is None:
        yield "traces: none, no provider is set"
    else:
        own = route.get("tracing") or tracing
        percent = own.get("random_sampling", {})
        value = float(percent["value"]) if "value" in percent else share(percent) * 100
        overall = own.get("overall_sampling", {})
        off = "numerator" in overall and not overall["numerator"]
        if off:
            yield "traces: turned off"
        else:
            yield f"traces: {value:g} % of calls, and every call that its client traces"
    logs = [str(one.get("name", "")).rpartition(".")[2] for one in manager.get("access_log", ())]
    yield f"access log: {', '.join(logs)}" if logs else "access log: none"
