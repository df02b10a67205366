"""Protocols of ports: what is declared, and what follows from it.

https://istio.io/latest/docs/ops/configuration/traffic-management/protocol-selection/
"""

from __future__ import annotations

from typing import Literal, get_args

Protocol = Literal[
    "grpc",
    "grpc-web",
    "http",
    "http2",
    "http-proxy",
    "https",
    "tls",
    "tcp",
    "udp",
    "mongo",
    "mysql",
    "redis",
    "unknown",
]
""" "unknown" is declared by nobody: Istio's sidecars look at the first bytes to tell HTTP from TCP."""

WELL_KNOWN_TCP = frozenset({25, 53, 3306, 27017})
"""Ports of protocols in which the server speaks first: waiting for the client's first bytes would wait forever."""

_BY_NAME: dict[str, Protocol] = {name: name for name in get_args(Protocol) if name not in ("unknown", "http-proxy")}
_BY_NAME["http_proxy"] = "http-proxy"
_APPLICATION: dict[str, Protocol] = {
    # https://kubernetes.io/docs/concepts/services-networking/service/#application-protocol
    "kubernetes.io/h2c": "http2",
    "kubernetes.io/ws": "http",
    "kubernetes.io/wss": "https",
}


def parse_protocol(text: str) -> Protocol | None:
    """The protocol that Istio's resources call by a name, in any case; None when there is none of that name."""
    return _BY_NAME.get(text.lower())


def port_protocol(number: int, name: str, application: str | None, transport: str = "TCP") -> Protocol:
    """Protocol of a Kubernetes port: appProtocol, else the port's name up to its first hyphen."""
    if transport == "UDP":
        return "udp"
    if application in _APPLICATION:
        return _APPLICATION[application]
    word = (name if application is None else application).lower()
    if word.startswith("grpc-web"):
        return "grpc-web"
    found = _BY_NAME.get(word.partition("-")[0])
    if found is None:
        return "tcp" if number in WELL_KNOWN_TCP else "unknown"
    return found


def is_http(protocol: Protocol) -> bool:
    """Whether requests are seen, and so routed."""
    return protocol in ("grpc", "grpc-web", "http", "http2", "http-proxy")


def is_http2(protocol: Protocol) -> bool:
    """Whether HTTP/2 is spoken without negotiation."""
    return protocol in ("grpc", "grpc-web", "http2")


def is_tls(protocol: Protocol) -> bool:
    """Whether the application makes TLS itself: connections are told apart by their server name."""
    return protocol in ("https", "tls")
