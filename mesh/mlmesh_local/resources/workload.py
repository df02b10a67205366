"""Deployment, StatefulSet, Pod and ServiceAccount: the part of Kubernetes' API that a laptop can run.

What only a cluster can do (scheduling, resources, security contexts, volumes) is read and ignored by name; what would
change what runs (init containers, values from ConfigMaps) is refused.
"""

from __future__ import annotations

from typing import Literal

from mlmesh_local.resources.balancing import REGION, SUBZONE, ZONE
from mlmesh_local.resources.checked import part
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model import (
    Container,
    ContainerPort,
    Deployment,
    EnvironmentVariable,
    Meta,
    Probe,
    ServiceAccount,
)
from mlmesh_local.resources.model_sidecars import ProxySettings
from mlmesh_local.resources.names import is_port_name, key_problem, value_problem
from mlmesh_local.resources.proxies import ANNOTATION, annotated
from mlmesh_local.resources.services import port_or_name

REPLICAS_MAX = 100
# fmt: off
_CLUSTER_ONLY_POD = (
    "affinity", "automountServiceAccountToken", "dnsConfig", "dnsPolicy", "enableServiceLinks", "hostAliases",
    "hostname", "imagePullSecrets", "nodeName", "os", "overhead", "preemptionPolicy", "priority",
    "priorityClassName", "readinessGates", "resourceClaims", "resources", "restartPolicy", "runtimeClassName",
    "schedulerName", "schedulingGates", "securityContext", "setHostnameAsFQDN", "shareProcessNamespace",
    "subdomain", "tolerations", "topologySpreadConstraints", "volumes",
)
_CLUSTER_ONLY_CONTAINER = (
    "imagePullPolicy", "resources", "resizePolicy", "restartPolicy", "securityContext", "stdin", "stdinOnce",
    "terminationMessagePath", "terminationMessagePolicy", "tty", "volumeDevices", "volumeMounts", "workingDir",
)
_FIELD_PATHS = (
    "metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "spec.serviceAccountName",
    "status.podIP", "status.hostIP",
)
_CLUSTER_ONLY = (
    "strategy", "minReadySeconds", "revisionHistoryLimit", "paused", "progressDeadlineSeconds", "serviceName",
    "podManagementPolicy", "updateStrategy", "volumeClaimTemplates", "persistentVolumeClaimRetentionPolicy", "ordinals",
)
# fmt: on
_TOPOLOGY = (REGION, ZONE, SUBZONE, "kubernetes.io/hostname")


def parse_deployment(meta: Meta, spec: Fields) -> Deployment:
    """Read the spec of a Deployment or StatefulSet, which on a laptop are the same."""
    spec.ignored(*_CLUSTER_ONLY)
    replicas = spec.integer("replicas", low=0, high=REPLICAS_MAX)
    with spec.message("selector") as inner:
        inner.unsupported("matchExpressions")
        selected = inner.text_map("matchLabels")
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    proxy = ProxySettings()
    with spec.message("template") as template:
        with template.message("metadata") as metadata:
            metadata.ignored("name", "namespace", "creationTimestamp")
            labels = dict(metadata.text_map("labels"))
            for key, value in labels.items():
                problem = key_problem(key) or value_problem(value)
                if problem:
                    metadata.refuse("labels", problem)
            annotations = dict(metadata.text_map("annotations"))
            proxy = _proxy(metadata)
        with template.message("spec") as pod:
            service_account, grace_s, containers = _pod(pod)
            labels = {**_topology(pod), **labels}
    for key, value in selected.items():
        if labels.get(key) != value:
            spec.refuse("selector", f'selects "{key}: {value}", which the template\'s labels do not have')
    return Deployment(
        meta=meta,
        replicas=1 if replicas is None else replicas,
        labels=labels,
        annotations=annotations,
        service_account=service_account,
        containers=containers,
        termination_grace_s=grace_s,
        proxy=proxy,
    )


def _proxy(metadata: Fields) -> ProxySettings:
    for key, node, at in metadata.entries("annotations"):
        if key == ANNOTATION and isinstance(node.value, str):
            return annotated(node.value, at, metadata.problems)
    return ProxySettings()


def parse_pod(meta: Meta, spec: Fields) -> Deployment:
    """Read a Pod's spec: a workload of one replica."""
    topology = _topology(spec)
    service_account, grace_s, containers = _pod(spec)
    return Deployment(
        meta=meta,
        replicas=1,
        labels={**topology, **meta.labels},
        annotations=meta.annotations,
        service_account=service_account,
        containers=containers,
        termination_grace_s=grace_s,
        proxy=annotated(meta.annotations[ANNOTATION], meta.at, spec.problems)
        if ANNOTATION in meta.annotations
        else ProxySettings(),
    )


def _topology(pod: Fields) -> dict[str, str]:
    """Labels of the node that a pod asks for: where it runs. Kubernetes copies them to the pod."""
    return {label: value for label, value in pod.text_map("nodeSelector").items() if label in _TOPOLOGY}


