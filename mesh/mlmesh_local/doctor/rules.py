"""Checks of VirtualServices and DestinationRules."""

from __future__ import annotations

import json
from collections.abc import Iterator

from mlmesh_local.doctor.model import Context, Hit
from mlmesh_local.explain.durations import text
from mlmesh_local.explain.strings import regex_matches
from mlmesh_local.resources.catalog import CatalogService
from mlmesh_local.resources.model import DestinationRule, EnvoyFilter, HttpMatch, HttpRule, VirtualService

STREAM_WINDOW_BYTES = 16 * 1024 * 1024
SMALL = 100
SERVER_MINIMUM_S = 300.0
_AMPLIFYING = frozenset({"resource-exhausted", "5xx", "retriable-4xx", "deadline-exceeded", "internal", "429"})
_LIMITER = "envoy.extensions.filters.http.local_ratelimit"

Ruled = tuple[VirtualService, int, HttpRule]


def _rules(context: Context) -> Iterator[Ruled]:
    for service in context.resources.specs(VirtualService):
        for index, rule in enumerate(service.http):
            yield service, index, rule


def _hit(service: VirtualService, index: int, *path: str | int, detail: str) -> Hit:
    name = f"{service.meta.namespace}/{service.meta.name}"
    return Hit(kind="VirtualService", name=name, path=("spec", "http", index, *path), detail=detail)


def _targets(context: Context, service: VirtualService, rule: HttpRule) -> list[CatalogService]:
    found = [context.service(one.destination.host, service.meta.namespace) for one in rule.destinations]
    return [one for one in found if one is not None]


def streams_of(context: Context, service: VirtualService, rule: HttpRule) -> list[str]:
    """Streaming paths that a rule takes: no rule before it takes them whatever else the call says."""
    paths = sorted({path for target in _targets(context, service, rule) for path in context.streams(target)})
    return [path for path in paths if _reaches(service, rule, path)]


def _reaches(service: VirtualService, rule: HttpRule, path: str) -> bool:
    for one in service.http:
        matches = [match for match in one.matches if _path_fits(match, path)]
        if one is rule:
            return bool(matches) or not one.matches
        if not one.matches or any(_only_path(match) for match in matches):
            return False
    return False


def _path_fits(match: HttpMatch, path: str) -> bool:
    uri = match.uri
    if uri is None or uri.how == "present":
        return True
    if uri.how == "regex":
        return regex_matches(uri.value, path)
    have, wanted = (path.lower(), uri.value.lower()) if match.ignore_uri_case else (path, uri.value)
    return have == wanted if uri.how == "exact" else have.startswith(wanted)


def _only_path(match: HttpMatch) -> bool:
    conditions = (match.headers, match.without_headers, match.query_params, match.source_labels, match.gateways)
    singles = (match.scheme, match.authority, match.port, match.source_namespace)
    return not any(conditions) and not any(singles)


def timeout_on_streams(context: Context) -> Iterator[Hit]:
    """MLM001."""
    for service, index, rule in _rules(context):
        if not rule.timeout_s:
            continue
        paths = streams_of(context, service, rule)
        if paths:
            more = f" and {len(paths) - 1} more" if paths[1:] else ""
            detail = f"{text(rule.timeout_s)} on a rule that takes {paths[0]}{more}"
            yield _hit(service, index, "timeout", detail=detail)


def amplifying_retries(context: Context) -> Iterator[Hit]:
    """MLM003."""
    for service, index, rule in _rules(context):
        if rule.retries is None or rule.retries.attempts <= 0:
            continue
        words = {word.strip() for word in rule.retries.retry_on.split(",")}
        loud = sorted(words & _AMPLIFYING)
        if loud:
            yield _hit(service, index, "retries", "retryOn", detail=f"retries on {', '.join(loud)}")


def retries_without_room(context: Context) -> Iterator[Hit]:
    """MLM004."""
    for service, index, rule in _rules(context):
        retries = rule.retries
        if retries is None or retries.attempts <= 0 or not rule.timeout_s or not retries.per_try_timeout_s:
            continue
        if retries.per_try_timeout_s >= rule.timeout_s:
            detail = f"each attempt may take {text(retries.per_try_timeout_s)}, all together {text(rule.timeout_s)}"
            yield _hit(service, index, "retries", "perTryTimeout", detail=detail)


def weights_on_streams(context: Context) -> Iterator[Hit]:
    """MLM011."""
    for service, index, rule in _rules(context):
        shares = [one for one in rule.destinations if one.weight]
        if len(shares) < 2:
            continue
        paths = streams_of(context, service, rule)
        if paths:
            names = ", ".join(f"{one.destination.subset or one.destination.host} {one.weight}" for one in shares)
            yield _hit(service, index, "route", detail=f"{names}; streams such as {paths[0]} stay where they began")


def unlimited_mirrors(context: Context) -> Iterator[Hit]:
    """MLM012."""
    for service, index, rule in _rules(context):
        for mirror in rule.mirrors:
            target = context.service(mirror.destination.host, service.meta.namespace)
            if target is None:
                continue
            port = mirror.destination.port or (target.ports[0].number if target.ports else 0)
            policy = context.view.traffic_policy(target, service.meta.namespace, mirror.destination.subset, port)
            pool = policy.connection_pool if policy else None
            if not (pool and pool.http2_max_requests):
                detail = f"copies go to {mirror.destination.host} {mirror.destination.subset}".rstrip()
                yield _hit(service, index, "mirror" if _single(rule) else "mirrors", detail=detail)


