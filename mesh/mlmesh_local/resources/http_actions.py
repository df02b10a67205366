"""What rules of VirtualServices do with a request: `spec.http[]` but for its conditions and destinations."""

from __future__ import annotations

import base64
import binascii
import re
from http import HTTPStatus

from mlmesh_local.resources.fields import INT32_MAX, Fields
from mlmesh_local.resources.header_values import header_value_problem
from mlmesh_local.resources.http_matches import HEADER_NAME, check_regex, parse_string_match
from mlmesh_local.resources.model_routes import (
    Cors,
    DirectResponse,
    Fault,
    FaultAbort,
    FaultDelay,
    HeaderEdits,
    HttpMatch,
    Redirect,
    RegexRewrite,
    Retries,
    Rewrite,
    StringMatch,
)
from mlmesh_local.resources.problems import did_you_mean

GRPC_STATUS = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
"""Names of gRPC statuses; the index is the code."""

# What Istio's validation accepts beside HTTP status codes:
# https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_filters/router_filter
RETRY_ON = (
    "5xx",
    "gateway-error",
    "reset",
    "reset-before-request",
    "connect-failure",
    "envoy-ratelimited",
    "retriable-4xx",
    "refused-stream",
    "retriable-status-codes",
    "retriable-headers",
    "http3-post-connect-failure",
    "cancelled",
    "deadline-exceeded",
    "internal",
    "resource-exhausted",
    "unavailable",
)
REDIRECT_CODES = (301, 302, 303, 307, 308)
"""What Envoy can answer with a redirect."""

BODY_BYTES_MAX = 1024 * 1024
_CORS_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE", "*"})
_STATUS_CODES = frozenset(status.value for status in HTTPStatus)
_PERCENT_MIN = 0.0001


def duration_s(fields: Fields, name: str) -> float | None:
    """A duration of at least 1 ms, in whole milliseconds, as Istio demands; None when absent."""
    seconds = fields.duration_s(name)
    node = fields.raw(name)
    if seconds is None or node is None:
        return None
    if abs(seconds * 1000 - round(seconds * 1000)) > 1e-6 * max(1.0, seconds):
        fields.refuse(name, f'must be whole milliseconds, not "{node.value}"')
    return seconds


def percentage(fields: Fields, name: str) -> float | None:
    """Istio's `Percent`: 0, or 0.0001 to 100; None when absent."""
    value = fields.percent(name)
    if value is not None and 0 < value < _PERCENT_MIN:
        fields.refuse(name, f"must be 0, or {_PERCENT_MIN} to 100, not {value:g}")
    return value


# Retries


def parse_retries(fields: Fields) -> Retries:
    """Read `retries`, or MeshConfig's `defaultHttpRetryPolicy`, which has the same fields."""
    with fields:
        attempts = fields.integer("attempts", low=0, high=INT32_MAX)
        told = [name for name in ("perTryTimeout", "retryOn", "retryRemoteLocalities") if fields.has(name)]
        if not attempts and told:
            fields.problems.add(
                fields.place("attempts") if fields.has("attempts") else fields.at,
                f'0 turns retries off, so "{told[0]}" means nothing; set "attempts"',
            )
        return Retries(
            attempts=attempts or 0,
            per_try_timeout_s=duration_s(fields, "perTryTimeout"),
            retry_on=_retry_on(fields),
            ignore_previous_hosts=fields.boolean_or_none("retryIgnorePreviousHosts"),
            backoff_s=duration_s(fields, "backoff"),
            remote_localities=fields.boolean("retryRemoteLocalities"),
        )


def _retry_on(fields: Fields) -> str:
    value = fields.text("retryOn")
    for part in value.split(",") if value else ():
        if part not in RETRY_ON and not (re.fullmatch(r"\d+", part) and int(part) in _STATUS_CODES):
            hint = "; leave out the blank" if part.strip() != part else did_you_mean(part, RETRY_ON)
            fields.refuse("retryOn", f'"{part}" is no retry condition{hint}')
    return value


# Faults


def parse_fault(fields: Fields) -> Fault:
    """Read `fault`."""
    with fields:
        if not fields.has("delay") and not fields.has("abort"):
            fields.problems.add(fields.at, 'needs "delay", "abort" or both')
        fields.ignored("delay", "abort")
        delay = abort = None
        if fields.has("delay"):
            with fields.message("delay") as inner:
                delay = _delay(inner)
        if fields.has("abort"):
            with fields.message("abort") as inner:
                abort = _abort(inner)
        return Fault(delay=delay, abort=abort)


