"""The proxy of a Gateway: Istio makes a Deployment, a Service and a ServiceAccount for each that names no Service.

manifests/charts/istio-control/istio-discovery/files/kube-gateway.yaml of Istio says what they look like. The port 15021
of its health checks is left out: the supervisor sees for itself whether the proxy is ready.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mlmesh_local.resources.gateway_api.listeners import GATEWAY_NAME_LABEL, account_name, workload_name
from mlmesh_local.resources.gateway_api.model import KubernetesGateway, Listener, ListenerSet

Document = dict[str, Any]
_OWN_PREFIX = "gateway.networking.k8s.io/"
_LEFT_OUT = (
    "kubectl.kubernetes.io/last-applied-configuration",
    "gateway.istio.io/name-override",
    "gateway.istio.io/service-account",
    "gateway.istio.io/controller-version",
)


def workload_documents(
    gateway: KubernetesGateway, sets: Iterable[ListenerSet] = ()
) -> Iterator[tuple[str, str, Mapping[str, str], Document]]:
    """Kind, name, labels and spec (the whole body of a ServiceAccount) of what is made for a Gateway with its sets."""
    name, account = workload_name(gateway), account_name(gateway)
    labels = _metadata(gateway.labels, gateway.meta.labels)
    annotations = {
        key: value
        for key, value in _metadata(gateway.annotations, gateway.meta.annotations).items()
        if key not in _LEFT_OUT
    }
    ours = {
        **labels,
        GATEWAY_NAME_LABEL: gateway.meta.name,
        "gateway.networking.k8s.io/gateway-class-name": gateway.class_name,
    }
    managed = {**ours, "gateway.istio.io/managed": "istio.io-gateway-controller"}
    selected = {GATEWAY_NAME_LABEL: gateway.meta.name}
    pod_labels = {
        "sidecar.istio.io/inject": "false",
        "service.istio.io/canonical-name": name,
        "service.istio.io/canonical-revision": "latest",
        **managed,
    }
    ports = _ports([*gateway.listeners, *(listener for one in sets for listener in one.listeners)])
    yield "ServiceAccount", account, ours, {}
    yield (
        "Deployment",
        name,
        managed,
        {
            "selector": {"matchLabels": selected},
            "template": {
                # The template that Istio's injector would use is how this mesh knows a gateway.
                "metadata": {
                    "labels": pod_labels,
                    "annotations": {**annotations, "inject.istio.io/templates": "gateway"},
                },
                "spec": {
                    "serviceAccountName": account,
                    "containers": [
                        {
                            "name": "istio-proxy",
                            "image": "auto",
                            "ports": [{"containerPort": port["port"], "name": f"p{port['port']}"} for port in ports],
                        }
                    ],
                },
            },
        },
    )
    yield "Service", name, ours, {"selector": selected, "ports": ports, "type": "LoadBalancer"}


def _metadata(wanted: Mapping[str, str] | None, own: Mapping[str, str]) -> dict[str, str]:
    """Labels or annotations of what is made: those of `spec.infrastructure`, else the Gateway's own."""
    if wanted is None:
        return dict(own)
    return {key: value for key, value in wanted.items() if not key.startswith(_OWN_PREFIX)}


def _ports(listeners: Iterable[Listener]) -> list[Document]:
    found: dict[int, Document] = {}
    names: set[str] = set()
    for listener in listeners:
        if listener.port in found:
            continue
        name = listener.name.replace(".", "-")[:63]
        if name in names:
            name = f"{name[: 62 - len(str(listener.port))]}-{listener.port}"
        names.add(name)
        found[listener.port] = {
            "name": name,
            "port": listener.port,
            "protocol": "TCP",
            "appProtocol": listener.protocol.lower(),
        }
    return list(found.values())
