"""Kubernetes Deployments as local processes: what to run, as whom, and how to tell whether it is ready.

A field has an effect here, or has none on one machine by its nature (images, resources, scheduling), or is refused
with its path. Nothing is silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlmesh_runtime.errors import InvalidInput

GATEWAY_TEMPLATE = "inject.istio.io/templates"
GRACE_S = 30.0

_DEPLOYMENT = frozenset({"apiVersion", "kind", "metadata", "spec", "status"})
_SPEC = frozenset({"replicas", "selector", "template"})
_SPEC_NO_EFFECT = frozenset({"strategy", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"})
_POD = frozenset({"serviceAccountName", "containers", "terminationGracePeriodSeconds", "volumes", "restartPolicy"})
_POD_NO_EFFECT = frozenset({
    "securityContext", "affinity", "nodeSelector", "tolerations", "topologySpreadConstraints", "imagePullSecrets",
    "priorityClassName", "automountServiceAccountToken", "enableServiceLinks", "runtimeClassName", "dnsPolicy",
    "schedulerName",
})  # fmt: skip
_CONTAINER = frozenset({
    "name", "command", "args", "env", "ports", "readinessProbe", "livenessProbe", "startupProbe",
})  # fmt: skip
# volumeMounts: MLMESH_DATA_DIR gives the data folder. lifecycle: traffic is moved away before the process is told.
_CONTAINER_NO_EFFECT = frozenset({
    "image", "imagePullPolicy", "resources", "securityContext", "volumeMounts", "lifecycle",
    "terminationMessagePath", "terminationMessagePolicy",
})  # fmt: skip
# Others bring files that the process would miss.
_VOLUMES = frozenset({"name", "emptyDir", "persistentVolumeClaim", "ephemeral"})
_PROBE = frozenset({
    "grpc", "initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold", "successThreshold",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A gRPC health probe with Kubernetes' fields and defaults; times in seconds."""

    port: int
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
    """A Deployment, reduced to what one machine needs. ``argv`` is empty for a gateway: it is its sidecar."""

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
    grace_s: float = GRACE_S
    is_gateway: bool = False

    def instance_name(self, ordinal: int) -> str:
        """Name of a replica, counted from 0."""
        return f"{self.name}-{ordinal}"


def read_deployment(document: Mapping[str, Any], *, where: str = "") -> Workload:
    """A workload from a Deployment (apps/v1). ``where`` (a file) begins every message.

    Raises InvalidInput with reason INVALID_RESOURCE that names the path of the field.
    """
    at = _Reader(f"{where}: " if where else "", str(_get(document, "metadata", "name") or "?"))
    at.keys(document, "", _DEPLOYMENT, frozenset())
    metadata = at.mapping(document, "metadata")
    spec = at.mapping(document, "spec")
    at.keys(spec, "spec", _SPEC, _SPEC_NO_EFFECT)
    template = at.mapping(spec, "spec.template")
    pod_metadata = at.mapping(template, "spec.template.metadata", optional=True)
    labels = at.texts(pod_metadata, "spec.template.metadata.labels")
    selector = at.mapping(spec, "spec.selector", optional=True)
    for key, value in at.texts(selector, "spec.selector.matchLabels").items():
        if labels.get(key) != value:
            raise at.error(f"spec.selector.matchLabels.{key}", f"does not select its own pods ({labels.get(key)!r})")
    pod = at.mapping(template, "spec.template.spec")
    at.keys(pod, "spec.template.spec", _POD, _POD_NO_EFFECT)
    _check_volumes(at, pod)
    annotations = at.texts(pod_metadata, "spec.template.metadata.annotations")
    shared: dict[str, Any] = {
        "name": at.text(metadata, "metadata.name"),
        "namespace": str(metadata.get("namespace") or "default"),
        "service_account": str(pod.get("serviceAccountName") or "default"),
        "replicas": at.number(spec, "spec.replicas", default=1, most=250, whole=True),
        "labels": labels,
        "annotations": annotations,
        "grace_s": at.number(pod, "spec.template.spec.terminationGracePeriodSeconds", default=GRACE_S),
    }
    containers = pod.get("containers")
    if not isinstance(containers, Sequence) or len(containers) != 1 or not isinstance(containers[0], Mapping):
        raise at.error("spec.template.spec.containers", "must be exactly one container")
    return _with_container(at, containers[0], shared)


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


def _with_container(at: _Reader, container: Mapping[str, Any], shared: dict[str, Any]) -> Workload:
    path = "spec.template.spec.containers[0]"
    at.keys(container, path, _CONTAINER, _CONTAINER_NO_EFFECT)
    ports = _read_ports(at, container, path)
    templates = [item.strip() for item in shared["annotations"].get(GATEWAY_TEMPLATE, "").split(",")]
    if "gateway" in templates:
        if container.get("command") or container.get("args"):
            raise at.error(f"{path}.command", "a gateway runs Envoy and nothing else")
        return Workload(**shared, ports=ports, is_gateway=True)
    command = at.strings(container, f"{path}.command")
    if not command:
        raise at.error(f"{path}.command", "is needed: images are not used here, so nobody else knows what to start")
    return Workload(
        **shared,
        ports=ports,
        argv=(*command, *at.strings(container, f"{path}.args")),
        environment=_read_environment(at, container, path),
        readiness=_read_probe(at, container, f"{path}.readinessProbe", ports),
        liveness=_read_probe(at, container, f"{path}.livenessProbe", ports),
        startup=_read_probe(at, container, f"{path}.startupProbe", ports),
    )


