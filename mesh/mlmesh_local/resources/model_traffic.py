"""What networking resources say, as values: VirtualService, DestinationRule, Gateway, ServiceEntry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.problems import At


@dataclass(frozen=True, slots=True, kw_only=True)
class StringMatch:
    """How a string is compared. ``present`` matches whatever value there is."""

    how: Literal["exact", "prefix", "regex", "present"]
    value: str = ""

    def __str__(self) -> str:
        if self.how == "present":
            return "present"
        return f"{'=' if self.how == 'exact' else self.how} {self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where a route sends. Port 0: the service's only port, else the port of the listener."""

    host: str
    subset: str
    port: int
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderEdits:
    """Edits of request and response headers. Set overwrites, add appends."""

    request_set: Mapping[str, str]
    request_add: Mapping[str, str]
    request_remove: tuple[str, ...]
    response_set: Mapping[str, str]
    response_add: Mapping[str, str]
    response_remove: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedDestination:
    """A destination with its share: its weight over the sum of the route's weights."""

    destination: Destination
    weight: int
    headers: HeaderEdits | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpMatch:
    """Conditions that must all hold."""

    name: str
    uri: StringMatch | None
    ignore_uri_case: bool
    scheme: StringMatch | None
    method: StringMatch | None
    authority: StringMatch | None
    headers: tuple[tuple[str, StringMatch], ...]
    without_headers: tuple[tuple[str, StringMatch], ...]
    query_params: tuple[tuple[str, StringMatch], ...]
    port: int
    source_labels: Mapping[str, str]
    source_namespace: str
    gateways: tuple[str, ...]
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Retry policy; 0 attempts turn retries off."""

    attempts: int
    per_try_timeout_s: float | None
    retry_on: str
    ignore_previous_hosts: bool | None
    backoff_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultDelay:
    """Delay of a percentage of requests."""

    fixed_delay_s: float
    percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultAbort:
    """Abort of a percentage of requests, with one of the two statuses."""

    http_status: int | None
    grpc_status: str | None
    percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Faults injected before the router: retries do not see them."""

    delay: FaultDelay | None
    abort: FaultAbort | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """A copy of a percentage of requests, whose answers are dropped."""

    destination: Destination
    percent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """What is rewritten before the request is sent on; empty leaves it."""

    authority: str
    uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRule:
    """One entry of `spec.http`: any of the matches (none: everything) sends to the destinations by weight."""

    name: str
    matches: tuple[HttpMatch, ...]
    destinations: tuple[WeightedDestination, ...]
    timeout_s: float | None
    retries: Retries | None
    fault: Fault | None
    mirrors: tuple[Mirror, ...]
    headers: HeaderEdits | None
    rewrite: Rewrite | None
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualService:
    """Routing rules of hosts, tried in order; ``gateways`` contains "mesh" for sidecars."""

    meta: Meta
    hosts: tuple[str, ...]
    gateways: tuple[str, ...]
    export_to: tuple[str, ...]
    http: tuple[HttpRule, ...]


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
class ServerTls:
    """TLS of a gateway's server."""

    mode: Literal["SIMPLE", "MUTUAL", "ISTIO_MUTUAL", "OPTIONAL_MUTUAL"]
    credential_name: str
    subject_alt_names: tuple[str, ...]
    min_version: str
    max_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayServer:
    """A port of a gateway. ``protocol`` is GRPC, HTTP, HTTP2 or HTTPS.

    ``hosts`` are without namespace parts; ``host_namespaces`` says for each from which namespace VirtualServices may
    bind to it: "*" for all.
    """

    port: int
    port_name: str
    protocol: str
    hosts: tuple[str, ...]
    host_namespaces: tuple[str, ...]
    tls: ServerTls | None
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Servers of the proxies that the selector selects."""

    meta: Meta
    selector: Mapping[str, str]
    servers: tuple[GatewayServer, ...]


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
