"""What Gateways say, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.problems import At


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