def _delay(fields: Fields) -> FaultDelay | None:
    fields.unsupported("exponentialDelay", why="Istio itself does not support it")
    percent = percentage(fields, "percentage")
    whole = fields.integer("percent", low=0, high=100)
    fixed_s = duration_s(fields, "fixedDelay")
    if fixed_s is None:
        # Without a duration nothing is delayed.
        return None
    return FaultDelay(fixed_delay_s=fixed_s, percent=percent if percent is not None else float(whole or 0))


def _abort(fields: Fields) -> FaultAbort | None:
    fields.unsupported("http2Error", why="Istio itself does not support it")
    how = fields.one_of("httpStatus", "grpcStatus")
    grpc_status: str | None = None
    if fields.has("grpcStatus"):
        grpc_status = fields.choice("grpcStatus", GRPC_STATUS) or None
    fields.ignored("grpcStatus")
    percent = percentage(fields, "percentage")
    http_status = fields.integer("httpStatus", low=200, high=600)
    if not how:
        # Istio takes it, and aborts nothing.
        return None
    return FaultAbort(http_status=http_status, grpc_status=grpc_status, percent=percent)


# Answers of the proxy itself


def parse_redirect(fields: Fields, matches: tuple[HttpMatch, ...]) -> Redirect:
    """Read `redirect`; a rewritten prefix needs matches by prefix."""
    with fields:
        port_field = fields.one_of("port", "derivePort")
        derived = fields.choice("derivePort", ("FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"), "FROM_PROTOCOL_DEFAULT")
        redirect = Redirect(
            uri=fields.text("uri"),
            authority=fields.text("authority"),
            port=fields.integer("port", low=0, high=65535) or 0,
            same_port=derived == "FROM_REQUEST_PORT",
            scheme=fields.choice("scheme", ("http", "https", "")),
            code=_redirect_code(fields),
            prefix_rewrite=fields.text("prefixRewrite"),
        )
        if redirect.uri and redirect.prefix_rewrite:
            fields.refuse("prefixRewrite", 'cannot be set together with "uri"')
        if redirect.prefix_rewrite and any(match.uri and match.uri.how != "prefix" for match in matches):
            fields.refuse("prefixRewrite", "needs every match of the rule on the uri to be by prefix")
        says = (redirect.uri, redirect.prefix_rewrite, redirect.authority, port_field, redirect.scheme)
        if not any(says):
            fields.problems.add(
                fields.at, 'one of "uri", "prefixRewrite", "authority", "port", "derivePort", "scheme" is required'
            )
        return redirect


def _redirect_code(fields: Fields) -> int:
    code = fields.integer("redirectCode", low=0, high=399)
    if not code:
        return 301
    if code < 300:
        fields.refuse("redirectCode", f"must be 300 to 399, not {code}")
    elif code not in REDIRECT_CODES:
        known = ", ".join(map(str, REDIRECT_CODES))
        fields.refuse("redirectCode", f"{code} is not supported: Envoy redirects with {known} only")
    return code


def parse_direct_response(fields: Fields) -> DirectResponse:
    """Read `directResponse`."""
    with fields:
        fields.required("status")
        status = fields.integer("status", low=200, high=600)
        body: str | bytes | None = None
        if fields.has("body"):
            with fields.message("body") as inner:
                how = inner.one_of("string", "bytes")
                text, coded = inner.text("string"), inner.text("bytes")
                if how:
                    body = text if how == "string" else _decoded(inner, coded)
        fields.ignored("body")
        size = len(body.encode() if isinstance(body, str) else body or b"")
        if size > BODY_BYTES_MAX:
            fields.refuse("body", f"is {size} bytes long, more than {BODY_BYTES_MAX}")
        return DirectResponse(status=status or 200, body=body)


