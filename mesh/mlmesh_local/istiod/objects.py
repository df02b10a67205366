"""What Istio's control plane reads of a cluster, made from resources and the pods that run: Services, Pods and
EndpointSlices as Kubernetes would have them, Istio's and the Gateway API's kinds as they were written.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mlmesh_local.istiod.defaults import defaulted
from mlmesh_local.istiod.store import Object, Resource

NODE = "laptop"
ROOT_NAMESPACE = "istio-system"
FIRST_TIME = "2026-01-01T00:00:00Z"
GATEWAY_API_VERSION = "v1.6.0"
TLS_MODE = "security.istio.io/tlsMode"
"""Label of pods whose sidecar takes mutual TLS."""

SERVICES: Final = Resource(group="", plural="services")
PODS: Final = Resource(group="", plural="pods")
NODES: Final = Resource(group="", plural="nodes")
NAMESPACES: Final = Resource(group="", plural="namespaces")
SECRETS: Final = Resource(group="", plural="secrets")
CONFIG_MAPS: Final = Resource(group="", plural="configmaps")
SERVICE_ACCOUNTS: Final = Resource(group="", plural="serviceaccounts")
SLICES: Final = Resource(group="discovery.k8s.io", plural="endpointslices")
DEFINITIONS: Final = Resource(group="apiextensions.k8s.io", plural="customresourcedefinitions")

_GATEWAY_API = "gateway.networking.k8s.io"
_ISTIO: Final = {
    "extensions.istio.io": ("TrafficExtension", "WasmPlugin"),
    "networking.istio.io": (
        "DestinationRule",
        "EnvoyFilter",
        "Gateway",
        "ProxyConfig",
        "ServiceEntry",
        "Sidecar",
        "VirtualService",
        "WorkloadEntry",
        "WorkloadGroup",
    ),
    "security.istio.io": ("AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication"),
    "telemetry.istio.io": ("Telemetry",),
    _GATEWAY_API: (
        "BackendTLSPolicy",
        "GRPCRoute",
        "Gateway",
        "GatewayClass",
        "HTTPRoute",
        "ListenerSet",
        "ReferenceGrant",
        "TCPRoute",
        "TLSRoute",
    ),
}
_CLUSTER_SCOPED = frozenset({"GatewayClass", "Namespace", "Node"})


def _plural(kind: str) -> str:
    lower = kind.lower()
    if lower.endswith("y") and lower[-2] not in "aeiou":
        return lower[:-1] + "ies"
    return lower + ("es" if lower.endswith(("s", "x")) else "s")


CUSTOM: Final[Mapping[tuple[str, str], Resource]] = {
    (group, kind): Resource(group=group, plural=_plural(kind)) for group, kinds in _ISTIO.items() for kind in kinds
}
"""Istio's kinds and the Gateway API's, by group and kind."""

_CORE: Final = {
    ("", "Service"): SERVICES,
    ("", "Pod"): PODS,
    ("", "Node"): NODES,
    ("", "Namespace"): NAMESPACES,
    ("", "Secret"): SECRETS,
    ("", "ConfigMap"): CONFIG_MAPS,
    ("", "ServiceAccount"): SERVICE_ACCOUNTS,
    ("discovery.k8s.io", "EndpointSlice"): SLICES,
    ("apiextensions.k8s.io", "CustomResourceDefinition"): DEFINITIONS,
}
KINDS: Final[Mapping[Resource, str]] = {
    **{resource: kind for (_, kind), resource in CUSTOM.items()},
    **{resource: kind for (_, kind), resource in _CORE.items()},
    **{
        Resource(group=group, plural=plural): kind
        for group, plural, kind in (
            ("admissionregistration.k8s.io", "mutatingwebhookconfigurations", "MutatingWebhookConfiguration"),
            ("admissionregistration.k8s.io", "validatingwebhookconfigurations", "ValidatingWebhookConfiguration"),
            ("apps", "deployments", "Deployment"),
            ("autoscaling", "horizontalpodautoscalers", "HorizontalPodAutoscaler"),
            ("networking.k8s.io", "ingresses", "Ingress"),
            ("networking.k8s.io", "ingressclasses", "IngressClass"),
            ("policy", "poddisruptionbudgets", "PodDisruptionBudget"),
        )
    },
}
"""Kind of every resource that is asked for."""

ENVOY_FILTERS: Final = CUSTOM["networking.istio.io", "EnvoyFilter"]
OWNED: Final = (NAMESPACES, NODES, SERVICE_ACCOUNTS, PODS, SERVICES, SLICES, CONFIG_MAPS, SECRETS, *CUSTOM.values())
"""Resources whose objects `cluster` makes, in an order in which a reader needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod that runs: where it is reached, and whether it takes requests."""

    name: str
    namespace: str
    address: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str] = field(default_factory=dict)
    service_account: str = "default"
    ports: Mapping[str, int] = field(default_factory=dict)
    ready: bool = True


def cluster(documents: Sequence[Object], pods: Iterable[Pod]) -> dict[Resource, list[Object]]:
    """Objects of a cluster that has these documents applied and runs these pods."""
    running = list(pods)
    found: dict[Resource, list[Object]] = {resource: [] for resource in OWNED}
    for document in documents:
        api = str(document.get("apiVersion", ""))
        group = api.rpartition("/")[0]
        kind = str(document.get("kind", ""))
        resource = CUSTOM.get((group, kind)) or _CORE.get((group, kind))
        if resource is None:
            continue
        item = _dated(defaulted(group, document))
        if kind not in _CLUSTER_SCOPED:
            item["metadata"].setdefault("namespace", "mlmesh")
        if resource == SERVICES:
            item["spec"] = _service_spec(item)
        found[resource].append(item)
    found[PODS] += [_pod(pod) for pod in running]
    for service in found[SERVICES]:
        slice_ = _slice(service, running)
        if slice_ is not None:
            found[SLICES].append(slice_)
    _surroundings(found)
    return found


def definitions() -> list[Object]:
    """The definitions of the custom kinds: the names are all that Istio looks at."""
    items = []
    for (group, kind), resource in CUSTOM.items():
        annotations = {f"{_GATEWAY_API}/bundle-version": GATEWAY_API_VERSION} if group == _GATEWAY_API else {}
        items.append(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": f"{resource.plural}.{group}", "annotations": annotations},
                "spec": {"group": group, "names": {"kind": kind, "plural": resource.plural}},
            }
        )
    return items


def _dated(document: Object) -> Object:
    metadata = dict(document.get("metadata") or {})
    # What is applied together is of one age; Istio then goes by the names.
    metadata.setdefault("creationTimestamp", FIRST_TIME)
    return {**document, "metadata": metadata}


def _surroundings(found: dict[Resource, list[Object]]) -> None:
    """Namespaces and the node, where the documents do not bring them."""
    named = {item["metadata"]["name"] for item in found[NAMESPACES]}
    used = {item["metadata"].get("namespace") for items in found.values() for item in items} | {ROOT_NAMESPACE}
    for name in sorted(used - named - {None, ""}):
        found[NAMESPACES].append(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {
                    "name": name,
                    "labels": {"kubernetes.io/metadata.name": name},
                    "creationTimestamp": FIRST_TIME,
                },
            }
        )
    for item in found[NAMESPACES]:
        item["metadata"]["labels"] = {
            "kubernetes.io/metadata.name": item["metadata"]["name"],
            **(item["metadata"].get("labels") or {}),
        }
    if not found[NODES]:
        found[NODES].append({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": {}}, "spec": {}})


def injected_labels(labels: Mapping[str, str], name: str, *, sidecar: bool) -> dict[str, str]:
    """Labels of a pod as Istio's injector leaves them."""
    service = labels.get("app.kubernetes.io/name") or labels.get("app") or name
    revision = labels.get("app.kubernetes.io/version") or labels.get("version") or "latest"
    return {
        "service.istio.io/canonical-name": service,
        "service.istio.io/canonical-revision": revision,
        **labels,
        **({TLS_MODE: "istio"} if sidecar else {}),
    }


