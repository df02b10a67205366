"""Rules of VirtualServices as Envoy's routes, and the route that a service has without any rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import CatalogService, HostPolicy
from mlmesh_local.resources.gateway_api.rules import NOWHERE
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model import HashKey, TrafficPolicy
from mlmesh_local.resources.model_routes import (
    Destination,
    HttpMatch,
    HttpRule,
    Mirror,
    Retries,
    VirtualService,
    WeightedDestination,
)
from mlmesh_local.translate import names
from mlmesh_local.translate.matches import ANYTHING, applies, is_catch_all, route_match
from mlmesh_local.translate.names import fraction
from mlmesh_local.translate.proxy_headers import headers_of
from mlmesh_local.translate.route_actions import (
    CORS_FILTER,
    FAULT_FILTER,
    apply_headers,
    apply_rewrite,
    cors_config,
    direct_response_action,
    fault_config,
    hash_policy,
    redirect_action,
    retry_policy,
    timeouts,
)
from mlmesh_local.translate.view import View

GATEWAY_SEMANTICS = "gateway"
UNKNOWN_SERVICE = "UnknownService"
"""Istio's cluster, which there is not, of references of the Gateway API that lead nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Where routes are made for.

    Attributes:
        view, proxy: the world, and who is told.
        gateway: one of the proxy's gateways, "mesh" for a sidecar.
        listener_port: where the calls come in.
        tracing: tracing of the port.
        tls: whether the listener ends TLS.
        services: in which a destination without a port looks for its only one. Istio's sidecars know only the
            listener's own port there, so theirs is empty.
    """

    view: View
    proxy: ProxyNode
    gateway: str
    listener_port: int
    tracing: Json | None
    tls: bool = False
    services: Mapping[str, CatalogService] = field(default_factory=dict)

    def cluster(self, destination: Destination) -> str:
        """Cluster of a destination: the port named, else the service's only one, else that of the listener.

        It need not exist: Envoy answers 503 then, as behind Istio.
        """
        if destination.host == NOWHERE:
            return UNKNOWN_SERVICE
        # As of its services, a sidecar knows of its aliases those of the listener's port only.
        alias = self.view.alias_seen_by(self.proxy, destination.host, 0 if self.services else self.listener_port)
        service = self.services.get(destination.host) or alias
        port = destination.port or self.listener_port
        if not destination.port and service is not None and len(service.ports) == 1:
            port = service.ports[0].number
        return names.outbound_cluster(port, destination.subset, alias.alias_for if alias else destination.host)

    def hash_key(self, destination: Destination) -> HashKey | None:
        """What consistent hashing of a destination looks at, by Istio's order; None where it does not hash."""
        service = self.view.service_seen_by(self.proxy, destination.host)
        service = service or self.view.alias_seen_by(self.proxy, destination.host)
        if service is None:
            return None
        policy = self.view.policy(service, self.proxy)
        subset = policy.subset(destination.subset) if destination.subset else None
        return (
            _key_of_port(subset.policy if subset else None, destination.port)
            or _key(subset.policy if subset else None)
            or _key_of_port(policy.policy, destination.port)
            or _key(policy.policy)
        )

    @property
    def default_retries(self) -> Retries | None:
        """The mesh's policy of retries, where it has one."""
        return self.view.mesh_config.default_http_retry_policy if self.view.mesh_config else None


def provenance(meta: Meta, ours: Json | None = None) -> Json:
    """core.v3.Metadata that says which resource a piece of configuration was made of: Istio's form, and our own."""
    group = f"networking.istio.io/v1/namespaces/{meta.namespace}/virtual-service/{meta.name}"
    metadata: Json = {"istio": {"config": f"/apis/{group}"}}
    if ours:
        metadata["mlmesh"] = ours
    return {"filter_metadata": metadata}


def rule_routes(frame: Frame, service: VirtualService) -> list[Json]:
    """Routes of a VirtualService, one for each match, up to the first that takes everything."""
    routes: list[Json] = []
    for rule in service.http:
        for match in rule.matches or (None,):
            if not applies(match, frame.proxy, frame.gateway, service.meta.namespace, frame.listener_port):
                continue
            route = _route(frame, service, rule, match)
            routes.append(route)
            if match is not None and is_catch_all(route["match"]):
                return routes
        if not rule.matches:
            return routes
    return routes


def default_route(frame: Frame, service: CatalogService, port: int) -> Json:
    """The route of a service that no VirtualService speaks of."""
    action: Json = {"cluster": names.outbound_cluster(port, "", service.host), **timeouts(None)}
    # Only routes of VirtualServices keep retries of hashed calls on their host, in Istio too.
    retries = retry_policy(frame.default_retries, hashed=False)
    if retries:
        action["retry_policy"] = retries
    policy: HostPolicy = frame.view.policy(service, frame.proxy)
    key = _key_of_port(policy.policy, port) or _key(policy.policy)
    if key:
        action["hash_policy"] = [hash_policy(key)]
    route: Json = {"name": "default", "match": dict(ANYTHING), "route": action}
    return _observed(frame, route, f"{service.host}:{port}/*")