def _read_ports(at: _Reader, container: Mapping[str, Any], path: str) -> dict[str, int]:
    ports: dict[str, int] = {}
    for index, item in enumerate(container.get("ports") or ()):
        here = f"{path}.ports[{index}]"
        if not isinstance(item, Mapping):
            raise at.error(here, "must be an object")
        at.keys(item, here, frozenset({"name", "containerPort", "protocol"}), frozenset())
        if item.get("protocol", "TCP") != "TCP":
            raise at.error(f"{here}.protocol", "only TCP is supported")
        number = at.number(item, f"{here}.containerPort", least=1, most=65535, whole=True)
        ports[str(item.get("name") or number)] = int(number)
    return ports


def _read_environment(at: _Reader, container: Mapping[str, Any], path: str) -> tuple[EnvironmentEntry, ...]:
    entries: list[EnvironmentEntry] = []
    for index, item in enumerate(container.get("env") or ()):
        here = f"{path}.env[{index}]"
        if not isinstance(item, Mapping):
            raise at.error(here, "must be an object")
        at.keys(item, here, frozenset({"name", "value", "valueFrom"}), frozenset())
        name = at.text(item, f"{here}.name")
        source = item.get("valueFrom")
        if source is None:
            entries.append(EnvironmentEntry(name=name, value=str(item.get("value", ""))))
            continue
        if not isinstance(source, Mapping) or set(source) != {"fieldRef"}:
            raise at.error(f"{here}.valueFrom", "only fieldRef is supported")
        field_path = at.text(at.mapping(source, f"{here}.valueFrom.fieldRef"), f"{here}.valueFrom.fieldRef.fieldPath")
        entries.append(EnvironmentEntry(name=name, field_path=field_path))
    return tuple(entries)


def _read_probe(at: _Reader, container: Mapping[str, Any], path: str, ports: Mapping[str, int]) -> Probe | None:
    if container.get(path.rpartition(".")[2]) is None:
        return None
    probe = at.mapping(container, path)
    at.keys(probe, path, _PROBE, frozenset())
    grpc = at.mapping(probe, f"{path}.grpc")
    at.keys(grpc, f"{path}.grpc", frozenset({"port", "service"}), frozenset())
    port = grpc.get("port")
    # Kubernetes takes a number only; a name is what people write first, and its meaning is clear.
    if isinstance(port, str) and port in ports:
        port = ports[port]
    if not isinstance(port, int) or isinstance(port, bool):
        raise at.error(f"{path}.grpc.port", f"must be a port number, not {port!r}")
    return Probe(
        port=port,
        service=str(grpc.get("service") or ""),
        initial_delay_s=at.number(probe, f"{path}.initialDelaySeconds", default=0),
        period_s=at.number(probe, f"{path}.periodSeconds", default=10, least=1),
        timeout_s=at.number(probe, f"{path}.timeoutSeconds", default=1, least=1),
        failures_max=int(at.number(probe, f"{path}.failureThreshold", default=3, least=1, whole=True)),
        successes_min=int(at.number(probe, f"{path}.successThreshold", default=1, least=1, whole=True)),
    )


def _check_volumes(at: _Reader, pod: Mapping[str, Any]) -> None:
    if pod.get("restartPolicy", "Always") != "Always":
        raise at.error("spec.template.spec.restartPolicy", "must be Always, as in every Deployment")
    for index, volume in enumerate(pod.get("volumes") or ()):
        here = f"spec.template.spec.volumes[{index}]"
        if not isinstance(volume, Mapping):
            raise at.error(here, "must be an object")
        at.keys(volume, here, _VOLUMES, frozenset())


def _get(document: Mapping[str, Any], *path: str) -> Any:
    value: Any = document
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


class _Reader:
    """Reads fields of one Deployment and says where a wrong one is."""

    def __init__(self, prefix: str, name: str) -> None:
        self._prefix = prefix
        self._name = name

    def error(self, path: str, message: str) -> InvalidInput:
        text = f"{self._prefix}Deployment {self._name}: {path}: {message}"
        return InvalidInput(text, field=path, reason="INVALID_RESOURCE")

    def keys(self, value: Mapping[str, Any], path: str, used: frozenset[str], no_effect: frozenset[str]) -> None:
        for key in value:
            if key not in used and key not in no_effect:
                raise self.error(f"{path}.{key}".lstrip("."), "is not supported by the laptop mesh")

    def mapping(self, parent: Mapping[str, Any], path: str, *, optional: bool = False) -> Mapping[str, Any]:
        value = parent.get(path.rpartition(".")[2])
        if value is None and optional:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(path, "must be an object")
        return value

    def text(self, parent: Mapping[str, Any], path: str) -> str:
        value = parent.get(path.rpartition(".")[2])
        if not isinstance(value, str) or not value:
            raise self.error(path, "must be a text")
        return value

    def texts(self, parent: Mapping[str, Any], path: str) -> dict[str, str]:
        return {str(key): str(value) for key, value in self.mapping(parent, path, optional=True).items()}

    def strings(self, parent: Mapping[str, Any], path: str) -> list[str]:
        value = parent.get(path.rpartition(".")[2]) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(path, "must be a list of texts")
        return value

    def number(
        self,
        parent: Mapping[str, Any],
        path: str,
        *,
        default: float | None = None,
        least: float = 0,
        most: float = 86400,
        whole: bool = False,
    ) -> Any:
        value = parent.get(path.rpartition(".")[2], default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.error(path, f"must be a number from {least} to {most}, not {value!r}")
        if whole and value != int(value):
            raise self.error(path, f"must be a whole number, not {value!r}")
        return value
