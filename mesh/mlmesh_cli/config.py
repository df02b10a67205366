"""What the command line takes from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlmesh_runtime.config import Variable

SERVICES = ("registry", "training", "inference")
SERVICE_PORT = 9000
NAMESPACE = "mlmesh"


def service_target(service: str) -> str:
    """The host and port by which the mesh knows a service: registry.mlmesh.svc.cluster.local:9000."""
    return f"{service}.{NAMESPACE}.svc.cluster.local:{SERVICE_PORT}"


VARIABLES: tuple[Variable, ...] = (
    Variable(
        name="MLMESH_STATE_DIR",
        default=".mlmesh",
        meaning="The state folder of the laptop mesh that `mlmesh` commands act on, where --state-dir does not say.",
    ),
    Variable(
        name="MLMESH_ISTIOD",
        default="",
        meaning="Istio's pilot-discovery, for `mlmesh up --control-plane istiod` without --istiod. Empty: on PATH.",
    ),
    *(
        Variable(
            name=f"MLMESH_{service.upper()}_TARGET",
            default="",
            meaning=f"Where `mlmesh` dials {service}, host:port. Empty: through the sidecar of the laptop's toolbox.",
        )
        for service in SERVICES
        if service != "registry"
    ),
)
"""What the command line reads, next to MLMESH_REGISTRY_TARGET, MLMESH_OUTBOUND_HOST and OTEL_EXPORTER_OTLP_ENDPOINT,
which the runtime tells of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CliSettings:
    """Settings of the command line.

    Attributes:
        targets: host:port by service, where services are dialed directly; a missing one asks the laptop mesh.
        outbound_host: address of the sidecar's outbound listeners, empty where the network captures traffic.
        otlp_endpoint: where client spans go ("http://host:port"), empty asks the laptop mesh.
    """

    targets: Mapping[str, str] = field(default_factory=dict)
    outbound_host: str = ""
    otlp_endpoint: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> CliSettings:
        """Reads VARIABLES and the runtime's three."""
        keys = {service: f"MLMESH_{service.upper()}_TARGET" for service in SERVICES}
        return cls(
            targets={service: environ[key] for service, key in keys.items() if environ.get(key)},
            outbound_host=environ.get("MLMESH_OUTBOUND_HOST", ""),
            otlp_endpoint=environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
        )


def full_host(host: str) -> str:
    """A service's full host name from a short one: inference → inference.mlmesh.svc.cluster.local."""
    return host if not host or "." in host else f"{host}.{NAMESPACE}.svc.cluster.local"
