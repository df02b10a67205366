"""Clusters: where calls go and how connections to it behave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.model import Endpoint, ProxyNode
from mlmesh_local.resources.catalog import CatalogPort, CatalogService
from mlmesh_local.resources.model import ConnectionPool, LoadBalancer, OutlierDetection, TrafficPolicy
from mlmesh_local.translate import names, tls
from mlmesh_local.translate.names import ADS, address, seconds
from mlmesh_local.translate.view import View, effective_policy, load_balancer_of

# Istio's own defaults: pkg/config/mesh/mesh.go and cluster_traffic_policy.go.
CONNECT_TIMEOUT = "10s"
UNBOUNDED = 2**32 - 1
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_TLS_MODE = "envoy.transport_socket_match"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """One cluster to be: a subset (or all) of a service's port, as a view's proxy sees it."""

    view: View
    service: CatalogService
    port: CatalogPort
    subset: str
    labels: Mapping[str, str]
    policy: TrafficPolicy | None

    @property
    def name(self) -> str:
        return names.outbound_cluster(self.port.number, self.subset, self.service.host)

    @property
    def http2(self) -> bool:
        # h2UpgradePolicy upgrades plain HTTP ports; ports named grpc or http2 speak HTTP/2 anyway.
        pool = self.policy.connection_pool if self.policy else None
        return self.port.protocol in ("grpc", "http2") or bool(pool and pool.h2_upgrade)


def _targets(view: View, proxy: ProxyNode) -> Iterator[_Target]:
    for service in view.services_seen_by(proxy.namespace):
        policy = view.policy(service, proxy.namespace)
        for port in service.ports:
            for name in ("", *(subset.name for subset in policy.subsets)):
                subset = policy.subset(name) if name else None
                yield _Target(
                    view=view,
                    service=service,
                    port=port,
                    subset=name,
                    labels=subset.labels if subset else {},
                    policy=effective_policy(policy, name, port.number),
                )


def outbound_clusters(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """A cluster for each port and subset of every service that the proxy sees."""
    clusters: dict[str, Json] = {names.BLACK_HOLE: black_hole()}
    for target in _targets(view, proxy):
        clusters[target.name] = _outbound_cluster(target)
    if view.world.otlp_address:
        clusters[names.COLLECTOR] = _collector(view.world.otlp_address)
    return clusters


def outbound_endpoints(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """ClusterLoadAssignments of the clusters whose endpoints come over EDS."""
    return {target.name: _assignment(target) for target in _targets(view, proxy) if not target.service.dns}


def _assignment(target: _Target) -> Json:
    found = target.view.endpoints(target.service, target.port.number, target.labels)
    endpoints = [_endpoint(target.view, target.service, endpoint) for endpoint in found]
    localities = [{"locality": {}, "lb_endpoints": endpoints, "load_balancing_weight": 1}] if endpoints else []
    return {"cluster_name": target.name, "endpoints": localities}


def _endpoint(view: View, service: CatalogService, endpoint: Endpoint) -> Json:
    result: Json = {
        "endpoint": {"address": address(endpoint.address, endpoint.target_port)},
        "load_balancing_weight": endpoint.weight,
    }
    mode = view.mtls_mode(service.namespace, endpoint.labels, endpoint.target_port)
    if endpoint.mesh_tls and mode != "DISABLE":
        result["metadata"] = {"filter_metadata": {_TLS_MODE: {"tlsMode": "istio"}}}
    return result


def _outbound_cluster(target: _Target) -> Json:
    service, policy = target.service, target.policy
    pool = policy.connection_pool if policy else None
    about: Json = {"services": [{"host": service.host, "name": service.name, "namespace": service.namespace}]}
    if target.subset:
        about["subset"] = target.subset
    cluster: Json = {
        "name": target.name,
        "connect_timeout": CONNECT_TIMEOUT,
        "circuit_breakers": {"thresholds": [_threshold(pool)]},
        "common_lb_config": {},
        "metadata": {"filter_metadata": {"istio": about}},
    }
    if service.dns:
        cluster["type"] = "STRICT_DNS"
        cluster["dns_lookup_family"] = "V4_PREFERRED"
        cluster["dns_refresh_rate"] = "60s"
        cluster["respect_dns_ttl"] = True
        cluster["load_assignment"] = _assignment(target)
    else:
        cluster["type"] = "EDS"
        cluster["eds_cluster_config"] = {"eds_config": ADS, "service_name": target.name}
    options = _http_options(pool, http2=target.http2)
    _apply_tls(cluster, options, target)
    cluster["typed_extension_protocol_options"] = {_HTTP_OPTIONS: typed(_HTTP_OPTIONS, options)}
    _apply_load_balancer(cluster, load_balancer_of(policy))
    if pool:
        _apply_connections(cluster, pool)
    if policy and policy.outlier:
        cluster["outlier_detection"] = _outlier(policy.outlier)
        cluster["common_lb_config"] = {"healthy_panic_threshold": {"value": policy.outlier.min_health_percent}}
    return cluster


def _threshold(pool: ConnectionPool | None) -> Json:
    # In Istio 0 means unset.
    return {
        "max_connections": (pool.max_connections if pool else None) or UNBOUNDED,
        "max_pending_requests": (pool.http1_max_pending_requests if pool else None) or UNBOUNDED,
        "max_requests": (pool.http2_max_requests if pool else None) or UNBOUNDED,
        "max_retries": (pool.max_retries if pool else None) or UNBOUNDED,
        "track_remaining": True,
    }


def _http_options(pool: ConnectionPool | None, *, http2: bool) -> Json:
    protocol: Json = {}
    common: Json = {}
    if pool:
        if http2 and pool.max_concurrent_streams:
            protocol["max_concurrent_streams"] = pool.max_concurrent_streams
        if http2 and pool.http2_keepalive:
            interval_s, timeout_s = pool.http2_keepalive
            protocol["connection_keepalive"] = {"interval": seconds(interval_s), "timeout": seconds(timeout_s)}
        if pool.idle_timeout_s is not None:
            common["idle_timeout"] = seconds(pool.idle_timeout_s)
        if pool.max_requests_per_connection:
            common["max_requests_per_connection"] = pool.max_requests_per_connection
        if pool.max_connection_duration_s is not None:
            common["max_connection_duration"] = seconds(pool.max_connection_duration_s)
    options: Json = {"explicit_http_config": {"http2_protocol_options" if http2 else "http_protocol_options": protocol}}
    if common:
        options["common_http_protocol_options"] = common
    return options


def _apply_connections(cluster: Json, pool: ConnectionPool) -> None:
    if pool.connect_timeout_s is not None:
        cluster["connect_timeout"] = seconds(pool.connect_timeout_s)
    keepalive = pool.tcp_keepalive
    if keepalive is not None:
        fields = {
            "keepalive_probes": keepalive.probes,
            "keepalive_time": int(keepalive.time_s) if keepalive.time_s else None,
            "keepalive_interval": int(keepalive.interval_s) if keepalive.interval_s else None,
        }
        cluster["upstream_connection_options"] = {"tcp_keepalive": {k: v for k, v in fields.items() if v is not None}}


def _apply_tls(cluster: Json, options: Json, target: _Target) -> None:
    rule = target.policy.tls if target.policy else None
    domain = target.view.world.trust_domain
    identities = target.view.identities(target.service)
    server_name = names.sni(target.port.number, target.subset, target.service.host)
    if rule is None:
        # Auto mTLS: endpoints that say so get mutual TLS, others plaintext.
        if not target.service.external:
            mutual = tls.mesh_client(identities, domain, server_name, http2=target.http2)
            cluster["transport_socket_matches"] = [
                {"name": "tlsMode-istio", "match": {"tlsMode": "istio"}, "transport_socket": mutual},
                {"name": "tlsMode-disabled", "match": {}, "transport_socket": tls.RAW_BUFFER},
            ]
    elif rule.mode == "ISTIO_MUTUAL":
        expected = rule.subject_alt_names or identities
        cluster["transport_socket"] = tls.mesh_client(expected, domain, rule.sni or server_name, http2=target.http2)
    elif rule.mode != "DISABLE":
        cluster["transport_socket"] = tls.outside_client(rule, http2=target.http2)
        # As in Istio: the host that is called is the server name, and is what the certificate must be for.
        automatic = not rule.sni
        options["upstream_http_protocol_options"] = {
            "auto_sni": automatic,
            "auto_san_validation": automatic and not rule.subject_alt_names and not rule.insecure_skip_verify,
        }


def _apply_load_balancer(cluster: Json, balancer: LoadBalancer) -> None:
    cluster["lb_policy"] = balancer.policy
    if balancer.policy == "RING_HASH":
        cluster["ring_hash_lb_config"] = {"minimum_ring_size": balancer.table_size or 1024}
    elif balancer.policy == "MAGLEV" and balancer.table_size:
        cluster["maglev_lb_config"] = {"table_size": balancer.table_size}


def _outlier(rule: OutlierDetection) -> Json:
    result: Json = {"enforcing_success_rate": 0}
    if rule.consecutive_5xx is not None:
        result["consecutive_5xx"] = rule.consecutive_5xx
        result["enforcing_consecutive_5xx"] = 100 if rule.consecutive_5xx else 0
    if rule.consecutive_gateway is not None:
        result["consecutive_gateway_failure"] = rule.consecutive_gateway
        result["enforcing_consecutive_gateway_failure"] = 100 if rule.consecutive_gateway else 0
    if rule.interval_s is not None:
        result["interval"] = seconds(rule.interval_s)
    if rule.base_ejection_s is not None:
        result["base_ejection_time"] = seconds(rule.base_ejection_s)
    if rule.max_ejection_percent:
        result["max_ejection_percent"] = rule.max_ejection_percent
    if rule.split_local_origin:
        result["split_external_local_origin_errors"] = True
        result["enforcing_local_origin_success_rate"] = 0
        if rule.consecutive_local_origin:
            result["consecutive_local_origin_failure"] = rule.consecutive_local_origin
            result["enforcing_consecutive_local_origin_failure"] = 100
    return result


def inbound_cluster(proxy: ProxyNode, port: int, *, http2: bool) -> Json:
    """Cluster of the application behind a sidecar."""
    name = names.inbound_cluster(port)
    endpoint = {"endpoint": {"address": address(proxy.application_address, port)}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": CONNECT_TIMEOUT,
        "circuit_breakers": {"thresholds": [_threshold(None)]},
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {_HTTP_OPTIONS: typed(_HTTP_OPTIONS, _http_options(None, http2=http2))},
    }


def black_hole() -> Json:
    """The cluster without endpoints."""
    return {"name": names.BLACK_HOLE, "type": "STATIC", "connect_timeout": CONNECT_TIMEOUT}


def _collector(otlp_address: str) -> Json:
    host, port = names.split_address(otlp_address)
    endpoint = {"endpoint": {"address": address(host, port)}}
    return {
        "name": names.COLLECTOR,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": names.COLLECTOR, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {_HTTP_OPTIONS: typed(_HTTP_OPTIONS, _http_options(None, http2=True))},
    }
