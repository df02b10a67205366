"""HTTPRoute, GRPCRoute, TLSRoute and TCPRoute: https://gateway-api.sigs.k8s.io/reference/spec/."""

from __future__ import annotations

import re
from collections.abc import Callable

from mlmesh_local.resources.domains import is_ip
from mlmesh_local.resources.fields import Fields, parse_duration
from mlmesh_local.resources.gateway_api.filters import (
    GRPC_FILTERS,
    HTTP_FILTERS,
    read_backends,
    read_filters,
    repeated,
)
from mlmesh_local.resources.gateway_api.model import (
    Filter,
    GrpcRoute,
    GrpcRouteMatch,
    HttpRoute,
    HttpRouteMatch,
    PathChange,
    RedirectFilter,
    RewriteFilter,
    RouteRetry,
    RouteRule,
    TcpRoute,
    TlsRoute,
    ValueMatch,
)
from mlmesh_local.resources.gateway_api.reading import (
    DURATION,
    HEADER_NAME,
    SECTION_NAME,
    at_most,
    hostnames,
    parent_refs,
    text,
)
from mlmesh_local.resources.meta import Meta

RULES_MAX = 16
MATCHES_MAX = 64
ALL_MATCHES_MAX = 128
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
_PATH = re.compile(r"^(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|[%][0-9a-fA-F]{2})+\Z")
_NAME_MAX = 1024
_SERVICE = re.compile(r"^\.?[a-z_][a-z_0-9]*(\.[a-z_][a-z_0-9]*)*\Z", re.IGNORECASE)
_METHOD = re.compile(r"^[A-Za-z_][A-Za-z_0-9]*\Z")
_SESSION = "Istio ignores sessionPersistence; use a DestinationRule with consistentHash"


def parse_http_route(meta: Meta, spec: Fields) -> HttpRoute:
    """Read an HTTPRoute's spec."""
    _no_default_gateways(spec)
    rules = _rules(spec, _http_rule) if spec.has("rules") else (RouteRule(matches=(HttpRouteMatch(),), at=spec.at),)
    spec.ignored("rules")
    return HttpRoute(meta=meta, parents=parent_refs(spec), hostnames=hostnames(spec), rules=rules)


def parse_grpc_route(meta: Meta, spec: Fields) -> GrpcRoute:
    """Read a GRPCRoute's spec."""
    _no_default_gateways(spec)
    return GrpcRoute(
        meta=meta, parents=parent_refs(spec), hostnames=hostnames(spec), rules=_rules(spec, _grpc_rule, shortest=0)
    )


def parse_tls_route(meta: Meta, spec: Fields) -> TlsRoute:
    """Read a TLSRoute's spec."""
    _no_default_gateways(spec)
    names = hostnames(spec, limit=1024)
    if not names:
        spec.problems.add(spec.at, '"hostnames" needs at least one host name')
    for name in names:
        if is_ip(name):
            spec.refuse("hostnames", f'"{name}" is an IP address')
    return TlsRoute(meta=meta, parents=parent_refs(spec), hostnames=names, rules=_rules(spec, _stream_rule, limit=1))


def parse_tcp_route(meta: Meta, spec: Fields) -> TcpRoute:
    """Read a TCPRoute's spec."""
    _no_default_gateways(spec)
    return TcpRoute(meta=meta, parents=parent_refs(spec), hostnames=(), rules=_rules(spec, _stream_rule, limit=1))


def _no_default_gateways(spec: Fields) -> None:
    spec.unsupported("useDefaultGateways", why="Istio has no default gateways")


def _rules(
    spec: Fields, read: Callable[[Fields], RouteRule], *, limit: int = RULES_MAX, shortest: int = 1
) -> tuple[RouteRule, ...]:
    found = tuple(read(item) for item in spec.messages("rules"))
    if len(found) < shortest:
        spec.problems.add(spec.at, '"rules" needs at least one rule')
    at_most(spec, "rules", len(found), limit)
    if sum(len(rule.matches) for rule in found) > ALL_MATCHES_MAX:
        spec.refuse("rules", f"have more than {ALL_MATCHES_MAX} matches in all")
    repeated(spec, "rules", [rule.name for rule in found if rule.name])
    return found


def _name(fields: Fields) -> str:
    return text(fields, "name", SECTION_NAME, "the name of a rule")


def _http_rule(fields: Fields) -> RouteRule:
    with fields:
        fields.unsupported("sessionPersistence", why=_SESSION)
        if fields.has("matches"):
            matches = tuple(_http_match(item) for item in fields.messages("matches"))
        else:
            fields.ignored("matches")
            matches = (HttpRouteMatch(),)
        at_most(fields, "matches", len(matches), MATCHES_MAX)
        filters = read_filters(fields, HTTP_FILTERS)
        backends = read_backends(fields, HTTP_FILTERS)
        if backends and any(item.type == "RequestRedirect" for item in filters):
            fields.refuse("filters", "RequestRedirect does not go with backendRefs: nothing would be sent to them")
        _prefix_change(fields, filters, matches)
        request_s, backend_s = _timeouts(fields)
        return RouteRule(
            name=_name(fields),
            matches=matches,
            filters=filters,
            backends=backends,
            request_timeout_s=request_s,
            backend_timeout_s=backend_s,
            retry=_retry(fields),
            at=fields.at,
        )


