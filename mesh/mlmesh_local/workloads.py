"""Kubernetes Deployments as local processes: what to run, as whom, and how to tell whether it is ready. Pure.

`mlmesh_local.resources` has read and checked the Deployment; what is refused here is what one machine cannot do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mlmesh_local.resources.gateway_api.derive import derive
from mlmesh_local.resources.mesh_config import ROOT_NAMESPACE, MeshConfig
from mlmesh_local.resources.model import Container, Deployment, ProxyConfig
from mlmesh_local.resources.model import Probe as ProbeSpec
from mlmesh_local.resources.model_sidecars import ProxySettings
from mlmesh_local.resources.problems import InvalidResource, Problem
from mlmesh_local.resources.proxies import settings_of
from mlmesh_local.resources.resource_set import ResourceSet

REPLICAS_MAX = 100
DRAIN_S = 45
"""Istio's drainDuration."""
_CONTAINER = "spec.template.spec.containers[0]"
_FIELDS = {"grpc": "grpc", "http": "httpGet", "tcp": "tcpSocket", "exec": "exec"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """How a pod is asked; times in seconds. ``service`` is of gRPC, ``path`` of HTTP; a command needs no port."""

    how: Literal["grpc", "http", "tcp", "exec"] = "grpc"
    port: int = 0
    path: str = "/"
    command: tuple[str, ...] = ()
    service: str = ""
    initial_delay_s: float = 0.0
    period_s: float = 10.0
    timeout_s: float = 1.0
    failures_max: int = 3
    successes_min: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentEntry:
    """A variable: a text (with ``$(OTHER)`` references) or a field of the pod."""

    name: str
    value: str = ""
    field_path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A Deployment, reduced to what one machine needs. ``argv`` is empty for a gateway: it is its sidecar.

    ``proxy_threads`` 0 is one for each core; ``proxy_drain_s`` is how long listeners that go keep their connections;
    ``proxy`` is what the annotation says.
    """

    name: str
    namespace: str
    service_account: str
    replicas: int
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    argv: tuple[str, ...] = ()
    environment: tuple[EnvironmentEntry, ...] = ()
    ports: Mapping[str, int] = field(default_factory=dict)
    readiness: Probe | None = None
    liveness: Probe | None = None
    startup: Probe | None = None
    grace_s: float = 30.0
    is_gateway: bool = False
    proxy_threads: int = 1
    proxy_drain_s: int = DRAIN_S
    proxy: ProxySettings = field(default_factory=ProxySettings)

    def instance_name(self, ordinal: int) -> str:
        """Name of a replica, counted from 0."""
        return f"{self.name}-{ordinal}"


def workloads_of(resources: ResourceSet) -> list[Workload]:
    """What the Deployments of a whole set ask to run, with the proxies that its ProxyConfigs and MeshConfig ask for."""
    whole = derive(resources)
    mesh = next(iter(whole.specs(MeshConfig)), None)
    configs = whole.specs(ProxyConfig)
    default = mesh.proxies if mesh else ProxySettings()
    root = (mesh.root_namespace if mesh else "") or ROOT_NAMESPACE
    return [
        workload_of(one, settings_of(configs, default, one, root_namespace=root)) for one in whole.specs(Deployment)
    ]


def workload_of(deployment: Deployment, proxy: ProxySettings | None = None) -> Workload:
    """What to run for a Deployment. Raises InvalidResource that names the path of a field that cannot be served."""
    proxy = proxy or deployment.proxy
    at = _Refusal(deployment)
    if deployment.replicas > REPLICAS_MAX:
        raise at.refuse("spec.replicas", f"at most {REPLICAS_MAX} replicas run on one machine")
    container = deployment.containers[0] if len(deployment.containers) == 1 else None
    if container is None and not deployment.is_gateway:
        raise at.refuse("spec.template.spec.containers", "must be exactly one container: it becomes one process")
    argv: tuple[str, ...] = ()
    if container and not deployment.is_gateway:
        if not container.command:
            raise at.refuse(f"{_CONTAINER}.command", "is needed: there is no image here that knows what to start")
        argv = (*container.command, *container.args)
    elif container and (container.command or container.args):
        raise at.refuse(f"{_CONTAINER}.command", "a gateway runs Envoy and nothing else")
    ports = dict(deployment.container_ports())
    return Workload(
        name=deployment.meta.name,
        namespace=deployment.meta.namespace,
        service_account=deployment.service_account or "default",
        replicas=deployment.replicas,
        labels=dict(deployment.labels),
        annotations=dict(deployment.annotations),
        argv=argv,
        environment=_environment(container),
        ports=ports,
        proxy_threads=1 if proxy.concurrency is None else proxy.concurrency,
        proxy_drain_s=DRAIN_S if proxy.drain_s is None else int(proxy.drain_s),
        readiness=_probe(at, "readinessProbe", container.readiness if argv and container else None, ports),
        liveness=_probe(at, "livenessProbe", container.liveness if argv and container else None, ports),
        startup=_probe(at, "startupProbe", container.startup if argv and container else None, ports),
        grace_s=deployment.termination_grace_s,
        is_gateway=deployment.is_gateway,
        proxy=deployment.proxy,
    )


def resolve_environment(workload: Workload, values: Mapping[str, str]) -> dict[str, str]:
    """The variables of the manifest with ``$(NAME)`` and fieldRef replaced.

    ``values`` are fields of the pod by path, such as ``metadata.name``. As in Kubernetes a reference to an unknown
    variable stays as it is and ``$$`` is a dollar sign.
    """
    result: dict[str, str] = {}
    for entry in workload.environment:
        if entry.field_path:
            result[entry.name] = values.get(entry.field_path, "")
        else:
            result[entry.name] = expand(entry.value, result)
    return result


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Kubernetes' ``$(NAME)`` expansion."""
    parts: list[str] = []
    position = 0
    while (found := text.find("$", position)) >= 0:
        parts.append(text[position:found])
        following = text[found + 1 : found + 2]
        end = text.find(")", found) if following == "(" else -1
        if following == "$":
            parts.append("$")
            position = found + 2
        elif end >= 0:
            parts.append(variables.get(text[found + 2 : end], text[found : end + 1]))
            position = end + 1
        else:
            parts.append("$")
            position = found + 1
    parts.append(text[position:])
    return "".join(parts)


def _environment(container: Container | None) -> tuple[EnvironmentEntry, ...]:
    if container is None:
        return ()
    return tuple(
        EnvironmentEntry(name=entry.name, value=entry.value, field_path=entry.field_path)
        for entry in container.environment
    )


def _probe(at: _Refusal, name: str, probe: ProbeSpec | None, ports: Mapping[str, int]) -> Probe | None:
    if probe is None:
        return None
    if probe.how == "exec" and not probe.command:
        raise at.refuse(f"{_CONTAINER}.{name}.exec.command", "is missing")
    port = ports.get(probe.port) if isinstance(probe.port, str) else probe.port
    if port is None:
        raise at.refuse(f"{_CONTAINER}.{name}.{_FIELDS[probe.how]}.port", f"no container port is named {probe.port!r}")
    return Probe(
        how=probe.how,
        port=port,
        path=probe.path if probe.path.startswith("/") else f"/{probe.path}",
        command=probe.command,
        service=probe.grpc_service,
        initial_delay_s=probe.initial_delay_s,
        period_s=probe.period_s,
        timeout_s=probe.timeout_s,
        failures_max=probe.failure_threshold,
        successes_min=probe.success_threshold,
    )


class _Refusal:
    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    def refuse(self, path: str, message: str) -> InvalidResource:
        at = self._deployment.meta.at
        # The resource's own place knows its file and line; the path is ours.
        return InvalidResource([Problem(at=at.field(path), message=message)])