def _decoded(fields: Fields, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        fields.refuse("bytes", f'"{text[:40]}" is not base64 of the standard alphabet, padded with "="')
        return b""


# Rewriting


def parse_rewrite(fields: Fields) -> Rewrite:
    """Read `rewrite`."""
    with fields:
        uri, authority = fields.text("uri"), fields.text("authority")
        uri_regex: RegexRewrite | None = None
        if fields.has("uriRegexRewrite"):
            with fields.message("uriRegexRewrite") as inner:
                uri_regex = RegexRewrite(match=inner.text("match"), rewrite=inner.text("rewrite"))
                inner.required("match")
                inner.required("rewrite")
                if uri_regex.match:
                    check_regex(inner, "match", uri_regex.match)
                for name, value in (("match", uri_regex.match), ("rewrite", uri_regex.rewrite)):
                    if inner.has(name) and not value:
                        inner.refuse(name, "must not be empty")
            if uri:
                fields.refuse("uriRegexRewrite", 'cannot be set together with "uri"')
        fields.ignored("uriRegexRewrite")
        if not uri and not authority and not fields.has("uriRegexRewrite"):
            fields.problems.add(fields.at, 'one of "uri", "uriRegexRewrite", "authority" is required')
        return Rewrite(authority=authority, uri=uri, uri_regex=uri_regex)


def parse_headers(fields: Fields) -> HeaderEdits:
    """Read `headers`, of a rule or of a destination."""
    with fields, fields.message("request") as request, fields.message("response") as response:
        return HeaderEdits(
            request_set=_edits(request, "set", authority=True),
            request_add=_edits(request, "add", authority=True),
            request_remove=_removed(request),
            response_set=_edits(response, "set", authority=False),
            response_add=_edits(response, "add", authority=False),
            response_remove=_removed(response),
        )


def authorities(edits: HeaderEdits | None) -> list[str]:
    """Every authority that header edits set."""
    if edits is None:
        return []
    both = (*edits.request_set.items(), *edits.request_add.items())
    return [value for name, value in both if is_authority(name)]


def is_authority(name: str) -> bool:
    """Whether a header is the authority of the request."""
    return name.lower() in (":authority", "host")


def _edits(fields: Fields, name: str, *, authority: bool) -> dict[str, str]:
    edits = dict(fields.text_map(name))
    for key, value in edits.items():
        problem = _edited_problem(key, authority=authority) or header_value_problem(value)
        if problem:
            fields.refuse(name, problem)
    return edits


def _removed(fields: Fields) -> tuple[str, ...]:
    names = fields.texts("remove")
    for name in names:
        problem = _edited_problem(name, authority=False)
        if problem:
            fields.refuse("remove", problem)
    return names


def _edited_problem(name: str, *, authority: bool) -> str:
    if not name:
        return "the name of a header must not be empty"
    if authority and is_authority(name):
        return ""
    if name.startswith(":") or name.lower() == "host":
        return f'"{name}" cannot be changed here'
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in name):
        return f'"{name}" is not a header name'
    return ""


# Cross-origin requests


def parse_cors(fields: Fields) -> Cors:
    """Read `corsPolicy`."""
    with fields:
        origins = _origins(fields)
        methods = fields.texts("allowMethods")
        for method in methods:
            if method not in _CORS_METHODS:
                fields.refuse("allowMethods", f'"{method}" is not one of {", ".join(sorted(_CORS_METHODS))}')
        age_s = duration_s(fields, "maxAge")
        if age_s is not None and age_s != int(age_s):
            fields.refuse("maxAge", f"must be whole seconds, not {age_s:g} s")
        unmatched = fields.choice("unmatchedPreflights", ("UNSPECIFIED", "FORWARD", "IGNORE"), "UNSPECIFIED")
        return Cors(
            origins=origins,
            methods=methods,
            headers=_cors_headers(fields, "allowHeaders"),
            expose=_cors_headers(fields, "exposeHeaders"),
            max_age_s=None if age_s is None else int(age_s),
            credentials=fields.boolean_or_none("allowCredentials"),
            forward_unmatched=unmatched != "IGNORE",
        )


def _origins(fields: Fields) -> tuple[StringMatch, ...] | None:
    """`allowOrigins`, or the deprecated `allowOrigin`, which lists exact ones."""
    old = fields.texts("allowOrigin")
    if not fields.has("allowOrigins"):
        return tuple(StringMatch(how="exact", value=origin) for origin in old) if fields.has("allowOrigin") else None
    found: list[StringMatch] = []
    for item in fields.messages("allowOrigins"):
        match = parse_string_match(item, empty_prefix=True)
        if match.how == "present" or (match.how != "regex" and not match.value):
            item.problems.add(item.at, 'one of "exact", "prefix", "regex" is required and must not be empty')
        found.append(match)
    return tuple(found)


def _cors_headers(fields: Fields, name: str) -> tuple[str, ...]:
    return fields.texts(name, lambda text: text == "*" or HEADER_NAME.match(text) is not None, "a header name")
