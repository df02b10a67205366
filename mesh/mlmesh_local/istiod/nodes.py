"""How a proxy introduces itself to Istio's control plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from mlmesh_local.istiod.objects import NODE, injected_labels
from mlmesh_local.istiod.store import Object
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.model import MeshConfig
from mlmesh_local.resources.proxies import ANNOTATION
from mlmesh_local.resources.resource_set import ResourceSet

VERSION = "1.31.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A proxy: what Istio chooses configuration by."""

    kind: Literal["sidecar", "gateway"] = "sidecar"
    name: str
    namespace: str
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)
    service_account: str = "default"
    interception: Literal["REDIRECT", "NONE"] = "REDIRECT"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    domain: str = "cluster.local"

    @property
    def id(self) -> str:
        """``kind~address~name.namespace~domain``."""
        role = "router" if self.kind == "gateway" else "sidecar"
        return f"{role}~{self.address}~{self.name}.{self.namespace}~{self.namespace}.svc.{self.domain}"

    def plain(self) -> dict[str, Any]:
        """core.v3.Node as proto-JSON."""
        metadata = {
            "NAME": self.name,
            "NAMESPACE": self.namespace,
            "LABELS": dict(self.labels),
            "SERVICE_ACCOUNT": self.service_account,
            "INTERCEPTION_MODE": self.interception,
            "INSTANCE_IPS": self.address,
            "ISTIO_VERSION": VERSION,
            "MESH_ID": self.domain,
            "CLUSTER_ID": "Kubernetes",
            "NODE_NAME": NODE,
            "WORKLOAD_NAME": self.name,
            **self.metadata,
        }
        return {"id": self.id, "cluster": f"{self.labels.get('app', self.name)}.{self.namespace}", "metadata": metadata}


def pod_labels(proxy: ProxyNode) -> dict[str, str]:
    """Labels of a proxy's pod, those of injection among them."""
    return injected_labels(proxy.labels, proxy.id, sidecar=proxy.kind == "sidecar")


def default_config(resources: ResourceSet) -> Object:
    """`defaultConfig` of the MeshConfig that was applied, as it was written."""
    for resource in resources.of_kind(MeshConfig):
        settings = yaml.safe_load((resource.plain.get("data") or {}).get("mesh") or "") or {}
        return dict(settings.get("defaultConfig") or {})
    return {}


def node_of(proxy: ProxyNode, annotations: Mapping[str, str], defaults: Object) -> Node:
    """How a proxy of the laptop introduces itself. ``defaults`` are the settings of all proxies."""
    # A pod's own settings come with the agent beside its Envoy, which has joined them with those of the mesh.
    own = yaml.safe_load(annotations.get(ANNOTATION, "")) or {}
    return Node(
        kind="gateway" if proxy.kind == "gateway" else "sidecar",
        name=proxy.id,
        namespace=proxy.namespace,
        address=proxy.pod_address,
        labels=pod_labels(proxy),
        service_account=proxy.service_account,
        metadata={"PROXY_CONFIG": _joined(defaults, own)} if own else {},
    )


def _joined(defaults: Object, own: Object) -> Object:
    """Settings with others that come before them, field by field, as messages are merged."""
    both = {
        key for key in defaults.keys() & own.keys() if isinstance(defaults[key], dict) and isinstance(own[key], dict)
    }
    return {**defaults, **own, **{key: _joined(defaults[key], own[key]) for key in both}}
