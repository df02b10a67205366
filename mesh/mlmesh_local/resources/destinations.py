"""DestinationRule: https://istio.io/latest/docs/reference/config/networking/destination-rule/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, cast

from mlmesh_local.resources.fields import INT32_MAX, Fields
from mlmesh_local.resources.model import (
    ClientTls,
    ConnectionPool,
    DestinationRule,
    HashKey,
    LoadBalancer,
    Meta,
    OutlierDetection,
    Subset,
    TcpKeepalive,
    TrafficPolicy,
)
from mlmesh_local.resources.networking import export_to

T = TypeVar("T")


def parse_destination_rule(meta: Meta, spec: Fields) -> DestinationRule:
    """Read a DestinationRule's spec."""
    spec.unsupported("workloadSelector")
    host = spec.host("host", required=True)
    policy = part(spec, "trafficPolicy", _policy)
    subsets: list[Subset] = []
    for item in spec.messages("subsets"):
        with item:
            name = item.name("name", required=True)
            if any(subset.name == name for subset in subsets):
                item.refuse("name", f'the subset "{name}" occurs twice')
            subsets.append(
                Subset(
                    name=name,
                    labels=item.text_map("labels"),
                    policy=part(item, "trafficPolicy", _policy),
                    at=item.at,
                )
            )
    return DestinationRule(meta=meta, host=host, policy=policy, subsets=tuple(subsets), export_to=export_to(spec))


def part(fields: Fields, name: str, parse: Callable[[Fields], T]) -> T | None:
    """A mapping read by `parse`, or None when absent."""
    if not fields.has(name):
        fields.ignored(name)
        return None
    with fields.message(name) as inner:
        return parse(inner)


def _policy(fields: Fields) -> TrafficPolicy:
    fields.unsupported("tunnel", "proxyProtocol", "retryBudget")
    ports: list[tuple[int, TrafficPolicy]] = []
    for item in fields.messages("portLevelSettings"):
        with item:
            number = 0
            if item.required("port"):
                with item.message("port") as inner:
                    number = inner.port("number", required=True)
            item.ignored("port")
            ports.append((number, _parts(item)))
    base = _parts(fields)
    return TrafficPolicy(
        connection_pool=base.connection_pool,
        outlier=base.outlier,
        load_balancer=base.load_balancer,
        tls=base.tls,
        ports=tuple(ports),
    )


def _parts(fields: Fields) -> TrafficPolicy:
    return TrafficPolicy(
        connection_pool=part(fields, "connectionPool", _connection_pool),
        outlier=part(fields, "outlierDetection", _outlier),
        load_balancer=part(fields, "loadBalancer", _load_balancer),
        tls=part(fields, "tls", _tls),
    )


def _connection_pool(fields: Fields) -> ConnectionPool:
    with fields.message("tcp") as tcp, fields.message("http") as http:
        tcp.unsupported("idleTimeout", why="it belongs to TCP listeners, which the laptop mesh has not")
        http.unsupported("useClientProtocol")
        upgrade = http.choice("h2UpgradePolicy", ("DEFAULT", "DO_NOT_UPGRADE", "UPGRADE"), "DEFAULT")
        return ConnectionPool(
            max_connections=tcp.integer("maxConnections", high=INT32_MAX),
            connect_timeout_s=tcp.duration_s("connectTimeout"),
            max_connection_duration_s=tcp.duration_s("maxConnectionDuration"),
            tcp_keepalive=part(tcp, "tcpKeepalive", _tcp_keepalive),
            http1_max_pending_requests=http.integer("http1MaxPendingRequests", high=INT32_MAX),
            http2_max_requests=http.integer("http2MaxRequests", high=INT32_MAX),
            max_requests_per_connection=http.integer("maxRequestsPerConnection", high=2**29),
            max_retries=http.integer("maxRetries", high=INT32_MAX),
            idle_timeout_s=http.duration_s("idleTimeout", low_s=0.0),
            max_concurrent_streams=http.integer("maxConcurrentStreams", high=INT32_MAX),
            h2_upgrade={"DEFAULT": None, "DO_NOT_UPGRADE": False, "UPGRADE": True}[upgrade],
            http2_keepalive=part(http, "http2KeepAlive", _http2_keepalive),
        )


def _tcp_keepalive(fields: Fields) -> TcpKeepalive:
    return TcpKeepalive(
        probes=fields.integer("probes"),
        time_s=fields.duration_s("time", low_s=1.0),
        interval_s=fields.duration_s("interval", low_s=1.0),
    )


def _http2_keepalive(fields: Fields) -> tuple[float, float]:
    fields.required("interval")
    fields.required("timeout")
    return fields.duration_s("interval") or 1.0, fields.duration_s("timeout") or 1.0


