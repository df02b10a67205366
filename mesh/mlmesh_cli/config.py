"""What the command line takes from the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SERVICES = ("registry", "training", "inference")
SERVICE_PORT = 9000
NAMESPACE = "mlmesh"


def service_target(service: str) -> str:
    """The host and port by which the mesh knows a service: registry.mlmesh.svc.cluster.local:9000."""
    return f"{service}.{NAMESPACE}.svc.cluster.local:{SERVICE_PORT}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CliSettings:
    """Settings of the command line.

    Attributes:
        targets: host:port by service, where the services are dialed directly; empty asks the laptop mesh.
        outbound_host: address of the sidecar's outbound listeners, empty where the network captures traffic.
        otlp_endpoint: where client spans go ("http://host:port"), empty asks the laptop mesh.
        debug: whether an unexpected failure shows its traceback.
    """

    targets: Mapping[str, str]
    outbound_host: str
    otlp_endpoint: str
    debug: bool

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> CliSettings:
        """Reads MLMESH_{REGISTRY,TRAINING,INFERENCE}_TARGET, _OUTBOUND_HOST, the OTLP endpoint and MLMESH_DEBUG."""
        keys = {service: f"MLMESH_{service.upper()}_TARGET" for service in SERVICES}
        return cls(
            targets={service: environ[key] for service, key in keys.items() if environ.get(key)},
            outbound_host=environ.get("MLMESH_OUTBOUND_HOST", ""),
            otlp_endpoint=environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", ""),
            debug=environ.get("MLMESH_DEBUG", "") not in ("", "0"),
        )


def full_host(host: str) -> str:
    """A service's full host name from a short one: inference → inference.mlmesh.svc.cluster.local."""
    return host if not host or "." in host else f"{host}.{NAMESPACE}.svc.cluster.local"