def _route(frame: Frame, service: VirtualService, rule: HttpRule, match: HttpMatch | None) -> Json:
    by_segment = service.semantics == GATEWAY_SEMANTICS
    route: Json = {"match": route_match(match, by_segment=by_segment), "metadata": _provenance(service, rule, match)}
    name = f"{rule.name}.{match.name}" if match and match.name else rule.name
    if name:
        route["name"] = name
    if match and match.stat_prefix:
        route["stat_prefix"] = match.stat_prefix
    authority = apply_headers(route, rule.headers)
    if rule.redirect:
        route["redirect"] = redirect_action(rule.redirect, frame.listener_port, tls=frame.tls)
    elif rule.direct_response:
        route["direct_response"] = direct_response_action(rule.direct_response)
    else:
        _send(frame, route, rule, authority, by_segment=by_segment)
    filters: Json = {}
    if rule.fault and (rule.fault.delay or rule.fault.abort):
        filters[FAULT_FILTER] = fault_config(rule.fault)
    if rule.cors:
        filters[CORS_FILTER] = cors_config(rule.cors)
    if filters:
        route["typed_per_filter_config"] = filters
    return _observed(frame, route, _operation(frame, route, service))


def _provenance(service: VirtualService, rule: HttpRule, match: HttpMatch | None) -> Json:
    ours: Json = {"rule": rule.origin.rule, "match": match.index if match else 0}
    if rule.origin.delegate:
        ours |= {"delegate": rule.origin.delegate, "delegate_rule": rule.origin.delegate_rule}
    return provenance(service.meta, ours)


def _send(frame: Frame, route: Json, rule: HttpRule, authority: str, *, by_segment: bool) -> None:
    """Set the action that sends requests on."""
    action: Json = dict(timeouts(rule.timeout_s))
    if by_segment:
        action["cluster_not_found_response_code"] = "INTERNAL_SERVER_ERROR"
    if rule.rewrite:
        apply_rewrite(action, route["match"], rule.rewrite, by_segment=by_segment)
        if headers_of(frame.view, frame.proxy).forwarded_host:
            action["append_x_forwarded_host"] = True
        authority = rule.rewrite.authority or authority
    if authority:
        action["host_rewrite_literal"] = authority
    mirrors = [_mirror(frame, mirror) for mirror in rule.mirrors]
    if mirrors:
        action["request_mirror_policies"] = mirrors
    hashed = _apply_destinations(frame, route, action, rule)
    retries = retry_policy(rule.retries or frame.default_retries, hashed=hashed)
    if retries:
        action["retry_policy"] = retries
    route["route"] = action


def _observed(frame: Frame, route: Json, operation: str) -> Json:
    route["decorator"] = {"operation": operation}
    if frame.tracing:
        route["tracing"] = frame.tracing
    return route


def _operation(frame: Frame, route: Json, service: VirtualService) -> str:
    """Istio's name for the span: where a single destination is known its host, else the VirtualService."""
    match = route["match"]
    path = "/*"
    if "prefix" in match:
        path = f"{match['prefix']}*"
    elif "path" in match:
        path = match["path"]
    elif "safe_regex" in match:
        path = match["safe_regex"]["regex"]
    cluster = route.get("route", {}).get("cluster", "")
    if cluster.startswith("outbound|"):
        _, port, _, host = cluster.split("|")
        return f"{host}:{port}{path}"
    return f"{service.meta.name}:{frame.listener_port}{path}"


def _apply_destinations(frame: Frame, route: Json, action: Json, rule: HttpRule) -> bool:
    """Set where the action sends. True when the only destination is chosen by hash."""
    hashes: list[Json] = []
    if len(rule.destinations) == 1:
        only = rule.destinations[0]
        action["cluster"] = _cluster(frame, only, hashes)
        authority = apply_headers(route, only.headers)
        if authority and "host_rewrite_literal" not in action:
            action["host_rewrite_literal"] = authority
    else:
        weighted: list[Json] = []
        # Istio drops destinations of weight 0.
        for destination in (item for item in rule.destinations if item.weight):
            entry: Json = {"name": _cluster(frame, destination, hashes), "weight": destination.weight}
            authority = apply_headers(entry, destination.headers)
            if authority:
                entry["host_rewrite_literal"] = authority
            weighted.append(entry)
        action["weighted_clusters"] = {"clusters": weighted}
    if hashes:
        action["hash_policy"] = hashes
    return bool(hashes) and len(rule.destinations) == 1


def _cluster(frame: Frame, weighted: WeightedDestination, hashes: list[Json]) -> str:
    key = frame.hash_key(weighted.destination)
    if key:
        hashes.append(hash_policy(key))
    return frame.cluster(weighted.destination)


def _key(policy: TrafficPolicy | None) -> HashKey | None:
    return policy.load_balancer.hash_key if policy and policy.load_balancer else None


def _key_of_port(policy: TrafficPolicy | None, port: int) -> HashKey | None:
    ports = policy.ports if policy and port else ()
    return next((key for number, override in ports if number == port and (key := _key(override))), None)


def _mirror(frame: Frame, mirror: Mirror) -> Json:
    return {
        "cluster": frame.cluster(mirror.destination),
        "runtime_fraction": {"default_value": fraction(mirror.percent)},
        "trace_sampled": False,
        # Mirrors are sent the authority as it came (features.DisableShadowHostSuffix).
        "disable_shadow_host_suffix_append": True,
    }