def _pod(pod: Fields) -> tuple[str, int, tuple[Container, ...]]:
    pod.ignored(*_CLUSTER_ONLY_POD)
    pod.unsupported(
        "initContainers", "ephemeralContainers", "hostNetwork", "hostPID", "hostIPC", "activeDeadlineSeconds"
    )
    account = pod.name("serviceAccountName")
    deprecated = pod.name("serviceAccount")
    grace_s = pod.integer("terminationGracePeriodSeconds", high=86400)
    containers = tuple(_container(item) for item in pod.messages("containers"))
    if not containers:
        pod.problems.add(pod.at, '"containers" needs at least one container')
    return account or deprecated or "default", 30 if grace_s is None else grace_s, containers


def _container(fields: Fields) -> Container:
    with fields:
        fields.ignored(*_CLUSTER_ONLY_CONTAINER)
        fields.unsupported(
            "lifecycle", why="the laptop mesh drains by SIGTERM; remove the hook or move it to an overlay"
        )
        fields.unsupported("envFrom", why="the laptop mesh does not read ConfigMaps and Secrets")
        return Container(
            name=fields.name("name", required=True),
            image=fields.text("image"),
            command=fields.texts("command"),
            args=fields.texts("args"),
            environment=tuple(_environment(item) for item in fields.messages("env")),
            ports=tuple(_container_port(item) for item in fields.messages("ports")),
            readiness=part(fields, "readinessProbe", _probe),
            liveness=part(fields, "livenessProbe", _probe),
            startup=part(fields, "startupProbe", _probe),
        )


def _environment(fields: Fields) -> EnvironmentVariable:
    with fields:
        name = fields.text("name", required=True)
        value = fields.text("value")
        path = ""
        fields.one_of("value", "valueFrom")
        if fields.has("valueFrom"):
            with fields.message("valueFrom") as source:
                source.unsupported(
                    "configMapKeyRef", "secretKeyRef", why="the laptop mesh does not read ConfigMaps and Secrets"
                )
                source.unsupported("resourceFieldRef", "fileKeyRef", why="a local process has no resource bounds")
                if source.required("fieldRef") and source.has("fieldRef"):
                    with source.message("fieldRef") as reference:
                        reference.ignored("apiVersion")
                        path = _field_path(reference)
                source.ignored("fieldRef")
        fields.ignored("valueFrom")
        return EnvironmentVariable(name=name, value=value, field_path=path)


def _field_path(fields: Fields) -> str:
    path = fields.text("fieldPath", required=True)
    if path in _FIELD_PATHS or path.startswith(("metadata.labels['", "metadata.annotations['")):
        return path
    fields.refuse("fieldPath", f'not supported: "{path}"; use one of {", ".join(_FIELD_PATHS)}')
    return ""


def _container_port(fields: Fields) -> ContainerPort:
    with fields:
        fields.unsupported("hostPort", "hostIP")
        fields.choice("protocol", ("TCP",), "TCP", unsupported=("UDP", "SCTP"))
        name = fields.text("name")
        if name and not is_port_name(name):
            problem = "is not the name of a port: up to 15 letters in lower case, digits and hyphens"
            fields.refuse("name", f'"{name}" {problem}')
        return ContainerPort(name=name, number=fields.port("containerPort", required=True))


def _probe(fields: Fields) -> Probe:
    fields.ignored("terminationGracePeriodSeconds")
    how = fields.one_of("grpc", "httpGet", "tcpSocket", "exec", required=True)
    port: int | str = 0
    service = ""
    command: tuple[str, ...] = ()
    with fields.message("grpc") as grpc:
        service = grpc.text("service")
        if how == "grpc":
            port = grpc.port("port", required=True)
    with fields.message("httpGet") as http:
        http.unsupported("host", "httpHeaders")
        http.choice("scheme", ("HTTP",), "HTTP", unsupported=("HTTPS",))
        path = http.text("path")
        if how == "httpGet":
            port = port_or_name(http, "port")
    with fields.message("tcpSocket") as tcp:
        tcp.unsupported("host")
        if how == "tcpSocket":
            port = port_or_name(tcp, "port")
    with fields.message("exec") as run:
        command = run.texts("command")
    kinds: dict[str, Literal["grpc", "http", "tcp", "exec"]] = {"grpc": "grpc", "httpGet": "http", "tcpSocket": "tcp"}
    return Probe(
        how=kinds.get(how, "exec"),
        port=port,
        grpc_service=service,
        path=path,
        command=command,
        initial_delay_s=fields.integer("initialDelaySeconds", high=86400) or 0,
        period_s=fields.integer("periodSeconds", low=1, high=86400) or 10,
        timeout_s=fields.integer("timeoutSeconds", low=1, high=86400) or 1,
        failure_threshold=fields.integer("failureThreshold", low=1, high=10000) or 3,
        success_threshold=fields.integer("successThreshold", low=1, high=10000) or 1,
    )


def parse_service_account(meta: Meta, body: Fields) -> ServiceAccount:
    """Read a ServiceAccount."""
    body.ignored("automountServiceAccountToken", "imagePullSecrets", "secrets")
    return ServiceAccount(meta=meta)
