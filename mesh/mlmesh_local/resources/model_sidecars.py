"""What Sidecar and ProxyConfig say, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_hosts import ConnectionPool
from mlmesh_local.resources.model_routes import Destination
from mlmesh_local.resources.protocols import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressListener:
    """Where a workload takes calls. ``endpoint`` is where its application does: "127.0.0.1:8080", "unix:///path" or
    empty for the same port."""

    port: int
    name: str
    protocol: Protocol
    endpoint: str = ""
    pool: ConnectionPool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressHost:
    """Hosts that are imported, or (``excluded``) left out: a host may be a wildcard.

    ``namespace`` "*" is every one, "." that of the workload.
    """

    namespace: str
    host: str
    excluded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressListener:
    """Which hosts a workload calls on a port: None on all ports that no other listener has, 0 on a unix socket.

    ``bind`` is an address, or "unix:///path"; empty leaves the mesh's own.
    """

    hosts: tuple[EgressHost, ...]
    port: int | None = None
    name: str = ""
    protocol: Protocol = "unknown"
    bind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """What the sidecars of a namespace (of the whole mesh, in the root namespace) know, and where they listen.

    ``selector`` None: of all workloads that no other Sidecar selects. ``outbound`` empty leaves the mesh's setting.
    """

    meta: Meta
    selector: Mapping[str, str] | None = None
    ingress: tuple[IngressListener, ...] = ()
    egress: tuple[EgressListener, ...] = ()
    pool: ConnectionPool | None = None
    outbound: Literal["", "ALLOW_ANY", "REGISTRY_ONLY"] = ""
    egress_proxy: Destination | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyConfig:
    """How the proxies of a scope run: ``concurrency`` worker threads, 0 for one a core, None for the default."""

    meta: Meta
    selector: Mapping[str, str] | None = None
    concurrency: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayTopology:
    """What is in front of a gateway: how many proxies are trusted, and what becomes of certificates they tell of.

    ``client_certificates`` empty leaves Istio's way; ``proxy_protocol``: connections begin with who calls.
    """

    trusted_proxies: int = 0
    client_certificates: str = ""
    proxy_protocol: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyHeaders:
    """Headers that proxies add. ``server`` None leaves Istio's name, an empty one the application's own header.

    ``certificate_details`` are those that are said (subject, cert, chain, dns, uri) of the caller's certificate.
    """

    client_certificates: str = ""
    certificate_details: tuple[tuple[str, bool], ...] = ()
    request_id: bool = True
    server: str | None = None
    attempt_count: bool = True
    debug: bool = True
    forwarded_port: bool = False
    forwarded_host: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """What of a proxy's configuration applies on a laptop. None leaves the laptop's own.

    ``concurrency`` 0 is a worker thread for each core; ``drain_s`` is how long listeners that go away keep their
    connections.
    """

    concurrency: int | None = None
    drain_s: float | None = None
    topology: GatewayTopology | None = None
    headers: ProxyHeaders | None = None

    def over(self, base: ProxySettings) -> ProxySettings:
        """These settings, and those of a wider scope where they say nothing."""
        return ProxySettings(
            concurrency=base.concurrency if self.concurrency is None else self.concurrency,
            drain_s=base.drain_s if self.drain_s is None else self.drain_s,
            topology=self.topology or base.topology,
            headers=self.headers or base.headers,
        )