def service_address(namespace: str, name: str) -> str:
    """The ClusterIP that a Service without one gets: the same one always."""
    number = zlib.crc32(f"{namespace}/{name}".encode())
    return f"10.{96 + number % 16}.{number // 16 % 256}.{1 + number // 4096 % 254}"


def _service_spec(item: Object) -> Object:
    """Kubernetes' defaults."""
    spec = dict(item.get("spec") or {})
    spec.setdefault("type", "ClusterIP")
    if spec["type"] != "ExternalName" and not spec.get("clusterIP"):
        spec["clusterIP"] = service_address(item["metadata"].get("namespace", ""), item["metadata"]["name"])
    if spec.get("clusterIP"):
        spec.setdefault("clusterIPs", [spec["clusterIP"]])
    spec["ports"] = [{"protocol": "TCP", "targetPort": port.get("port"), **port} for port in spec.get("ports") or ()]
    return spec


def _pod(pod: Pod) -> Object:
    ports = [
        {"name": name, "containerPort": number, "protocol": "TCP"}
        for name, number in pod.ports.items()
        if not name.isdigit()
    ]
    ports += [{"containerPort": number, "protocol": "TCP"} for name, number in pod.ports.items() if name.isdigit()]
    condition = {"type": "Ready", "status": "True" if pod.ready else "False"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod.name,
            "namespace": pod.namespace,
            "labels": dict(pod.labels),
            "annotations": dict(pod.annotations),
            "creationTimestamp": FIRST_TIME,
        },
        "spec": {
            "serviceAccountName": pod.service_account,
            "nodeName": NODE,
            "containers": [{"name": "app", "image": "local", "ports": ports}],
        },
        "status": {
            "phase": "Running",
            "podIP": pod.address,
            "podIPs": [{"ip": pod.address}],
            "conditions": [condition],
        },
    }


def _slice(service: Object, pods: Iterable[Pod]) -> Object | None:
    metadata, spec = service["metadata"], service["spec"]
    selector = spec.get("selector")
    if not selector or spec["type"] == "ExternalName":
        return None
    chosen = [pod for pod in pods if pod.namespace == metadata["namespace"] and _selects(selector, pod.labels)]
    # Pods that number a port differently go to slices of their own in Kubernetes; here the first pod's number counts.
    ports = []
    for port in spec["ports"]:
        number = _target(port, chosen)
        if number:
            ports.append({"name": port.get("name", ""), "port": number, "protocol": port["protocol"]})
            if port.get("appProtocol"):
                ports[-1]["appProtocol"] = port["appProtocol"]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "addressType": "IPv4",
        "metadata": {
            "name": f"{metadata['name']}-1",
            "namespace": metadata["namespace"],
            "labels": {"kubernetes.io/service-name": metadata["name"]},
            "creationTimestamp": FIRST_TIME,
        },
        "ports": ports,
        "endpoints": [
            {
                "addresses": [pod.address],
                "conditions": {"ready": pod.ready, "serving": pod.ready, "terminating": False},
                "nodeName": NODE,
                "targetRef": {"kind": "Pod", "name": pod.name, "namespace": pod.namespace},
            }
            for pod in chosen
        ],
    }


def _target(port: Object, pods: Sequence[Pod]) -> int:
    target: Any = port["targetPort"]
    if isinstance(target, int):
        return target
    return next((pod.ports[target] for pod in pods if target in pod.ports), 0)


def _selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.items())
