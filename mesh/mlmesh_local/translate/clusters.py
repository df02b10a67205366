"""Clusters: where calls go and how connections to it behave.

The rules are those of pilot/pkg/networking/core/cluster_builder.go and pilot/pkg/xds/endpoints in Istio's source.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import Endpoint, ProxyNode
from mlmesh_local.resources.catalog import CatalogPort, CatalogService
from mlmesh_local.resources.mesh_tls import TlsSettings
from mlmesh_local.resources.model import TrafficPolicy
from mlmesh_local.resources.rules import HostPolicy, effective_policy, load_balancer_of, port_policy
from mlmesh_local.translate import names, tls
from mlmesh_local.translate.balancers import LocalityChoice, apply_load_balancer, locality_choice, locality_config
from mlmesh_local.translate.dynamic_hosts import dns_cache, is_dynamic
from mlmesh_local.translate.endpoints import by_locality
from mlmesh_local.translate.inbound import Inbound
from mlmesh_local.translate.localities import Group, balanced, groups, locality_of, located
from mlmesh_local.translate.names import ADS, address, seconds
from mlmesh_local.translate.pools import (
    apply_connections,
    apply_http_options,
    http_options,
    outlier_detection,
    speaks_http2,
    threshold,
)
from mlmesh_local.translate.transport import TLS_MATCH, apply_proxy_protocol, mutual_matches, outside_client
from mlmesh_local.translate.view import View

_DYNAMIC = "envoy.clusters.dynamic_forward_proxy"
# A socket for each hundred queries: some resolvers leave those of one socket unanswered after a while.
_RESOLVER: Json = {
    "name": "envoy.network.dns_resolver.cares",
    "typed_config": typed(
        "envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig", {"udp_max_queries": 100}
    ),
}
_DYNAMIC_CONFIG = "envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig"


@dataclass(frozen=True, kw_only=True)
class _Target:
    """One cluster to be: a subset (or all) of a service's port, as a proxy sees it."""

    view: View
    proxy: ProxyNode
    service: CatalogService
    port: CatalogPort
    rules: HostPolicy
    subset: str = ""

    @property
    def name(self) -> str:
        return names.outbound_cluster(self.port.number, self.subset, self.service.host)

    @functools.cached_property
    def policy(self) -> TrafficPolicy | None:
        return effective_policy(self.rules, self.subset, self.port.number, self.view.settings.default_policy)

    @property
    def labels(self) -> Mapping[str, str]:
        subset = self.rules.subset(self.subset) if self.subset else None
        return subset.labels if subset else {}

    @property
    def kind(self) -> str:
        """How Envoy finds endpoints."""
        service = self.service
        if is_dynamic(service):
            return "DYNAMIC"
        if service.resolution in ("DNS", "NONE"):
            return "STRICT_DNS"
        return "LOGICAL_DNS" if service.resolution == "DNS_ROUND_ROBIN" else "EDS"

    @property
    def locality(self) -> LocalityChoice:
        settings = self.view.settings
        return locality_choice(load_balancer_of(self.policy), self.service, settings.locality, settings.zone_aware)


def _targets(view: View, proxy: ProxyNode, service: CatalogService) -> Iterator[_Target]:
    rules = view.policy(service, proxy)
    for port in service.ports:
        whole = _Target(view=view, proxy=proxy, service=service, port=port, rules=rules)
        yield whole
        if whole.kind != "DYNAMIC":
            for subset in rules.subsets:
                yield _Target(view=view, proxy=proxy, service=service, port=port, rules=rules, subset=subset.name)


