"""What networking resources say, as values: DestinationRule, ServiceEntry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.problems import At


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionPool:
    """Bounds of connections and requests to a destination."""

    max_connections: int | None
    connect_timeout_s: float | None
    max_connection_duration_s: float | None
    tcp_keepalive: TcpKeepalive | None
    http1_max_pending_requests: int | None
    http2_max_requests: int | None
    max_requests_per_connection: int | None
    max_retries: int | None
    idle_timeout_s: float | None
    max_concurrent_streams: int | None
    h2_upgrade: bool | None
    http2_keepalive: tuple[float, float] | None
    """Interval and timeout of HTTP/2 pings, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpKeepalive:
    """TCP keepalive of connections; None leaves the system's default."""

    probes: int | None
    time_s: float | None
    interval_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierDetection:
    """When an endpoint is ejected. None leaves Envoy's default."""

    consecutive_5xx: int | None
    consecutive_gateway: int | None
    interval_s: float | None
    base_ejection_s: float | None
    max_ejection_percent: int | None
    min_health_percent: int
    split_local_origin: bool
    consecutive_local_origin: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HashKey:
    """What consistent hashing hashes: the value of a header, a cookie or a query parameter, or the source IP."""

    how: Literal["header", "cookie", "query", "source_ip"]
    name: str = ""
    cookie_path: str = ""
    cookie_ttl_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalancer:
    """How an endpoint is chosen; ``hash_key`` goes with RING_HASH and MAGLEV."""

    policy: Literal["LEAST_REQUEST", "ROUND_ROBIN", "RANDOM", "RING_HASH", "MAGLEV"]
    hash_key: HashKey | None = None
    table_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """TLS towards a destination."""

    mode: Literal["DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"]
    client_certificate: str
    private_key: str
    ca_certificates: str
    subject_alt_names: tuple[str, ...]
    sni: str
    insecure_skip_verify: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficPolicy:
    """What applies to traffic to a destination; ``ports`` replace parts for one port."""

    connection_pool: ConnectionPool | None
    outlier: OutlierDetection | None
    load_balancer: LoadBalancer | None
    tls: ClientTls | None
    ports: tuple[tuple[int, TrafficPolicy], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """Endpoints with certain labels, under a name."""

    name: str
    labels: Mapping[str, str]
    policy: TrafficPolicy | None
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationRule:
    """Policy and subsets of a host."""

    meta: Meta
    host: str
    policy: TrafficPolicy | None
    subsets: tuple[Subset, ...]
    export_to: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPort:
    """A port of a ServiceEntry."""

    number: int
    name: str
    protocol: str
    target_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryEndpoint:
    """An endpoint of a ServiceEntry; ``ports`` by name."""

    address: str
    ports: Mapping[str, int]
    labels: Mapping[str, str]
    weight: int
    service_account: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEntry:
    """Hosts that Kubernetes does not know."""

    meta: Meta
    hosts: tuple[str, ...]
    ports: tuple[EntryPort, ...]
    external: bool
    resolution: Literal["STATIC", "DNS"]
    endpoints: tuple[EntryEndpoint, ...]
    subject_alt_names: tuple[str, ...]
    export_to: tuple[str, ...]