def _single(rule: HttpRule) -> bool:
    return len(rule.mirrors) == 1


def faults_left(context: Context) -> Iterator[Hit]:
    """MLM020."""
    for service, index, rule in _rules(context):
        if rule.fault is not None and (rule.fault.abort or rule.fault.delay):
            yield _hit(service, index, "fault", detail="calls are delayed or ended on purpose")


# DestinationRules


def _pools(context: Context) -> Iterator[tuple[DestinationRule, CatalogService]]:
    for rule in context.resources.specs(DestinationRule):
        target = context.service(rule.host, rule.meta.namespace)
        if target is not None:
            yield rule, target


def _rule_hit(rule: DestinationRule, *path: str | int, detail: str) -> Hit:
    name = f"{rule.meta.namespace}/{rule.meta.name}"
    return Hit(kind="DestinationRule", name=name, path=("spec", *path), detail=detail)


def no_keepalive(context: Context) -> Iterator[Hit]:
    """MLM006."""
    mesh = context.view.mesh_config
    everywhere = mesh is not None and getattr(mesh, "tcp_keepalive", None) is not None
    ruled: set[str] = set()
    for rule, target in _pools(context):
        ruled.add(target.host)
        pool = rule.policy.connection_pool if rule.policy else None
        alive = everywhere or (pool is not None and (pool.http2_keepalive or pool.tcp_keepalive))
        if not alive and context.streams(target):
            path = ("trafficPolicy", "connectionPool", "http")
            yield _rule_hit(rule, *path, detail=f"streams to {target.host} are not watched while they are idle")
    for host, target in context.view.services.items():
        if host not in ruled and not target.is_entry and not everywhere and context.streams(target):
            name = f"{target.namespace}/{target.name}"
            # Without a mesh that runs it is not known whether there are any.
            detail = f"no DestinationRule says how streams to {host} are watched"
            detail += "" if host in context.facts.methods else ", if it has any"
            yield Hit(kind="Service", name=name, detail=detail)


def pings_too_often(context: Context) -> Iterator[Hit]:
    """MLM007."""
    for rule, target in _pools(context):
        pool = rule.policy.connection_pool if rule.policy else None
        if pool is None or pool.http2_keepalive is None or pool.http2_keepalive[0] >= SERVER_MINIMUM_S:
            continue
        behind = [e for port in target.ports for e in context.view.endpoints(target, port.number, {})]
        bare = [endpoint for endpoint in behind if not endpoint.mesh_tls]
        if target.external or bare:
            detail = f"a ping every {text(pool.http2_keepalive[0])} to servers of {target.host} that have no sidecar"
            yield _rule_hit(rule, "trafficPolicy", "connectionPool", "http", "http2KeepAlive", detail=detail)


def one_call_a_connection(context: Context) -> Iterator[Hit]:
    """MLM016."""
    for rule, target in _pools(context):
        pool = rule.policy.connection_pool if rule.policy else None
        grpc = any(port.protocol in ("grpc", "http2") for port in target.ports)
        if grpc and pool is not None and pool.max_requests_per_connection == 1:
            path = ("trafficPolicy", "connectionPool", "http", "maxRequestsPerConnection")
            yield _rule_hit(rule, *path, detail=f"every call to {target.host} makes a connection of its own")


def small_breakers(context: Context) -> Iterator[Hit]:
    """MLM017."""
    for rule, target in _pools(context):
        pool = rule.policy.connection_pool if rule.policy else None
        if pool is None or not pool.http2_max_requests or pool.http2_max_requests >= SMALL:
            continue
        if context.streams(target):
            path = ("trafficPolicy", "connectionPool", "http", "http2MaxRequests")
            yield _rule_hit(rule, *path, detail=f"{pool.http2_max_requests} calls and open streams together")


def ejection_by_callers(context: Context) -> Iterator[Hit]:
    """MLM018."""
    for rule, target in _pools(context):
        outlier = rule.policy.outlier if rule.policy else None
        grpc = any(port.protocol in ("grpc", "http2") for port in target.ports)
        if grpc and outlier is not None and outlier.consecutive_5xx != 0:
            detail = "UNKNOWN, INTERNAL and UNIMPLEMENTED, which a caller can provoke, eject a replica"
            yield _rule_hit(rule, "trafficPolicy", "outlierDetection", detail=detail)


def limits_that_are_retried(context: Context) -> Iterator[Hit]:
    """MLM019."""
    for one in context.resources.specs(EnvoyFilter):
        for index, patch in enumerate(one.patches):
            config = json.dumps(patch.value)
            if _LIMITER in config and '"rate_limited_as_resource_exhausted": true' not in config:
                name = f"{one.meta.namespace}/{one.meta.name}"
                path = ("spec", "configPatches", index, "patch", "value")
                yield Hit(kind="EnvoyFilter", name=name, path=path, detail="what it refuses is UNAVAILABLE to clients")
