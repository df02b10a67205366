"""What Kubernetes resources say, as values: the part that a laptop can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_sidecars import ProxySettings
from mlmesh_local.resources.protocols import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """How readiness or liveness is asked. ``port`` is a number or a port's name, ``path`` of HTTP."""

    how: Literal["grpc", "http", "tcp", "exec"]
    port: int | str
    grpc_service: str
    path: str
    command: tuple[str, ...]
    initial_delay_s: int
    period_s: int
    timeout_s: int
    failure_threshold: int
    success_threshold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentVariable:
    """A value, or the path of the pod's field that gives it, such as "metadata.name"."""

    name: str
    value: str
    field_path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerPort:
    """A port on which the container listens."""

    name: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """What runs."""

    name: str
    image: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    environment: tuple[EnvironmentVariable, ...]
    ports: tuple[ContainerPort, ...]
    readiness: Probe | None
    liveness: Probe | None
    startup: Probe | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Replicas of a pod. ``labels`` and ``annotations`` are those of the pod template.

    ``proxy`` is what its annotation `proxy.istio.io/config` says.
    """

    meta: Meta
    replicas: int
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    service_account: str
    containers: tuple[Container, ...]
    termination_grace_s: int
    proxy: ProxySettings = field(default_factory=ProxySettings)

    @property
    def is_gateway(self) -> bool:
        """Whether Istio would inject a gateway proxy instead of a sidecar."""
        return self.annotations.get("inject.istio.io/templates") == "gateway"

    def container_ports(self) -> Mapping[str, int]:
        """Name (the number where there is none) to number of every container port."""
        return {port.name or str(port.number): port.number for container in self.containers for port in container.ports}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePort:
    """A port of a Service. ``target`` is a number or a container port's name."""

    number: int
    name: str
    target: int | str
    protocol: Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A name for the pods that the selector selects.

    Attributes:
        headless: without a cluster IP.
        external_name: the host that an ExternalName Service stands for.
        export_to: who sees it; empty leaves the mesh's default.
        distribution: nearest endpoints first: of the own zone or node; "any" for none, whatever its namespace says.
        node_local: only endpoints of the own node; a laptop is one node.
        not_ready: whether pods that are not ready are called, too.
    """

    meta: Meta
    selector: Mapping[str, str]
    ports: tuple[ServicePort, ...]
    headless: bool = False
    external_name: str = ""
    export_to: tuple[str, ...] = ()
    distribution: Literal["", "zone", "node", "any"] = ""
    node_local: bool = False
    not_ready: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAccount:
    """An identity."""

    meta: Meta
