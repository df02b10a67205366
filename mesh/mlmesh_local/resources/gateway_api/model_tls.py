"""What the Gateway API says of TLS beyond a listener's own: towards backends, and of clients of a Gateway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlmesh_local.resources.gateway_api.model import ObjectRef
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.problems import At


@dataclass(frozen=True, slots=True, kw_only=True)
class CaBundle:
    """A ConfigMap with roots (PEM) under `ca.crt` or `cacert`. Beside MeshConfig no other ConfigMaps mean something.

    ``valid``: there is a certificate in it.
    """

    meta: Meta
    roots: str
    valid: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTarget:
    """A Service or a ServiceEntry (or one port of it, by name) that a policy is for."""

    group: str
    kind: str
    name: str
    section: str = ""
    at: At = field(compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendTlsPolicy:
    """BackendTLSPolicy: TLS to backends, with the name and the roots that their certificates are checked with.

    ``alt_names`` are DNS names and URIs. ``well_known`` is "System" or a name of somebody's own.
    """

    meta: Meta
    targets: tuple[PolicyTarget, ...]
    hostname: str
    roots: tuple[ObjectRef, ...] = ()
    well_known: str = ""
    alt_names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientValidation:
    """How certificates of a Gateway's clients are checked. ``insecure``: they may be missing or of anybody."""

    roots: tuple[ObjectRef, ...]
    insecure: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayTls:
    """TLS of a whole Gateway: checks of clients, at all ports and at some, and the certificate that it has itself."""

    default: ClientValidation | None = None
    ports: Mapping[int, ClientValidation | None] = field(default_factory=dict)
    client_certificate: ObjectRef | None = None

    def validation(self, port: int) -> ClientValidation | None:
        """The check at a port."""
        return self.ports.get(port, self.default)

    @property
    def insecure(self) -> bool:
        """Whether some port lets everybody in."""
        return any(one is not None and one.insecure for one in (self.default, *self.ports.values()))
