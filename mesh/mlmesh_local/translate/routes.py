"""Rules of VirtualServices as Envoy's routes, and the route that a service has without any rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.model import (
    Fault,
    HashKey,
    HeaderEdits,
    HttpMatch,
    HttpRule,
    Mirror,
    Retries,
    VirtualService,
    WeightedDestination,
)
from mlmesh_local.resources.networking import GRPC_STATUS
from mlmesh_local.translate import names
from mlmesh_local.translate.matches import ANYTHING, applies, is_catch_all, route_match
from mlmesh_local.translate.names import fraction, seconds
from mlmesh_local.translate.view import View, effective_policy, load_balancer_of

FAULT_FILTER = "envoy.filters.http.fault"
# pilot/pkg/networking/core/route/retry/retry.go
DEFAULT_RETRY_ON = "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes"
_PREVIOUS_HOSTS: Json = {
    "name": "envoy.retry_host_predicates.previous_hosts",
    "typed_config": typed("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Where routes are made for: a proxy, one of its gateways ("mesh" for a sidecar), a port, tracing of the port."""

    view: View
    proxy: ProxyNode
    gateway: str
    listener_port: int
    tracing: Json | None


def rule_routes(frame: Frame, service: VirtualService) -> list[Json]:
    """Routes of a VirtualService, one for each match, up to the first that takes everything."""
    routes: list[Json] = []
    for rule in service.http:
        for match in rule.matches or (None,):
            if not applies(match, frame.proxy, frame.gateway, service.meta.namespace, frame.listener_port):
                continue
            route = _route(frame, service, rule, match)
            routes.append(route)
            if is_catch_all(route["match"]):
                return routes
    return routes


def default_route(frame: Frame, host: str, port: int) -> Json:
    """The route of a service that no VirtualService speaks of."""
    service = frame.view.services[host]
    balancer = load_balancer_of(effective_policy(frame.view.policy(service, frame.proxy.namespace), "", port))
    action: Json = {
        "cluster": names.outbound_cluster(port, "", host),
        **_timeouts(None),
        # Only routes of VirtualServices keep retries of hashed calls on their host, in Istio too.
        "retry_policy": retry_policy(None, hashed=False),
    }
    if balancer.hash_key:
        action["hash_policy"] = [_hash_policy(balancer.hash_key)]
    route: Json = {"name": "default", "match": dict(ANYTHING), "route": action}
    return _observed(frame, route, f"{host}:{port}/*")


def _route(frame: Frame, service: VirtualService, rule: HttpRule, match: HttpMatch | None) -> Json:
    namespace = service.meta.namespace
    route: Json = {"match": route_match(match)}
    name = ".".join(part for part in (rule.name, match.name if match else "") if part)
    if name:
        route["name"] = name
    authority = _apply_headers(route, rule.headers)
    action: Json = dict(_timeouts(rule.timeout_s))
    if rule.rewrite:
        if rule.rewrite.uri:
            action["prefix_rewrite"] = rule.rewrite.uri
        authority = rule.rewrite.authority or authority
    if authority:
        action["host_rewrite_literal"] = authority
    mirrors = [_mirror(frame, mirror, namespace) for mirror in rule.mirrors]
    if mirrors:
        action["request_mirror_policies"] = mirrors
    hashed = _apply_destinations(frame, route, action, rule, namespace)
    retries = retry_policy(rule.retries, hashed=hashed)
    if retries:
        action["retry_policy"] = retries
    route["route"] = action
    if rule.fault and (rule.fault.delay or rule.fault.abort):
        route["typed_per_filter_config"] = {FAULT_FILTER: _fault(rule.fault)}
    return _observed(frame, route, _operation(frame, route, service))


def _observed(frame: Frame, route: Json, operation: str) -> Json:
    route["decorator"] = {"operation": operation}
    if frame.tracing:
        route["tracing"] = frame.tracing
    return route


def _operation(frame: Frame, route: Json, service: VirtualService) -> str:
    """Istio's name for the span: where a single destination is known its host, else the VirtualService."""
    match = route["match"]
    path = f"{match['prefix']}*" if "prefix" in match else match.get("path") or match["safe_regex"]["regex"]
    cluster = route["route"].get("cluster", "")
    if cluster.startswith("outbound|"):
        _, port, _, host = cluster.split("|")
        return f"{host}:{port}{path}"
    return f"{service.meta.name}:{frame.listener_port}{path}"


def _timeouts(timeout_s: float | None) -> Json:
    """Istio's pair: the route's timeout also bounds what a gRPC client asks for; 0 leaves the client's deadline."""
    text = seconds(timeout_s or 0.0)
    return {"timeout": text, "max_grpc_timeout": text}


def retry_policy(retries: Retries | None, *, hashed: bool) -> Json | None:
    """Istio's default policy with what the rule overrides; None where attempts are 0."""
    policy: Json = {
        "retry_on": DEFAULT_RETRY_ON,
        "num_retries": 2,
        "host_selection_retry_max_attempts": 5,
        "retry_host_predicate": [] if hashed else [_PREVIOUS_HOSTS],
    }
    if retries is None:
        return policy
    if retries.attempts <= 0:
        return None
    policy["num_retries"] = retries.attempts
    if retries.retry_on:
        words = [word.strip() for word in retries.retry_on.split(",") if word.strip()]
        codes = [int(word) for word in words if word.isdigit()]
        conditions = [word for word in words if not word.isdigit()]
        if codes and "retriable-status-codes" not in conditions:
            conditions.append("retriable-status-codes")
        policy["retry_on"] = ",".join(conditions)
        policy["retriable_status_codes"] = codes
    if retries.per_try_timeout_s is not None:
        policy["per_try_timeout"] = seconds(retries.per_try_timeout_s)
    if retries.ignore_previous_hosts is not None:
        policy["retry_host_predicate"] = [_PREVIOUS_HOSTS] if retries.ignore_previous_hosts else []
    if retries.backoff_s is not None:
        policy["retry_back_off"] = {"base_interval": seconds(retries.backoff_s)}
    return policy