def outbound_clusters(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """A cluster for each port and subset of every service that the proxy sees."""
    clusters: dict[str, Json] = {names.BLACK_HOLE: _black_hole(view)}
    for service in view.services_seen_by(proxy):
        make = functools.partial(_service_clusters, view, proxy, service)
        clusters |= view.part(("clusters", service.host), make, service)
    if view.world.otlp_address:
        clusters[names.COLLECTOR] = _collector(view.world.otlp_address)
    return clusters


def _service_clusters(view: View, proxy: ProxyNode, service: CatalogService) -> dict[str, Json]:
    found = [_dynamic_cluster(t) if t.kind == "DYNAMIC" else _cluster(t) for t in _targets(view, proxy, service)]
    # Of names to resolve there must be some: without, Istio has no cluster.
    return {c["name"]: c for c in found if not service.dns or c["load_assignment"]["endpoints"]}


def outbound_endpoints(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """ClusterLoadAssignments of the clusters whose endpoints come over EDS."""
    assignments: dict[str, Json] = {}
    for service in view.services_seen_by(proxy):
        make = functools.partial(_service_endpoints, view, proxy, service)
        assignments |= view.part(("endpoints", service.host), make, service)
    return assignments


def _service_endpoints(view: View, proxy: ProxyNode, service: CatalogService) -> dict[str, Json]:
    return {t.name: _assignment(t) for t in _targets(view, proxy, service) if t.kind == "EDS"}


def _assignment(target: _Target) -> Json:
    found = _groups(target)
    return {"cluster_name": target.name, "endpoints": [_locality(target, group) for group in found]}


def _groups(target: _Target) -> list[Group]:
    view, proxy = target.view, target.proxy
    # What the mesh sets by default makes no priorities, in Istio neither.
    own = effective_policy(target.rules, target.subset, target.port.number)
    policy = target.policy if target.kind != "EDS" else own
    endpoints = view.all_endpoints(target.service, target.port.number, target.labels)
    if not _sends_unready(target, own):
        endpoints = tuple(one for one in endpoints if one.ready or target.service.not_ready)
    found = groups(by_locality(endpoints))
    choice = target.locality
    if choice.active is None or not found:
        return found
    locality = locality_of(proxy.labels)
    failover = choice.forced or (policy is not None and policy.outlier is not None)
    return balanced(found, choice.active, locality, located(proxy.labels, locality), failover=failover)


def _sends_unready(target: _Target, policy: TrafficPolicy | None) -> bool:
    """Whether Envoy is told of endpoints that are not ready, which it then counts as unhealthy and never calls."""
    if target.service.distribution:
        return True
    return not (policy and policy.outlier and policy.outlier.min_health_percent)


def _locality(target: _Target, group: Group) -> Json:
    region, zone, subzone = (*group.locality.split("/"), "", "", "")[:3]
    steps = {"region": region, "zone": zone, "sub_zone": subzone}
    result: Json = {
        "locality": {name: step for name, step in steps.items() if step},
        "lb_endpoints": [_endpoint(target, endpoint) for endpoint in group.endpoints],
        "load_balancing_weight": group.weight,
    }
    if group.priority:
        result["priority"] = group.priority
    return result


def _endpoint(target: _Target, endpoint: Endpoint) -> Json:
    result: Json = {
        "endpoint": {"address": address(endpoint.address, endpoint.target_port)},
        "load_balancing_weight": endpoint.weight,
    }
    if not endpoint.ready and not target.service.not_ready:
        result["health_status"] = "UNHEALTHY"
    if _takes_mutual_tls(target, endpoint):
        result["metadata"] = {"filter_metadata": {TLS_MATCH: {"tlsMode": "istio"}}}
    return result


def _takes_mutual_tls(target: _Target, endpoint: Endpoint) -> bool:
    if not endpoint.mesh_tls:
        return False
    mode = _rule_mode(target)
    if mode:
        return mode == "ISTIO_MUTUAL"
    return target.view.mtls_mode(target.service.namespace, endpoint.labels, endpoint.target_port) != "DISABLE"


def _rule_mode(target: _Target) -> str:
    """Mode of TLS that a rule names for a subset's port, or empty. Unlike elsewhere, ports without one inherit it."""
    subset = target.rules.subset(target.subset) if target.subset else None
    for policy in (subset.policy if subset else None, target.rules.policy):
        own, _ = port_policy(policy, target.port.number)
        for each in (own, policy):
            if each is not None and each.tls is not None:
                return each.tls.mode
    return ""


def _cluster(target: _Target) -> Json:
    view, policy = target.view, target.policy
    pool = policy.connection_pool if policy else None
    settings = view.settings
    cluster: Json = {"name": target.name}
    _apply_discovery(cluster, target)
    options = http_options(
        pool, target.port.protocol, upgrade=settings.h2_upgrade, sniffs=target.proxy.kind == "sidecar"
    )
    apply_connections(cluster, pool, settings.connect_timeout_s, settings.tcp_keepalive)
    cluster["circuit_breakers"] = {"thresholds": [threshold(pool, policy.retry_budget if policy else None)]}
    outlier = policy.outlier if policy else None
    panic = 0 if outlier is None or target.service.distribution else outlier.min_health_percent
    cluster["common_lb_config"] = {"healthy_panic_threshold": {"value": panic}}
    cluster["common_lb_config"] |= locality_config(target.locality, outlier=outlier is not None)
    if outlier is not None:
        cluster["outlier_detection"] = outlier_detection(outlier)
    apply_load_balancer(cluster, load_balancer_of(policy))
    _apply_tls(cluster, options, target)
    apply_http_options(cluster, options)
    apply_proxy_protocol(cluster, policy)
    cluster["metadata"] = {"filter_metadata": {"istio": _about(target)}}
    return cluster


def _apply_discovery(cluster: Json, target: _Target) -> None:
    kind = target.kind
    if kind == "EDS":
        cluster["type"] = "EDS"
        cluster["eds_cluster_config"] = {"eds_config": ADS, "service_name": target.name}
        return
    assignment = _assignment(target)
    # A subset may have none.
    cluster["type"] = kind if assignment["endpoints"] else "STATIC"
    cluster["load_assignment"] = assignment
    if cluster["type"] != "STATIC":
        cluster["dns_lookup_family"] = "V4_ONLY"
        cluster["dns_refresh_rate"] = seconds(target.view.settings.dns_refresh_s)
        cluster["dns_jitter"] = "0.1s"
        cluster["respect_dns_ttl"] = True
        cluster["typed_dns_resolver_config"] = _RESOLVER


def _about(target: _Target) -> Json:
    """What telemetry and people read off a cluster: its service, subset and rule, named as Istio names them."""
    service = target.service
    about: Json = {"services": [{"host": service.host, "name": service.name, "namespace": service.namespace}]}
    rule = target.rules.rule
    if rule is not None:
        where = f"namespaces/{rule.meta.namespace}/destination-rule/{rule.meta.name}"
        about["config"] = f"/apis/networking.istio.io/v1/{where}"
    if target.subset:
        about["subset"] = target.subset
    elif service.external:
        about["external"] = True
    policy = target.policy
    if rule is not None and policy and policy.tls and policy.tls.mode in ("SIMPLE", "MUTUAL"):
        about["alpn_override"] = "false"
    return about


def _apply_tls(cluster: Json, options: Json, target: _Target) -> None:
    view, service = target.view, target.service
    rule = target.policy.tls if target.policy else None
    server_name = names.sni(target.port.number, target.subset, service.host)
    if rule is None:
        mode = view.mtls_mode(service.namespace, {}, 0)
        if service.external or not view.auto_mtls or mode == "DISABLE":
            return
        identities = view.identities(service)
        mutual = tls.mesh_client(identities, view.trust_domain, server_name, http2=speaks_http2(options))
        cluster["transport_socket_matches"] = mutual_matches(mutual)
    elif rule.mode == "ISTIO_MUTUAL":
        expected = rule.subject_alt_names or view.identities(service)
        cluster["transport_socket"] = tls.mesh_client(
            expected, view.trust_domain, rule.sni or server_name, http2=speaks_http2(options)
        )
    elif rule.mode != "DISABLE":
        # Istio gives credentials to gateways, and to the sidecars that a workloadSelector names; roots to everybody.
        secret = rule.credential_name and not rule.credential_name.startswith(tls.IN_CONFIG_MAP)
        if secret and target.proxy.kind == "sidecar" and not target.rules.selected:
            return
        known = view.identities(service) if service.is_entry else ()
        defaults = view.mesh_config.tls_defaults if view.mesh_config else TlsSettings()
        cluster["transport_socket"] = outside_client(rule, options, known, defaults)


def _dynamic_cluster(target: _Target) -> Json:
    """Cluster of a wildcard host: the name that is called is resolved when it is called."""
    view, policy = target.view, target.policy
    pool = policy.connection_pool if policy else None
    rule = policy.tls if policy else None
    options = http_options(pool, target.port.protocol, upgrade=view.settings.h2_upgrade)
    config: Json = {"dns_cache_config": dns_cache(target.service.host)}
    cluster: Json = {"name": target.name, "lb_policy": "CLUSTER_PROVIDED"}
    apply_connections(cluster, pool, view.settings.connect_timeout_s, view.settings.tcp_keepalive)
    cluster["circuit_breakers"] = {"thresholds": [threshold(pool, policy.retry_budget if policy else None)]}
    if policy and policy.outlier:
        cluster["outlier_detection"] = outlier_detection(policy.outlier)
    _apply_tls(cluster, options, target)
    checks: Json = {}
    if rule is not None and rule.mode != "DISABLE":
        checks = options.setdefault("upstream_http_protocol_options", {})
        checks |= {} if rule.sni else {"auto_sni": True}
        checks |= {} if rule.insecure_skip_verify else {"auto_san_validation": True}
    if options and len(checks) < 2:
        # Envoy wants to be told that names are not checked, as soon as there are options where it could.
        config["allow_insecure_cluster_options"] = True
    cluster.pop("transport_socket_matches", None)
    apply_http_options(cluster, options)
    apply_proxy_protocol(cluster, policy)
    cluster["cluster_type"] = {"name": _DYNAMIC, "typed_config": typed(_DYNAMIC_CONFIG, config)}
    cluster["metadata"] = {"filter_metadata": {"istio": _about(target)}}
    return cluster


def inbound_clusters(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """A cluster for each port of the application behind a sidecar."""
    found = [_inbound_cluster(view, proxy, inbound) for inbound in view.inbound(proxy)]
    return {cluster["name"]: cluster for cluster in found}


def _inbound_cluster(view: View, proxy: ProxyNode, inbound: Inbound) -> Json:
    """Bounds of connections are those that callers have, too."""
    name = names.inbound_cluster(inbound.port)
    settings = view.settings
    policy = view.inbound_policy(proxy, inbound)
    pool = policy.connection_pool if policy else None
    cluster: Json = {
        "name": name,
        "type": "STATIC",
        "circuit_breakers": {"thresholds": [threshold(pool, policy.retry_budget if policy else None)]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": inbound.application(proxy)}}]}],
        },
    }
    apply_connections(cluster, pool, settings.connect_timeout_s, settings.tcp_keepalive)
    apply_http_options(cluster, http_options(pool, inbound.protocol, outbound=False))
    if inbound.service is not None:
        service = inbound.service
        about = [{"host": service.host, "name": service.name, "namespace": service.namespace}]
        cluster["metadata"] = {"filter_metadata": {"istio": {"services": about}}}
    return cluster


def _black_hole(view: View) -> Json:
    """The cluster without endpoints."""
    connect = seconds(view.settings.connect_timeout_s)
    return {"name": names.BLACK_HOLE, "type": "STATIC", "connect_timeout": connect}


def _collector(otlp_address: str) -> Json:
    host, port = names.split_address(otlp_address)
    cluster: Json = {
        "name": names.COLLECTOR,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": names.COLLECTOR,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(host, port)}}]}],
        },
    }
    apply_http_options(cluster, http_options(None, "grpc"))
    return cluster
