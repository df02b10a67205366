"""Deployments and Namespaces: Services that disagree, annotations that mean nothing, injection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlmesh_local.resources.analysis.annotations import IGNORED, KNOWN, check
from mlmesh_local.resources.analysis.cluster import Cluster, Item, listed, mapped
from mlmesh_local.resources.indexes import LabelIndex

_INJECTION = "istio-injection"
_REVISION = "istio.io/rev"
_DATAPLANE = "istio.io/dataplane-mode"
_PROXY_UID = 1337


def analyze_workloads(cluster: Cluster) -> None:
    """Look at all of them."""
    in_front = _in_front(cluster)
    for item in cluster.items("Deployment"):
        _services(cluster, item, in_front.get(item.full_name, []))
        _user(cluster, item)
    for item in cluster.items("Namespace"):
        _injection(cluster, item)
    for kind in ("Namespace", "Service", "Deployment"):
        for item in cluster.items(kind):
            _annotations(cluster, item, kind)
    for item in cluster.items("Pod"):
        _annotations(cluster, item, "Pod")
    # Istio finds these at the pods that a cluster makes of them.
    for kind in ("Deployment", "StatefulSet"):
        for item in cluster.items(kind):
            _annotations(cluster, item, "Pod", "spec", "template")


def _in_front(cluster: Cluster) -> dict[str, list[Item]]:
    """Services by the full names of the Deployments that they select."""
    deployments = LabelIndex(
        (item.namespace, mapped(mapped(mapped(item.spec.get("template")).get("metadata")).get("labels")), item)
        for item in cluster.items("Deployment")
    )
    found: dict[str, list[Item]] = {}
    for service in cluster.items("Service"):
        selector = mapped(service.spec.get("selector"))
        for item in deployments.select(service.namespace, selector) if selector else []:
            found.setdefault(item.full_name, []).append(service)
    return found


def _services(cluster: Cluster, item: Item, services: list[Item]) -> None:
    protocols: dict[int, dict[str, list[str]]] = {}
    targets: dict[str, dict[int, str]] = {}
    for service in services:
        for port in listed(service.spec.get("ports")):
            number = port.get("port", 0)
            protocols.setdefault(number, {}).setdefault(port.get("protocol") or "TCP", []).append(service.full_name)
            targets.setdefault(str(port.get("targetPort") or number), {})[number] = service.full_name
    for number, found in protocols.items():
        if len(found) > 1:
            names = ", ".join(sorted(name for some in found.values() for name in some))
            cluster.report("IST0116", item, f"the port {number} has several protocols in {names}")
    for target, ports in targets.items():
        if len(ports) > 1:
            numbers = ", ".join(str(number) for number in sorted(ports))
            names = ", ".join(sorted(set(ports.values())))
            cluster.report("IST0137", item, f"the target port {target} has the ports {numbers} in {names}")


def _user(cluster: Cluster, item: Item) -> None:
    if "istio" in item.meta.labels or item.meta.labels.get("release") == "istio":
        return
    pod = mapped(mapped(item.spec.get("template")).get("spec"))
    users = [mapped(pod.get("securityContext")).get("runAsUser")]
    users += [
        mapped(container.get("securityContext")).get("runAsUser")
        for container in listed(pod.get("containers"))
        if container.get("name") not in {"istio-proxy", "istio-operator"}
    ]
    if _PROXY_UID in users:
        cluster.report("IST0144", item, f"the user {_PROXY_UID} is the sidecar's: its traffic is not captured")


def _injection(cluster: Cluster, item: Item) -> None:
    if item.meta.name == "istio-system":
        return
    labels = item.meta.labels
    injection = labels.get(_INJECTION)
    told = [f"{_INJECTION}={injection}"] if injection is not None else []
    if injection in {None, "enabled"}:
        told += [f"{name}={labels[name]}" for name in (_REVISION, _DATAPLANE) if name in labels]
    if len(told) > 1:
        cluster.report("IST0123", item, f"several labels say how to inject: {', '.join(told)}", "metadata", "labels")
    if labels.get(_DATAPLANE) != "ambient" and not injection and _REVISION not in labels:
        text = f"pods here get no sidecar in a cluster: the label {_INJECTION}=enabled is missing"
        cluster.report("IST0102", item, text, "metadata", "labels")


def _annotations(cluster: Cluster, item: Item, kind: str, *around: str) -> None:
    holder: Mapping[str, Any] = item.plain
    for step in around:
        holder = mapped(holder.get(step))
    labels, annotations = (mapped(mapped(holder.get("metadata")).get(name)) for name in ("labels", "annotations"))
    for name, value in annotations.items():
        if not (name.split("/")[0].endswith("istio.io") or name == "kubernetes.io/ingress.class") or name in IGNORED:
            continue
        known = KNOWN.get(name)
        place = (*around, "metadata", "annotations", name)
        if known is None:
            cluster.report("IST0108", item, f'Istio has no annotation "{name}"', *place)
            continue
        deprecated, kinds = known
        if deprecated and not (name == "sidecar.istio.io/inject" and name in labels):
            cluster.report("IST0135", item, f'the annotation "{name}" is deprecated', *place)
        if "Any" in kinds:
            continue
        if kind not in kinds:
            text = f'the annotation "{name}" is for {", ".join(kinds)}, not for {kind}'
            cluster.report("IST0107", item, text, *place)
        elif problem := check(name, value):
            cluster.report("IST0125", item, f'"{value}" is not a value of "{name}": {problem}', *place)
