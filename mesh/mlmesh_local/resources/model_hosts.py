"""What resources about hosts say, as values: DestinationRule, ServiceEntry, WorkloadEntry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.problems import At
from mlmesh_local.resources.protocols import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionPool:
    """Bounds of connections and requests to a destination."""

    max_connections: int | None = None
    connect_timeout_s: float | None = None
    max_connection_duration_s: float | None = None
    tcp_keepalive: TcpKeepalive | None = None
    tcp_idle_timeout_s: float | None = None
    """0 turns it off."""
    http1_max_pending_requests: int | None = None
    http2_max_requests: int | None = None
    max_requests_per_connection: int | None = None
    max_retries: int | None = None
    idle_timeout_s: float | None = None
    max_concurrent_streams: int | None = None
    h2_upgrade: bool | None = None
    use_client_protocol: bool = False
    http2_keepalive: tuple[float, float] | None = None
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
    """What consistent hashing hashes: the value of a header, a cookie or a query parameter, or the source IP.

    ``cookie_ttl_s`` None makes no cookie for who has none; 0 makes one for the session.
    """

    how: Literal["header", "cookie", "query", "source_ip"]
    name: str = ""
    cookie_path: str = ""
    cookie_ttl_s: float | None = None
    cookie_attributes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalityBalancing:
    """Which localities get traffic: shares by ``distribute``, or the nearest while it is healthy.

    Attributes:
        enabled: None leaves it on.
        distribute: from a locality ("region/zone/subzone", "*" at the end), percentages of localities.
        failover: from a region, to the region that comes next.
        failover_priority: labels ("key" or "key=value") that endpoints share with the client, the most important first.
    """

    enabled: bool | None = None
    distribute: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    failover: tuple[tuple[str, str], ...] = ()
    failover_priority: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneAwareBalancing:
    """Envoy's own balancing between the zones of a region; ``failover`` and ``failover_priority`` as in
    `LocalityBalancing`. Envoy starts it from ``min_cluster_size`` endpoints on (None: its default, 6)."""

    enabled: bool | None = None
    failover: tuple[tuple[str, str], ...] = ()
    failover_priority: tuple[str, ...] = ()
    min_cluster_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Warmup:
    """Endpoints that are new get less: from a share, growing over a duration. None leaves Envoy's or Istio's default.

    ``plain`` is that of the deprecated `warmupDurationSecs`, which sets the duration only.
    """

    duration_s: float
    minimum_percent: float | None = None
    aggression: float | None = None
    plain: bool = False


BalancerPolicy = Literal["LEAST_REQUEST", "ROUND_ROBIN", "RANDOM", "PASSTHROUGH", "RING_HASH", "MAGLEV"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBalancer:
    """How an endpoint is chosen; ``hash_key`` and ``table_size`` go with RING_HASH and MAGLEV.

    Without a key RING_HASH and MAGLEV choose at random. ``table_size`` None leaves Envoy's own.
    """

    policy: BalancerPolicy
    hash_key: HashKey | None = None
    table_size: int | None = None
    locality: LocalityBalancing | None = None
    zone_aware: ZoneAwareBalancing | None = None
    warmup: Warmup | None = None


TlsMode = Literal["DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """TLS towards a destination."""

    mode: TlsMode
    client_certificate: str = ""
    private_key: str = ""
    ca_certificates: str = ""
    ca_crl: str = ""
    credential_name: str = ""
    subject_alt_names: tuple[str, ...] = ()
    sni: str = ""
    insecure_skip_verify: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunnel:
    """Connections are tunnelled to a target by a CONNECT (or POST) request to the destination."""

    protocol: Literal["CONNECT", "POST"]
    target_host: str
    target_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryBudget:
    """Most retries under way: a percentage of the requests under way, but at least a number. None: Istio's default."""

    percent: float | None
    min_concurrency: int | None
    interval_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficPolicy:
    """What applies to traffic to a destination; ``ports`` are the port-level settings, which inherit nothing."""

    connection_pool: ConnectionPool | None = None
    outlier: OutlierDetection | None = None
    load_balancer: LoadBalancer | None = None
    tls: ClientTls | None = None
    tunnel: Tunnel | None = None
    proxy_protocol: Literal["V1", "V2"] | None = None
    retry_budget: RetryBudget | None = None
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
    """Policy and subsets of a host. ``selector``: only for workloads with these labels of its namespace; None: all.

    ``export_to`` is as written; empty leaves the mesh's default.
    """

    meta: Meta
    host: str
    policy: TrafficPolicy | None
    subsets: tuple[Subset, ...]
    export_to: tuple[str, ...]
    selector: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryPort:
    """A port of a ServiceEntry. ``target_port`` 0: the same."""

    number: int
    name: str
    protocol: Protocol
    target_port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryEndpoint:
    """Where a host is served: an endpoint of a ServiceEntry, or a WorkloadEntry.

    Attributes:
        address: an IP, a host name (DNS), "unix://" and a path, or empty (in another network, behind its gateway).
        ports: by the names of the ServiceEntry's ports.
        locality: "region/zone/subzone"; empty leaves that of the labels.
        weight: 0 counts as 1.
    """

    address: str
    ports: Mapping[str, int]
    labels: Mapping[str, str]
    weight: int = 0
    service_account: str = ""
    locality: str = ""
    network: str = ""


Resolution = Literal["NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEntry:
    """Hosts that Kubernetes does not know.

    ``selector`` selects pods and WorkloadEntries of its namespace in place of ``endpoints``; None selects none.
    ``export_to`` is as written; empty leaves the mesh's default.
    """

    meta: Meta
    hosts: tuple[str, ...]
    ports: tuple[EntryPort, ...]
    external: bool
    resolution: Resolution
    endpoints: tuple[EntryEndpoint, ...] = ()
    selector: Mapping[str, str] | None = None
    addresses: tuple[str, ...] = ()
    subject_alt_names: tuple[str, ...] = ()
    export_to: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadEntry:
    """A workload that runs elsewhere; ServiceEntries and Services select it by its labels as they select pods."""

    meta: Meta
    endpoint: EntryEndpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadGroup:
    """A template for workloads that register themselves: none do on a laptop."""

    meta: Meta
