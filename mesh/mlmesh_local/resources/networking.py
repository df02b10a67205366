"""VirtualService: https://istio.io/latest/docs/reference/config/networking/virtual-service/."""

from __future__ import annotations

import re

from mlmesh_local.resources.fields import INT32_MAX, Fields, is_host
from mlmesh_local.resources.model import (
    Destination,
    Fault,
    FaultAbort,
    FaultDelay,
    HeaderEdits,
    HttpMatch,
    HttpRule,
    Meta,
    Mirror,
    Retries,
    Rewrite,
    StringMatch,
    VirtualService,
    WeightedDestination,
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
_HEADER = re.compile(r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")
# RE2, which Envoy uses, has no look-around and no back-references.
_NOT_RE2 = re.compile(r"\(\?(?:=|!|<=|<!|>|\()|(?<!\\)\\[1-9]")


def parse_virtual_service(meta: Meta, spec: Fields) -> VirtualService:
    """Read a VirtualService's spec."""
    hosts = spec.texts("hosts", is_host, "a host name")
    if not hosts:
        spec.problems.add(spec.at, '"hosts" needs at least one host')
    gateways = spec.texts("gateways")
    spec.unsupported("tcp", "tls", why="the laptop mesh routes HTTP/2 and HTTP (spec.http) only")
    rules = tuple(_rule(fields) for fields in spec.messages("http"))
    if not rules:
        spec.problems.add(spec.at, '"http" needs at least one rule')
    return VirtualService(
        meta=meta,
        hosts=tuple(host.lower() for host in hosts),
        gateways=gateways or ("mesh",),
        export_to=export_to(spec),
        http=rules,
    )


def export_to(spec: Fields) -> tuple[str, ...]:
    """`exportTo`: "*" (everyone, the default), "." (the own namespace) or namespaces."""
    return spec.texts("exportTo") or ("*",)


def _rule(fields: Fields) -> HttpRule:
    with fields:
        fields.unsupported("redirect", "directResponse", "delegate", "corsPolicy", "mirrorPercent", "mirror_percent")
        destinations = _destinations(fields)
        return HttpRule(
            name=fields.text("name"),
            matches=tuple(_match(item) for item in fields.messages("match")),
            destinations=destinations,
            timeout_s=fields.duration_s("timeout", low_s=0.0),
            retries=_retries(fields),
            fault=_fault(fields),
            mirrors=_mirrors(fields),
            headers=_headers(fields),
            rewrite=_rewrite(fields),
            at=fields.at,
        )


def _destinations(fields: Fields) -> tuple[WeightedDestination, ...]:
    result: list[WeightedDestination] = []
    for item in fields.messages("route"):
        with item:
            destination = _destination(item.message("destination")) if item.required("destination") else None
            item.ignored("destination")
            weight = item.integer("weight", low=0, high=INT32_MAX)
            headers = _headers(item)
            if destination:
                result.append(WeightedDestination(destination=destination, weight=weight or 0, headers=headers))
    if not result and not fields.has("route"):
        fields.problems.add(fields.at, '"route" needs at least one destination')
    if len(result) > 1:
        total = sum(destination.weight for destination in result)
        if total == 0:
            fields.refuse("route", "the weights sum to zero")
        elif total >= 2**32:
            fields.refuse("route", f"the weights sum to {total}, more than {2**32 - 1}")
    return tuple(result)


def _destination(fields: Fields) -> Destination:
    with fields:
        host = fields.host("host", required=True)
        if host.startswith("*"):
            fields.refuse("host", "a destination cannot be a wildcard")
        port = 0
        if fields.has("port"):
            with fields.message("port") as inner:
                port = inner.port("number", required=True)
        fields.ignored("port")
        return Destination(host=host, subset=fields.text("subset"), port=port, at=fields.at)


def _match(fields: Fields) -> HttpMatch:
    with fields:
        fields.unsupported("statPrefix")
        return HttpMatch(
            name=fields.text("name"),
            uri=_string_match(fields, "uri"),
            ignore_uri_case=fields.boolean("ignoreUriCase"),
            scheme=_string_match(fields, "scheme"),
            method=_string_match(fields, "method"),
            authority=_string_match(fields, "authority"),
            headers=_string_matches(fields, "headers"),
            without_headers=_string_matches(fields, "withoutHeaders"),
            query_params=_string_matches(fields, "queryParams"),
            port=fields.port("port"),
            source_labels=fields.text_map("sourceLabels"),
            source_namespace=fields.text("sourceNamespace"),
            gateways=fields.texts("gateways"),
            at=fields.at,
        )


def _string_matches(fields: Fields, name: str) -> tuple[tuple[str, StringMatch], ...]:
    result: list[tuple[str, StringMatch]] = []
    for key, node, at in fields.entries(name):
        match = _string_match_of(Fields(node, at, fields.problems), present=True)
        if key.startswith("@"):
            fields.problems.add(at, "not supported: matching JWT claims needs RequestAuthentication")
        elif name != "queryParams" and not _HEADER.match(key):
            fields.problems.add(
                at, f'"{key}" is not a header name; match :method, :path and :authority by their own fields'
            )
        elif match:
            result.append((key.lower() if name != "queryParams" else key, match))
    return tuple(sorted(result, key=lambda entry: entry[0]))


def _string_match(fields: Fields, name: str) -> StringMatch | None:
    if not fields.has(name):
        fields.ignored(name)
        return None
    return _string_match_of(fields.message(name), present=False)


def _string_match_of(fields: Fields, *, present: bool) -> StringMatch | None:
    with fields:
        how = fields.one_of("exact", "prefix", "regex")
        values = {name: fields.text(name) for name in ("exact", "prefix", "regex")}
        if not how:
            if present:
                return StringMatch(how="present")
            if not fields.names():
                fields.problems.add(fields.at, 'one of "exact", "prefix", "regex" is required')
            return None
        value = values[how]
        if how == "regex":
            # In Istio "*" is no regular expression but "whatever value".
            if value == "*" and present:
                return StringMatch(how="present")
            check_regex(fields, how, value)
            return StringMatch(how="regex", value=value)
        if not value:
            fields.refuse(how, "must not be empty")
        return StringMatch(how="exact" if how == "exact" else "prefix", value=value)


def check_regex(fields: Fields, name: str, value: str) -> None:
    """Note a problem when it is not a regular expression that Envoy's RE2 takes."""
    try:
        re.compile(value)
    except re.error as error:
        fields.refuse(name, f'"{value}" is not a regular expression: {error}')
        return
    if not value:
        fields.refuse(name, "must not be empty")
    elif _NOT_RE2.search(value):
        fields.refuse(name, f'"{value}" uses look-around or back-references, which Envoy (RE2) does not have')


def _retries(fields: Fields) -> Retries | None:
    if not fields.has("retries"):
        fields.ignored("retries")
        return None
    with fields.message("retries") as inner:
        inner.unsupported("retryRemoteLocalities", why="the laptop mesh has no localities")
        attempts = inner.integer("attempts", low=0, high=INT32_MAX)
        if attempts == 0 and (inner.has("retryOn") or inner.has("perTryTimeout")):
            inner.refuse("attempts", "0 turns retries off, so perTryTimeout and retryOn mean nothing")
        per_try_timeout_s = inner.duration_s("perTryTimeout", low_s=0.0)
        return Retries(
            attempts=attempts or 0,
            per_try_timeout_s=per_try_timeout_s,
            retry_on=_retry_on(inner),
            ignore_previous_hosts=inner.boolean_or_none("retryIgnorePreviousHosts"),
            backoff_s=inner.duration_s("backoff"),
        )


def _retry_on(fields: Fields) -> str:
    value = fields.text("retryOn")
    for part in filter(None, (word.strip() for word in value.split(","))):
        known = part in RETRY_ON or (part.isdigit() and 100 <= int(part) <= 599)
        if not known:
            fields.refuse("retryOn", f'"{part}" is no retry condition{did_you_mean(part, RETRY_ON)}')
    return value


def _fault(fields: Fields) -> Fault | None:
    fields.ignored("fault")
    if not fields.has("fault"):
        return None
    with fields.message("fault") as fault:
        fault.ignored("delay", "abort")
        delay = abort = None
        if fault.has("delay"):
            with fault.message("delay") as inner:
                delay = _delay(inner)
        if fault.has("abort"):
            with fault.message("abort") as inner:
                abort = _abort(inner)
        return Fault(delay=delay, abort=abort)


def _delay(fields: Fields) -> FaultDelay:
    fields.unsupported("exponentialDelay", why="Istio itself does not support it")
    percent = fields.percent("percentage")
    whole = fields.integer("percent", low=0, high=100)
    fields.required("fixedDelay")
    # Istio: without a percentage no request is delayed.
    chosen = percent if percent is not None else float(whole or 0)
    return FaultDelay(fixed_delay_s=fields.duration_s("fixedDelay") or 0.001, percent=chosen)


def _abort(fields: Fields) -> FaultAbort:
    fields.unsupported("http2Error", why="Istio itself does not support it")
    fields.one_of("httpStatus", "grpcStatus", required=True)
    grpc_status: str | None = None
    if fields.has("grpcStatus"):
        grpc_status = fields.choice("grpcStatus", GRPC_STATUS) or None
    fields.ignored("grpcStatus")
    percent = fields.percent("percentage")
    http_status = fields.integer("httpStatus", low=200, high=599)
    return FaultAbort(http_status=http_status, grpc_status=grpc_status, percent=percent or 0.0)


def _mirrors(fields: Fields) -> tuple[Mirror, ...]:
    result: list[Mirror] = []
    percent = fields.percent("mirrorPercentage")
    if fields.has("mirror"):
        destination = _destination(fields.message("mirror"))
        result.append(Mirror(destination=destination, percent=100.0 if percent is None else percent))
    elif percent is not None:
        fields.refuse("mirrorPercentage", 'needs "mirror"')
    fields.ignored("mirror")
    for item in fields.messages("mirrors"):
        with item:
            share = item.percent("percentage")
            if item.required("destination"):
                destination = _destination(item.message("destination"))
                result.append(Mirror(destination=destination, percent=100.0 if share is None else share))
            item.ignored("destination")
    # 0 % means no mirror, as in Istio.
    return tuple(mirror for mirror in result if mirror.percent > 0)


def _rewrite(fields: Fields) -> Rewrite | None:
    if not fields.has("rewrite"):
        fields.ignored("rewrite")
        return None
    with fields.message("rewrite") as inner:
        inner.unsupported("uriRegexRewrite")
        return Rewrite(authority=inner.text("authority"), uri=inner.text("uri"))


def _headers(fields: Fields) -> HeaderEdits | None:
    if not fields.has("headers"):
        fields.ignored("headers")
        return None
    with fields.message("headers") as inner, inner.message("request") as request, inner.message("response") as response:
        return HeaderEdits(
            request_set=_edits(request, "set"),
            request_add=_edits(request, "add"),
            request_remove=request.texts("remove", lambda name: bool(_HEADER.match(name)), "a header name"),
            response_set=_edits(response, "set"),
            response_add=_edits(response, "add"),
            response_remove=response.texts("remove", lambda name: bool(_HEADER.match(name)), "a header name"),
        )


def _edits(fields: Fields, name: str) -> dict[str, str]:
    edits = dict(fields.text_map(name))
    for key in edits:
        if not _HEADER.match(key) and key != ":authority":
            fields.refuse(name, f'"{key}" is not a header name')
    return edits