def _outlier(fields: Fields) -> OutlierDetection:
    fields.unsupported(
        "consecutiveErrors", why="Istio dropped it; use consecutive5xxErrors or consecutiveGatewayErrors"
    )
    split = fields.boolean("splitExternalLocalOriginErrors")
    local = fields.integer("consecutiveLocalOriginFailures")
    if local and not split:
        fields.refuse("consecutiveLocalOriginFailures", "takes effect only with splitExternalLocalOriginErrors: true")
    return OutlierDetection(
        consecutive_5xx=fields.integer("consecutive5xxErrors"),
        consecutive_gateway=fields.integer("consecutiveGatewayErrors"),
        interval_s=fields.duration_s("interval"),
        base_ejection_s=fields.duration_s("baseEjectionTime"),
        max_ejection_percent=fields.integer("maxEjectionPercent", high=100),
        min_health_percent=fields.integer("minHealthPercent", high=100) or 0,
        split_local_origin=split,
        consecutive_local_origin=local,
    )


def _load_balancer(fields: Fields) -> LoadBalancer:
    fields.unsupported("localityLbSetting", why="the laptop mesh has no localities")
    fields.unsupported("warmupDurationSecs", "warmup")
    fields.one_of("simple", "consistentHash")
    if fields.has("consistentHash"):
        fields.ignored("simple", "consistentHash")
        with fields.message("consistentHash") as inner:
            return _consistent_hash(inner)
    fields.ignored("consistentHash")
    simple = fields.choice(
        "simple",
        ("LEAST_REQUEST", "ROUND_ROBIN", "RANDOM", "LEAST_CONN", "UNSPECIFIED"),
        "UNSPECIFIED",
        unsupported=("PASSTHROUGH",),
    )
    # Istio's default, and what it makes of the deprecated LEAST_CONN.
    policy = "LEAST_REQUEST" if simple in {"UNSPECIFIED", "LEAST_CONN"} else simple
    return LoadBalancer(policy=cast('Literal["LEAST_REQUEST", "ROUND_ROBIN", "RANDOM"]', policy))


def _consistent_hash(fields: Fields) -> LoadBalancer:
    keys = ("httpHeaderName", "httpCookie", "useSourceIp", "httpQueryParameterName")
    how = fields.one_of(*keys, required=True)
    fields.one_of("ringHash", "maglev", "minimumRingSize")
    header, query = fields.text("httpHeaderName"), fields.text("httpQueryParameterName")
    source_ip = fields.boolean("useSourceIp")
    cookie = part(fields, "httpCookie", _cookie)
    if how == "useSourceIp" and not source_ip:
        fields.refuse("useSourceIp", "false hashes nothing; leave consistentHash out")
    if how == "httpHeaderName":
        key = HashKey(how="header", name=header.lower())
    elif how == "httpQueryParameterName":
        key = HashKey(how="query", name=query)
    else:
        key = cookie or HashKey(how="source_ip")
    ring = part(fields, "ringHash", lambda inner: inner.integer("minimumRingSize", high=8 * 2**20))
    maglev = part(fields, "maglev", lambda inner: inner.integer("tableSize", high=5_000_011))
    old = fields.integer("minimumRingSize", high=8 * 2**20)
    if fields.has("maglev"):
        return LoadBalancer(policy="MAGLEV", hash_key=key, table_size=maglev)
    return LoadBalancer(policy="RING_HASH", hash_key=key, table_size=ring or old)


def _cookie(fields: Fields) -> HashKey:
    return HashKey(
        how="cookie",
        name=fields.text("name", required=True),
        cookie_path=fields.text("path"),
        cookie_ttl_s=fields.duration_s("ttl", low_s=0.0),
    )


def _tls(fields: Fields) -> ClientTls:
    fields.unsupported("credentialName", why="sidecars of the laptop mesh read files; use caCertificates")
    fields.unsupported("caCrl")
    mode = fields.choice("mode", ("DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"), "DISABLE")
    tls = ClientTls(
        mode=cast('Literal["DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"]', mode),
        client_certificate=fields.text("clientCertificate"),
        private_key=fields.text("privateKey"),
        ca_certificates=fields.text("caCertificates"),
        subject_alt_names=fields.texts("subjectAltNames"),
        sni=fields.text("sni"),
        insecure_skip_verify=fields.boolean("insecureSkipVerify"),
    )
    files = ("clientCertificate", "privateKey", "caCertificates")
    if mode in {"DISABLE", "ISTIO_MUTUAL"}:
        for name in files:
            if fields.has(name):
                fields.refuse(name, f"does not go with mode {mode}")
    if mode == "MUTUAL":
        for name in files[:2]:
            fields.required(name)
    if tls.insecure_skip_verify and (tls.ca_certificates or tls.subject_alt_names):
        fields.refuse("insecureSkipVerify", "cannot be set together with caCertificates or subjectAltNames")
    return tls
