"""The same YAML for both sides: a world for our translator, a cluster and nodes for Istio's control plane."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlmesh_local.istiod.nodes import Node
from mlmesh_local.istiod.objects import Pod, injected_labels
from mlmesh_local.model import ProxyNode, World
from mlmesh_local.resources import Document, ResourceSet, load_resources
from mlmesh_local.resources.model_sidecars import ProxySettings
from mlmesh_local.resources.problems import At, Problems
from mlmesh_local.resources.proxies import ANNOTATION, annotated
from mlmesh_local.translate import service_endpoints

NAMESPACE = "mlmesh"
GATEWAY_TEMPLATE = "gateway"
# yaml.CSafeLoader is ten times as fast.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One proxy of the world with its pod."""

    pod: Pod
    kind: str
    number: int
    own_labels: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.pod.name

    def node(self) -> Node:
        """How it introduces itself to Istio."""
        return Node(
            kind="gateway" if self.kind == "gateway" else "sidecar",
            name=self.pod.name,
            namespace=self.pod.namespace,
            address=self.pod.address,
            labels=self.pod.labels,
            service_account=self.pod.service_account,
            metadata={"PROXY_CONFIG": dict(self.config)},
        )

    def proxy(self) -> ProxyNode:
        """How our translator knows it."""
        gateway = self.kind == "gateway"
        return ProxyNode(
            id=self.pod.name,
            kind="gateway" if gateway else "sidecar",
            namespace=self.pod.namespace,
            service_account=self.pod.service_account,
            labels=self.own_labels,
            pod_address=self.pod.address,
            application_address="" if gateway else f"127.64.2.{self.number}",
            outbound_address="" if gateway else f"127.64.3.{self.number}",
            container_ports=self.pod.ports,
            settings=self.settings,
        )

    @property
    def settings(self) -> ProxySettings:
        """What its annotation says, as our reader has it."""
        text = self.pod.annotations.get(ANNOTATION, "")
        return annotated(text, At(source="case.yaml", line=0), Problems())


def read(paths: Iterable[Path]) -> str:
    """The text of files (and of the YAML files of folders)."""
    texts: list[str] = []
    for path in paths:
        files = sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
        texts += [file.read_text() for file in files]
    return "\n---\n".join(texts)


@functools.lru_cache(maxsize=64)
def documents(text: str) -> list[dict[str, Any]]:
    """Plain documents of a text, Lists flattened; not to be changed."""
    found: list[dict[str, Any]] = []
    for document in yaml.load_all(text, Loader=LOADER):
        if isinstance(document, dict):
            found += document["items"] if document.get("kind") == "List" else [document]
    return found


def members(found: Sequence[Mapping[str, Any]]) -> list[Member]:
    """One proxy and pod a Deployment, in order."""
    result: list[Member] = []
    default = _default_config(found)
    for document in found:
        if document.get("kind") != "Deployment":
            continue
        number = len(result) + 1
        template = document["spec"]["template"]
        metadata, spec = template.get("metadata") or {}, template["spec"]
        annotations = metadata.get("annotations") or {}
        ports = [port for container in spec["containers"] for port in container.get("ports") or ()]
        gateway = annotations.get("inject.istio.io/templates") == GATEWAY_TEMPLATE
        pod = Pod(
            name=document["metadata"]["name"],
            namespace=document["metadata"].get("namespace", NAMESPACE),
            address=f"127.64.1.{number}",
            labels=injected_labels(metadata.get("labels") or {}, document["metadata"]["name"], sidecar=not gateway),
            annotations={**annotations, "sidecar.istio.io/status": "{}"},
            service_account=spec.get("serviceAccountName", "default"),
            ports={port.get("name") or str(port["containerPort"]): port["containerPort"] for port in ports},
        )
        result.append(
            Member(
                pod=pod,
                kind="gateway" if gateway else "sidecar",
                number=number,
                own_labels=metadata.get("labels") or {},
                # Istio's agent lays the annotation over MeshConfig's, field by field.
                config={**default, **(yaml.safe_load(annotations.get(ANNOTATION, "")) or {})},
            )
        )
    return result


def _default_config(found: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    for document in found:
        if document.get("kind") == "ConfigMap" and document["metadata"].get("name") == "istio":
            settings = yaml.safe_load((document.get("data") or {}).get("mesh", "")) or {}
            return dict(settings.get("defaultConfig") or {})
    return {}


@functools.lru_cache(maxsize=64)
def _loaded(text: str) -> ResourceSet:
    # Not checked against each other: Istio takes what only `istioctl analyze` complains of.
    return load_resources([Document(source="case.yaml", text=text)])


def our_world(texts: Sequence[str], found: Sequence[Member], key_sets: Mapping[str, str] | None = None) -> World:
    """The world of our translator, of texts of which later ones come first. Raises InvalidResource for refusals."""
    merged = {resource.key: resource for text in texts for resource in _loaded(text)}
    resources = ResourceSet.of(merged.values())
    proxies = tuple(member.proxy() for member in found)
    endpoints = service_endpoints(resources, proxies, ready=[proxy.id for proxy in proxies])
    return World(resources=resources, proxies=proxies, endpoints=endpoints, key_sets=key_sets or {})