def _prefix_change(fields: Fields, filters: tuple[Filter, ...], matches: tuple[HttpRouteMatch, ...]) -> None:
    """A prefix can be replaced only where exactly one prefix was matched."""
    for item in filters:
        change: PathChange | None = None
        if isinstance(item.value, RedirectFilter | RewriteFilter):
            change = item.value.path
        if (
            change
            and change.how == "ReplacePrefixMatch"
            and not (len(matches) == 1 and matches[0].path_how == "PathPrefix")
        ):
            fields.problems.add(item.at, "replacePrefixMatch needs exactly one match, whose path is a PathPrefix")


def _http_match(fields: Fields) -> HttpRouteMatch:
    with fields:
        how, path = "PathPrefix", "/"
        if fields.has("path"):
            with fields.message("path") as inner:
                how = inner.choice("type", ("Exact", "PathPrefix", "RegularExpression"), "PathPrefix")
                path = text(inner, "value", None, "a path", default="/", longest=1024, shortest=0)
                if how != "RegularExpression":
                    _check_path(inner, path)
        fields.ignored("path")
        return HttpRouteMatch(
            path_how=how,
            path=path,
            headers=_values(fields, "headers", longest=4096),
            query=_values(fields, "queryParams", longest=1024),
            method=fields.choice("method", _METHODS),
        )


def _check_path(fields: Fields, path: str) -> None:
    if not path.startswith("/"):
        fields.refuse("value", f'"{path}" must begin with "/"')
        return
    for part in ("//", "/./", "/../", "%2f", "%2F", "#"):
        if part in path:
            fields.refuse("value", f'"{path}" must not contain "{part}"')
            return
    if path.endswith(("/..", "/.")):
        fields.refuse("value", f'"{path}" must not end with "/.." or "/."')
    elif not _PATH.match(path):
        fields.refuse("value", f'"{path}" has a character that a path cannot have')


def _values(fields: Fields, name: str, *, longest: int) -> tuple[ValueMatch, ...]:
    found: list[ValueMatch] = []
    for item in fields.messages(name):
        with item:
            found.append(
                ValueMatch(
                    name=text(item, "name", HEADER_NAME, "a name", required=True, longest=256),
                    how=item.choice("type", ("Exact", "RegularExpression"), "Exact"),
                    value=text(item, "value", None, "a value", required=True, longest=longest),
                )
            )
    at_most(fields, name, len(found), 16)
    repeated(fields, name, [match.name for match in found])
    return tuple(found)


def _timeouts(fields: Fields) -> tuple[float | None, float | None]:
    if not fields.has("timeouts"):
        fields.ignored("timeouts")
        return None, None
    with fields.message("timeouts") as inner:
        request_s, backend_s = _duration(inner, "request"), _duration(inner, "backendRequest")
        if request_s and backend_s and backend_s > request_s:
            inner.refuse("backendRequest", "must not be longer than the timeout of the request")
        return request_s, backend_s


def _duration(fields: Fields, name: str) -> float | None:
    value = text(fields, name, DURATION, 'a duration such as "500ms", "5s" or "1m30s"')
    return parse_duration(value) if value else None


def _retry(fields: Fields) -> RouteRetry | None:
    if not fields.has("retry"):
        fields.ignored("retry")
        return None
    with fields.message("retry") as inner:
        codes: list[int] = []
        for item, at in inner.items("codes"):
            if isinstance(item.value, int) and not isinstance(item.value, bool) and 400 <= item.value <= 599:
                codes.append(item.value)
            else:
                inner.problems.add(at, "must be an HTTP status, 400 to 599")
        return RouteRetry(
            codes=tuple(codes), attempts=inner.integer("attempts", low=1), backoff_s=_duration(inner, "backoff")
        )


def _grpc_rule(fields: Fields) -> RouteRule:
    with fields:
        fields.unsupported("sessionPersistence", why=_SESSION)
        matches = tuple(_grpc_match(item) for item in fields.messages("matches"))
        at_most(fields, "matches", len(matches), MATCHES_MAX)
        return RouteRule(
            name=_name(fields),
            matches=matches,
            filters=read_filters(fields, GRPC_FILTERS),
            backends=read_backends(fields, GRPC_FILTERS),
            at=fields.at,
        )


def _grpc_match(fields: Fields) -> GrpcRouteMatch:
    with fields:
        headers = _values(fields, "headers", longest=4096)
        if not fields.has("method"):
            fields.ignored("method")
            return GrpcRouteMatch(headers=headers)
        with fields.message("method") as inner:
            how = inner.choice("type", ("Exact", "RegularExpression"), "Exact")
            service = inner.text("service") if inner.has("service") else None
            method = inner.text("method") if inner.has("method") else None
            inner.ignored("service", "method")
            if service is None and method is None:
                inner.problems.add(inner.at, 'one of "service", "method" is required')
            for name, text in (("service", service), ("method", method)):
                if text is not None and len(text) > _NAME_MAX:
                    inner.refuse(name, f"must have at most {_NAME_MAX} characters, not {len(text)}")
            if how == "Exact" and service is not None and not _SERVICE.match(service):
                inner.refuse("service", f'"{service}" is not the name of a gRPC service')
            if how == "Exact" and method is not None and not _METHOD.match(method):
                inner.refuse("method", f'"{method}" is not the name of a gRPC method')
        return GrpcRouteMatch(how=how, service=service, method=method, headers=headers)


def _stream_rule(fields: Fields) -> RouteRule:
    with fields:
        backends = read_backends(fields, ())
        if not backends:
            fields.problems.add(fields.at, '"backendRefs" needs at least one backend')
        return RouteRule(name=_name(fields), backends=backends, at=fields.at)
