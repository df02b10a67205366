"""Rules of routes as rules of a VirtualService, in Istio's own form. pilot/pkg/config/kube/gateway/conversion.go."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlmesh_local.resources.gateway_api.attach import ISTIO_GROUP, Fault, Surroundings
from mlmesh_local.resources.gateway_api.model import (
    BackendRef,
    CorsFilter,
    Filter,
    GrpcRouteMatch,
    HeaderFilter,
    HttpRouteMatch,
    MirrorFilter,
    RedirectFilter,
    RewriteFilter,
    Route,
    RouteRule,
    ValueMatch,
)

Document = dict[str, Any]
NOWHERE = "unresolved-backend.invalid"
"""Host of a backend that a route may not use or that is of no known kind. Istio has an empty host here."""

_SOFT = ("RefNotPermitted", "BackendNotFound", "InvalidKind")
_ANY_ORIGIN = r"^[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s?#]+$"
_RETRY_ON = ("connect-failure", "refused-stream", "unavailable", "cancelled")


class HardError(Exception):
    """A route that Istio does not convert at all."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """A route being converted: what its references are resolved with, and whether for the mesh or for gateways."""

    route: Route
    kind: str
    around: Surroundings
    mesh: bool


def duration(seconds: float) -> str:
    """Seconds as a duration."""
    return f"{round(seconds * 1000)}ms"


def rule_documents(
    route: Route, kind: str, around: Surroundings, *, mesh: bool
) -> tuple[list[tuple[Document, RouteRule]], Fault | None]:
    """Each rule of an HTTPRoute or GRPCRoute for each of its matches, and what is wrong with its references.

    Raises HardError when the whole route means nothing.
    """
    found: list[tuple[Document, RouteRule]] = []
    fault: Fault | None = None
    for position, rule in enumerate(route.rules):
        for match in rule.matches or (None,):
            document, problem = _rule(Scope(route=route, kind=kind, around=around, mesh=mesh), rule, match, position)
            found.append((document, rule))
            fault = problem or fault
    return found, fault


def _rule(
    scope: Scope, rule: RouteRule, match: HttpRouteMatch | GrpcRouteMatch | None, position: int
) -> tuple[Document, Fault | None]:
    document: Document = {"name": rule.name or f"{scope.route.meta.namespace}.{scope.route.meta.name}.{position}"}
    if match is not None:
        document["match"] = [_match(match)]
    mirror_fault: Fault | None = None
    for item in rule.filters:
        value = item.value
        if isinstance(value, HeaderFilter):
            _headers(document, item, value)
        elif isinstance(value, MirrorFilter):
            mirror_fault = _mirror(scope, document, value) or mirror_fault
        elif isinstance(value, RedirectFilter):
            document["redirect"] = _redirect(value)
        elif isinstance(value, RewriteFilter):
            _rewrite(document, value)
        elif isinstance(value, CorsFilter):
            document["corsPolicy"] = _cors(value)
        else:
            raise HardError(Fault(reason="InvalidFilter", message=f'unsupported filter type "{item.type}"'))
    _retries(document, rule)
    _timeouts(document, rule)
    if not sum(backend.weight for backend in rule.backends or ()) and "redirect" not in document:
        document["directResponse"] = {"status": 500}
        return document, mirror_fault
    destinations, fault = _destinations(scope, rule.backends or ())
    if destinations:
        document["route"] = destinations
    if fault and mirror_fault:
        fault = Fault(reason=fault.reason, message=f"{fault.message}; {mirror_fault.message}")
    return document, fault or mirror_fault


# Conditions


def _match(match: HttpRouteMatch | GrpcRouteMatch) -> Document:
    document: Document = {}
    if isinstance(match, HttpRouteMatch):
        document["uri"] = _path(match)
        if match.method:
            document["method"] = {"exact": match.method}
        if match.query:
            document["queryParams"] = _values(match.query)
    elif match.how:
        document["uri"] = _grpc_path(match)
    if match.headers:
        document["headers"] = _values(match.headers)
    return document


def _path(match: HttpRouteMatch) -> Document:
    if match.path_how == "PathPrefix":
        return {"prefix": match.path if match.path == "/" else match.path.removesuffix("/")}
    return {"exact" if match.path_how == "Exact" else "regex": match.path}


def _grpc_path(match: GrpcRouteMatch) -> Document:
    """The path of a gRPC call is /Service/Method."""
    exact = match.how == "Exact"
    if match.method is None:
        return {"prefix": f"/{match.service}/"} if exact else {"regex": f"/{match.service}/.+"}
    if match.service is None:
        return {"regex": f"/[^/]+/{match.method}"}
    return {"exact" if exact else "regex": f"/{match.service}/{match.method}"}


def _values(values: Iterable[ValueMatch]) -> Document:
    return {match.name: {"exact" if match.how == "Exact" else "regex": match.value} for match in values}


# Filters


def _headers(target: Document, item: Filter, value: HeaderFilter) -> None:
    operations: Document = {}
    if value.add:
        operations["add"] = _first(value.add)
    if value.overwrite:
        operations["set"] = _first(value.overwrite)
    if value.remove:
        operations["remove"] = list(value.remove)
    side = "request" if item.type == "RequestHeaderModifier" else "response"
    target.setdefault("headers", {})[side] = operations


def _first(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in headers:
        found.setdefault(name.lower(), value)
    return found


def _mirror(scope: Scope, document: Document, value: MirrorFilter) -> Fault | None:
    try:
        destination, fault = _destination(scope, value.backend)
    except HardError as error:
        destination, fault = {}, error.fault
    if fault is not None:
        if scope.kind == "GRPCRoute":
            # Istio gives up the whole GRPCRoute, where of an HTTPRoute it drops the mirror only.
            raise HardError(fault)
        return fault
    policy: Document = {"destination": destination}
    if value.percent is not None:
        policy["percentage"] = {"value": value.percent}
    document.setdefault("mirrors", []).append(policy)
    return None


def _redirect(value: RedirectFilter) -> Document:
    document: Document = {"redirectCode": value.status}
    if value.host:
        document["authority"] = value.host
    if value.scheme:
        document["scheme"] = value.scheme
    if value.port:
        document["port"] = value.port
    else:
        document["derivePort"] = "FROM_PROTOCOL_DEFAULT" if value.scheme else "FROM_REQUEST_PORT"
    if value.path:
        document["uri" if value.path.how == "ReplaceFullPath" else "prefixRewrite"] = value.path.value
    return document


def _rewrite(document: Document, value: RewriteFilter) -> None:
    rewrite: Document = {}
    if value.path and value.path.how == "ReplacePrefixMatch":
        rewrite["uri"] = value.path.value.removesuffix("/") or "/"
    elif value.path:
        rewrite["uriRegexRewrite"] = {"match": "/.*", "rewrite": value.path.value}
    if value.host:
        rewrite["authority"] = value.host
    if rewrite:
        document["rewrite"] = rewrite


def _cors(value: CorsFilter) -> Document:
    document: Document = {"unmatchedPreflights": "IGNORE"}
    if value.origins:
        document["allowOrigins"] = [_origin(origin) for origin in value.origins]
    if value.credentials:
        document["allowCredentials"] = True
    for name, words in (
        ("allowMethods", value.methods),
        ("allowHeaders", value.headers),
        ("exposeHeaders", value.expose),
    ):
        if words:
            document[name] = list(words)
    if value.max_age_s:
        document["maxAge"] = f"{value.max_age_s}s"
    return document


def _origin(origin: str) -> Document:
    if origin == "*":
        return {"regex": _ANY_ORIGIN}
    if "*" not in origin:
        return {"exact": origin}
    if origin.count("*") == 1 and origin.endswith("*"):
        return {"prefix": origin[:-1]}
    return {"regex": f"^{'.*'.join(quoted(part) for part in origin.split('*'))}$"}


def quoted(text: str) -> str:
    """Text as a regular expression, escaped as Go does it."""
    return re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text)


# Retries, timeouts


def _retries(document: Document, rule: RouteRule) -> None:
    if rule.retry is None:
        return
    attempts = 2 if rule.retry.attempts is None else rule.retry.attempts
    retries: Document = {"attempts": attempts}
    if attempts:
        retries["retryOn"] = ",".join([*_RETRY_ON, *map(str, rule.retry.codes)])
    if rule.retry.backoff_s is not None:
        retries["backoff"] = duration(rule.retry.backoff_s)
    document["retries"] = retries


def _timeouts(document: Document, rule: RouteRule) -> None:
    if rule.request_timeout_s:
        document["timeout"] = duration(rule.request_timeout_s)
    if rule.backend_timeout_s:
        # Without retries there is one attempt, so the two are the same.
        if "retries" in document:
            if document["retries"]["attempts"]:
                document["retries"]["perTryTimeout"] = duration(rule.backend_timeout_s)
        else:
            document["timeout"] = duration(rule.backend_timeout_s)


# Backends


def _destinations(scope: Scope, backends: tuple[BackendRef, ...]) -> tuple[list[Document], Fault | None]:
    chosen = [backend for backend in backends if backend.weight]
    found: list[Document] = []
    fault: Fault | None = None
    for backend in chosen:
        destination, problem = _destination(scope, backend)
        fault = problem or fault
        document: Document = {"destination": destination}
        if len(chosen) > 1:
            document["weight"] = backend.weight
        for item in backend.filters:
            if not isinstance(item.value, HeaderFilter):
                raise HardError(Fault(reason="InvalidFilter", message=f'unsupported filter type "{item.type}"'))
            _headers(document, item, item.value)
        found.append(document)
    return found, fault


def stream_destinations(
    rule: RouteRule, route: Route, kind: str, around: Surroundings, *, mesh: bool
) -> tuple[list[Document], Fault | None]:
    """Destinations of a TLSRoute or TCPRoute. Without any of weight above 0 connections find no cluster."""
    if not sum(backend.weight for backend in rule.backends or ()):
        nowhere = {"host": "internal.cluster.local", "subset": "zero-weight", "port": {"number": 65535}}
        return [{"destination": nowhere}], None
    return _destinations(Scope(route=route, kind=kind, around=around, mesh=mesh), rule.backends or ())


def _destination(scope: Scope, backend: BackendRef) -> tuple[Document, Fault | None]:
    own = scope.route.meta.namespace
    namespace = backend.namespace or own
    what = (backend.group, backend.kind)
    if (
        not scope.mesh
        and namespace != own
        and not scope.around.granted(
            (scope.kind, own), backend.kind if not backend.group else "", namespace, backend.name
        )
    ):
        return {"host": NOWHERE}, Fault(
            reason="RefNotPermitted",
            message=f"backendRef {backend.name}/{namespace} not accessible to a {scope.kind} in namespace "
            f'"{own}" (missing a ReferenceGrant?)',
        )
    if what == ("", "Service"):
        if "." in backend.name:
            raise HardError(
                Fault(
                    reason="InvalidDestination",
                    message="service name invalid; the name of the Service must be used, not the hostname.",
                )
            )
        host = f"{backend.name}.{namespace}.svc.{scope.around.domain}"
        missing = (namespace, backend.name) not in scope.around.services
    elif what == (ISTIO_GROUP, "Hostname"):
        if backend.namespace:
            raise HardError(Fault(reason="InvalidDestination", message="namespace may not be set with Hostname type"))
        host = backend.name
        missing = (namespace, host) not in scope.around.hosts
    else:
        return {"host": NOWHERE}, Fault(
            reason="InvalidKind",
            message=f'referencing unsupported backendRef: group "{backend.group}" kind "{backend.kind}"',
        )
    if not backend.port:
        raise HardError(Fault(reason="InvalidDestination", message="port is required in backendRef"))
    fault = Fault(reason="BackendNotFound", message=f"backend({host}) not found") if missing else None
    return {"host": host, "port": {"number": backend.port}}, fault


def precedence(document: Document) -> tuple[bool, int, int, bool, int, int]:
    """Key by which rules are ordered: exact before prefix before regular expression, then the longer path, a method,
    more headers, more query parameters; what has no condition at all comes last."""
    if not document.get("match"):
        return (True, 0, 0, True, 0, 0)
    match = document["match"][0]
    ranks = {"exact": 3, "prefix": 2, "regex": 1}
    how, path = next(iter(match["uri"].items())) if "uri" in match else ("", "")
    return (
        False,
        -ranks.get(how, -1),
        -len(path.encode()),
        "method" not in match,
        -len(match.get("headers", ())),
        -len(match.get("queryParams", ())),
    )
