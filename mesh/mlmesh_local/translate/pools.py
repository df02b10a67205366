"""How connections of a cluster behave: protocol, bounds, idle times, ejection of endpoints that fail.

The rules are those of pilot/pkg/networking/core/cluster_traffic_policy.go in Istio's source.
"""

from __future__ import annotations

from mlmesh_local.envoy_types import Json, typed
from mlmesh_local.resources.model import ConnectionPool, OutlierDetection, RetryBudget, TcpKeepalive
from mlmesh_local.resources.protocols import Protocol, is_http, is_http2
from mlmesh_local.translate.names import seconds

UNBOUNDED = 2**32 - 1
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_EXPLICIT, _SAME = "explicit_http_config", "use_downstream_protocol_config"


def threshold(pool: ConnectionPool | None, budget: RetryBudget | None = None) -> Json:
    """CircuitBreakers.Thresholds. In Istio 0 means unset, and unset is without bound."""
    result: Json = {
        "max_connections": (pool.max_connections if pool else None) or UNBOUNDED,
        "max_pending_requests": (pool.http1_max_pending_requests if pool else None) or UNBOUNDED,
        "max_requests": (pool.http2_max_requests if pool else None) or UNBOUNDED,
        "max_retries": (pool.max_retries if pool else None) or UNBOUNDED,
        "track_remaining": True,
    }
    if budget is not None:
        # The published messages of Envoy do not have its interval.
        result["retry_budget"] = {
            "budget_percent": {"value": 20.0 if budget.percent is None else budget.percent},
            "min_retry_concurrency": budget.min_concurrency or 3,
        }
    return result


def http_options(
    pool: ConnectionPool | None,
    protocol: Protocol,
    *,
    upgrade: bool = False,
    sniffs: bool = True,
    outbound: bool = True,
) -> Json:
    """HttpProtocolOptions; empty leaves Envoy's: HTTP/1.1. ``upgrade``: plain HTTP is upgraded to HTTP/2 by the mesh.

    ``sniffs``: whether the listener finds the protocol out where none is declared, as sidecars do.
    """
    options: Json = {}
    if is_http2(protocol):
        options[_EXPLICIT] = {"http2_protocol_options": {}}
    elif protocol == "unknown" and sniffs:
        options[_SAME] = {"http_protocol_options": {}, "http2_protocol_options": {}}
    elif outbound and _upgraded(pool, protocol, upgrade=upgrade):
        options[_EXPLICIT] = {"http2_protocol_options": {}}
    if pool is None:
        return options
    http2 = options.get(_EXPLICIT, {}).get("http2_protocol_options")
    common = _common(pool)
    # Istio writes the block down as soon as one of its settings is there, whether or not it comes to act.
    if common or pool.max_concurrent_streams or pool.http2_keepalive:
        options["common_http_protocol_options"] = common
    if http2 is not None and pool.max_concurrent_streams:
        http2["max_concurrent_streams"] = pool.max_concurrent_streams
    if http2 is not None and pool.http2_keepalive:
        interval_s, timeout_s = pool.http2_keepalive
        http2["connection_keepalive"] = {"interval": seconds(interval_s), "timeout": seconds(timeout_s)}
    if pool.use_client_protocol:
        options.pop(_EXPLICIT, None)
        options[_SAME] = {"http_protocol_options": {}, "http2_protocol_options": {}}
    return options


def apply_http_options(cluster: Json, options: Json) -> None:
    """Write options into a cluster, completed to what Envoy demands."""
    if not options:
        return
    if _EXPLICIT not in options and _SAME not in options:
        options[_EXPLICIT] = {"http_protocol_options": {}}
    cluster["typed_extension_protocol_options"] = {HTTP_OPTIONS: typed(HTTP_OPTIONS, options)}


def speaks_http2(options: Json) -> bool:
    """Whether a cluster with these options speaks nothing but HTTP/2."""
    return "http2_protocol_options" in options.get(_EXPLICIT, {})


def _upgraded(pool: ConnectionPool | None, protocol: Protocol, *, upgrade: bool) -> bool:
    if pool is not None and pool.use_client_protocol:
        return False
    if pool is not None and pool.h2_upgrade is not None:
        return pool.h2_upgrade
    return upgrade and is_http(protocol)


def _common(pool: ConnectionPool) -> Json:
    common: Json = {}
    idle_s = pool.idle_timeout_s if pool.idle_timeout_s is not None else pool.tcp_idle_timeout_s
    if idle_s is not None:
        common["idle_timeout"] = seconds(idle_s)
    if pool.max_requests_per_connection:
        common["max_requests_per_connection"] = pool.max_requests_per_connection
    if pool.max_connection_duration_s is not None:
        common["max_connection_duration"] = seconds(pool.max_connection_duration_s)
    return common


def apply_connections(
    cluster: Json, pool: ConnectionPool | None, connect_timeout_s: float, mesh_keepalive: TcpKeepalive | None
) -> None:
    """Timeout of connecting, and TCP keepalive: the mesh's, each setting overridden by the rule's."""
    own_s = pool.connect_timeout_s if pool else None
    cluster["connect_timeout"] = seconds(connect_timeout_s if own_s is None else own_s)
    layers = [layer for layer in (mesh_keepalive, pool.tcp_keepalive if pool else None) if layer is not None]
    if not layers:
        return
    fields: Json = {}
    for layer in layers:
        if layer.probes:
            fields["keepalive_probes"] = layer.probes
        if layer.time_s is not None:
            fields["keepalive_time"] = int(layer.time_s)
        if layer.interval_s is not None:
            fields["keepalive_interval"] = int(layer.interval_s)
    cluster["upstream_connection_options"] = {"tcp_keepalive": fields}


def outlier_detection(rule: OutlierDetection) -> Json:
    """OutlierDetection. Success rates never eject; the errors that were named always do."""
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
