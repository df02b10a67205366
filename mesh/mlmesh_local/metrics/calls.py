"""What an Envoy reports of a request or of a connection, as values. Empty text is "not known"."""

from __future__ import annotations

from typing import Literal, NamedTuple

Role = Literal["inbound", "outbound", "gateway"]
"""Which listener reports: of calls to the application, of its own calls, or a gateway's."""


class Peers(NamedTuple):
    """Who talks to whom, as the reporting proxy saw it. Few values for many requests: a key."""

    node: str
    role: Role
    cluster: str
    """Envoy's upstream cluster."""
    route: str
    authority: str
    """Host of the request, where nothing else tells the service: outbound only."""
    downstream_host: str
    upstream_host: str
    downstream_peer: str
    """SPIFFE id of the certificate that the caller showed."""
    downstream_local: str
    upstream_peer: str


class Routed(NamedTuple):
    """By which route a call was sent on: few values for many calls."""

    resource: str
    """Path of the VirtualService as Istio writes it; empty for the default route of a service."""
    rule: str
    """Our own metadata of the route, as JSON; Istio's control plane gives none."""
    name: str
    """Name of the route."""


class HttpCall(NamedTuple):
    """A request that ended, or (``ended`` false) one that goes on. Counts are since its start."""

    peers: Peers
    stream: tuple[int, str]
    """Tells the streams of one node apart: start in nanoseconds, and request id."""
    ended: bool
    grpc: bool
    code: int
    """HTTP status, 0 for none."""
    grpc_status: int
    """-1 for none."""
    flags: str
    """Envoy's short response flags, "-" for none."""
    duration_ms: int
    received_bytes: int
    sent_bytes: int
    received_messages: int
    sent_messages: int
    method: str = ""
    path: str = ""
    authority: str = ""
    user_agent: str = ""
    destination_port: int = 0
    """The port that the caller dialled; 0 where it is not known."""
    headers: tuple[tuple[str, str], ...] = ()
    response_headers: tuple[tuple[str, str], ...] = ()
    route: Routed | None = None


class TcpReport(NamedTuple):
    """A connection that goes on or ended. Bytes are since its start."""

    peers: Peers
    stream: tuple[int, str]
    ended: bool
    flags: str
    received_bytes: int
    sent_bytes: int


GRPC_STATUS_OF_HTTP = {400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14}
"""gRPC status of a response without one, https://github.com/grpc/grpc/blob/master/doc/http-grpc-status-mapping.md."""


def grpc_status(text: str, code: int) -> int:
    """The gRPC status: what trailers or headers say, else what the HTTP status means; -1 without any response."""
    if text.isdigit():
        return int(text)
    return GRPC_STATUS_OF_HTTP.get(code, 2) if code else -1
