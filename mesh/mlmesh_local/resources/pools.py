"""Connection pools and outlier detection, which DestinationRule, Sidecar and MeshConfig have in common.

https://istio.io/latest/docs/reference/config/networking/destination-rule/#ConnectionPoolSettings
"""

from __future__ import annotations

from mlmesh_local.resources.checked import duration_s, part
from mlmesh_local.resources.fields import INT32_MAX, Fields
from mlmesh_local.resources.model_hosts import ConnectionPool, OutlierDetection, TcpKeepalive


def connection_pool(fields: Fields) -> ConnectionPool:
    """Read `connectionPool`."""
    if not fields.has("tcp") and not fields.has("http"):
        fields.problems.add(fields.at, 'needs "tcp" or "http"')
    with fields.message("tcp") as tcp, fields.message("http") as http:
        upgrade = http.choice("h2UpgradePolicy", ("DEFAULT", "DO_NOT_UPGRADE", "UPGRADE"), "DEFAULT")
        same = http.boolean("useClientProtocol")
        if same and upgrade == "UPGRADE":
            http.refuse("useClientProtocol", "cannot be set together with h2UpgradePolicy UPGRADE")
        return ConnectionPool(
            max_connections=tcp.integer("maxConnections", high=INT32_MAX),
            connect_timeout_s=duration_s(tcp, "connectTimeout"),
            max_connection_duration_s=duration_s(tcp, "maxConnectionDuration"),
            tcp_keepalive=part(tcp, "tcpKeepalive", tcp_keepalive),
            tcp_idle_timeout_s=duration_s(tcp, "idleTimeout", low_s=0.0),
            http1_max_pending_requests=http.integer("http1MaxPendingRequests", high=INT32_MAX),
            http2_max_requests=http.integer("http2MaxRequests", high=INT32_MAX),
            max_requests_per_connection=http.integer("maxRequestsPerConnection", high=INT32_MAX),
            max_retries=http.integer("maxRetries", high=INT32_MAX),
            idle_timeout_s=duration_s(http, "idleTimeout"),
            max_concurrent_streams=http.integer("maxConcurrentStreams", high=INT32_MAX),
            h2_upgrade={"DEFAULT": None, "DO_NOT_UPGRADE": False, "UPGRADE": True}[upgrade],
            use_client_protocol=same,
            http2_keepalive=part(http, "http2KeepAlive", _http2_keepalive),
        )


def tcp_keepalive(fields: Fields) -> TcpKeepalive:
    """Read `tcpKeepalive`."""
    return TcpKeepalive(
        probes=fields.integer("probes"),
        time_s=duration_s(fields, "time"),
        interval_s=duration_s(fields, "interval"),
    )


def _http2_keepalive(fields: Fields) -> tuple[float, float]:
    fields.required("interval")
    fields.required("timeout")
    return duration_s(fields, "interval") or 1.0, duration_s(fields, "timeout") or 1.0


def outlier_detection(fields: Fields) -> OutlierDetection:
    """Read `outlierDetection`."""
    # Istio accepts both and makes nothing of them.
    fields.integer("consecutiveErrors", low=-INT32_MAX - 1, high=INT32_MAX)
    for item, at in fields.items("outlierDetectionHttpErrorCodes"):
        if not isinstance(item.value, int) or isinstance(item.value, bool) or not 100 <= item.value <= 599:
            fields.problems.add(at, "must be an HTTP status, 100 to 599")
    split = fields.boolean("splitExternalLocalOriginErrors")
    local = fields.integer("consecutiveLocalOriginFailures")
    if local and not split:
        fields.refuse("consecutiveLocalOriginFailures", "takes effect only with splitExternalLocalOriginErrors: true")
    return OutlierDetection(
        consecutive_5xx=fields.integer("consecutive5xxErrors"),
        consecutive_gateway=fields.integer("consecutiveGatewayErrors"),
        interval_s=duration_s(fields, "interval"),
        base_ejection_s=duration_s(fields, "baseEjectionTime"),
        max_ejection_percent=fields.integer("maxEjectionPercent", high=100),
        min_health_percent=fields.integer("minHealthPercent", high=100) or 0,
        split_local_origin=split,
        consecutive_local_origin=local,
    )