def _apply_destinations(frame: Frame, route: Json, action: Json, rule: HttpRule, namespace: str) -> bool:
    """Set where the action sends. True when the only destination is chosen by hash."""
    hashes: list[Json] = []
    if len(rule.destinations) == 1:
        only = rule.destinations[0]
        action["cluster"] = _cluster(frame, only, namespace, hashes)
        authority = _apply_headers(route, only.headers)
        if authority and "host_rewrite_literal" not in action:
            action["host_rewrite_literal"] = authority
    else:
        weighted: list[Json] = []
        # Istio drops destinations of weight 0.
        for destination in (item for item in rule.destinations if item.weight):
            entry: Json = {
                "name": _cluster(frame, destination, namespace, hashes),
                "weight": destination.weight,
            }
            authority = _apply_headers(entry, destination.headers)
            if authority:
                entry["host_rewrite_literal"] = authority
            weighted.append(entry)
        action["weighted_clusters"] = {"clusters": weighted}
    if hashes:
        action["hash_policy"] = hashes
    return bool(hashes) and len(rule.destinations) == 1


def _cluster(frame: Frame, weighted: WeightedDestination, namespace: str, hashes: list[Json]) -> str:
    destination = weighted.destination
    found = frame.view.destination(destination, namespace, frame.listener_port)
    if found is None:
        return names.BLACK_HOLE
    service, port = found
    policy = frame.view.policy(service, frame.proxy.namespace)
    if destination.subset and policy.subset(destination.subset) is None:
        return names.BLACK_HOLE
    balancer = load_balancer_of(effective_policy(policy, destination.subset, port))
    if balancer.hash_key:
        hashes.append(_hash_policy(balancer.hash_key))
    return names.outbound_cluster(port, destination.subset, service.host)


def _hash_policy(key: HashKey) -> Json:
    if key.how == "header":
        return {"header": {"header_name": key.name}}
    if key.how == "query":
        return {"query_parameter": {"name": key.name}}
    if key.how == "source_ip":
        return {"connection_properties": {"source_ip": True}}
    cookie: Json = {"name": key.name}
    if key.cookie_ttl_s is not None:
        cookie["ttl"] = seconds(key.cookie_ttl_s)
    if key.cookie_path:
        cookie["path"] = key.cookie_path
    return {"cookie": cookie}


def _mirror(frame: Frame, mirror: Mirror, namespace: str) -> Json:
    as_weighted = WeightedDestination(destination=mirror.destination, weight=1, headers=None)
    return {
        "cluster": _cluster(frame, as_weighted, namespace, []),
        "runtime_fraction": {"default_value": fraction(mirror.percent)},
        "trace_sampled": False,
    }


def _fault(fault: Fault) -> Json:
    result: Json = {}
    if fault.delay:
        result["delay"] = {
            "fixed_delay": seconds(fault.delay.fixed_delay_s),
            "percentage": fraction(fault.delay.percent),
        }
    if fault.abort:
        abort: Json = {"percentage": fraction(fault.abort.percent)}
        if fault.abort.grpc_status is not None:
            abort["grpc_status"] = GRPC_STATUS.index(fault.abort.grpc_status)
        else:
            abort["http_status"] = fault.abort.http_status
        result["abort"] = abort
    return typed("envoy.extensions.filters.http.fault.v3.HTTPFault", result)


def _apply_headers(target: Json, edits: HeaderEdits | None) -> str:
    """Add header edits to a route or weighted cluster. Returns the authority that they set, if any."""
    if edits is None:
        return ""
    groups = (
        ("request_headers_to_add", edits.request_set, edits.request_add),
        ("response_headers_to_add", edits.response_set, edits.response_add),
    )
    for field, overwrite, append in groups:
        options = [*_options(overwrite, "OVERWRITE_IF_EXISTS_OR_ADD"), *_options(append, "APPEND_IF_EXISTS_OR_ADD")]
        if options:
            target[field] = [*target.get(field, []), *options]
    for field, removed in (
        ("request_headers_to_remove", edits.request_remove),
        ("response_headers_to_remove", edits.response_remove),
    ):
        kept = [name for name in removed if not _is_internal(name)]
        if kept:
            target[field] = [*target.get(field, []), *kept]
    return _authority(edits.request_set) or _authority(edits.request_add)


def _options(headers: Mapping[str, str], action: str) -> list[Json]:
    return [
        {"header": {"key": name, "value": headers[name]}, "append_action": action}
        for name in sorted(headers)
        if not _is_internal(name)
    ]


def _authority(headers: Mapping[str, str]) -> str:
    return next((value for name, value in headers.items() if name.lower() in (":authority", "host")), "")


def _is_internal(name: str) -> bool:
    return name.startswith(":") or name.lower() == "host"
