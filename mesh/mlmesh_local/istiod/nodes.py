"""How a proxy introduces itself to Istio's control plane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mlmesh_local.istiod.objects import NODE

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
