"""Paths of the fields that documents set, such as "VirtualService.spec.http[].match[].headers.*.exact".

"[]" is an item of a list, "*" a key that is the user's own. Which keys are comes from the schemas of the kinds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from tests.support.tools import ROOT
from tools import mesh_config
from tools.istio_fields import Kind, kinds, mesh_config_kind

SCHEMAS = (ROOT / ".tools" / "crds" / "istio", ROOT / ".tools" / "crds" / "gateway-api")
GATEWAY_API = "gateway.networking.k8s.io"
COMPARED = frozenset(
    {
        "AuthorizationPolicy",
        "DestinationRule",
        "EnvoyFilter",
        "GRPCRoute",
        "Gateway",
        "HTTPRoute",
        "KubernetesGateway",
        "MeshConfig",
        "PeerAuthentication",
        "ProxyConfig",
        "ReferenceGrant",
        "RequestAuthentication",
        "ServiceEntry",
        "Sidecar",
        "Telemetry",
        "VirtualService",
        "WorkloadEntry",
    }
)
"""Kinds whose fields the table of cases is to have."""


@functools.cache
def known() -> dict[str, Kind]:
    """Kinds by title; the Gateway of the Gateway API is a KubernetesGateway. Empty where the schemas are not."""
    found = [kind for folder in SCHEMAS if folder.is_dir() for kind in kinds(folder)]
    if mesh_config.FOLDER.is_dir():
        found.append(mesh_config_kind())
    return {title(kind.group, kind.kind): kind for kind in found}


def title(group: str, kind: str) -> str:
    """A kind's name in paths."""
    return "KubernetesGateway" if (group, kind) == (GATEWAY_API, "Gateway") else kind


def fields_of(documents: Iterable[Mapping[str, Any]]) -> set[str]:
    """Paths of all leaves that documents set: of kinds with a schema, and of MeshConfig."""
    found: set[str] = set()
    for document in documents:
        kind = str(document.get("kind", ""))
        if kind == "ConfigMap" and document["metadata"].get("name") == "istio":
            settings = yaml.safe_load((document.get("data") or {}).get("mesh", "")) or {}
            found.update(_set_leaves("MeshConfig", settings))
            continue
        name = title(str(document.get("apiVersion", "")).rpartition("/")[0], kind)
        found.update(_set_leaves(name, document))
    return found


def _set_leaves(name: str, document: Mapping[str, Any]) -> Iterator[str]:
    schema = known().get(name)
    for path, _ in schema.leaves if schema is not None else ():
        if _is_set(document, path.replace("[]", ".[]").split(".")):
            yield f"{name}.{path}"


def plain(path: str) -> str:
    """A path as differences.yaml writes it: without marks of lists and free keys."""
    return path.replace("[]", "").replace(".*", "")


def _is_set(value: Any, parts: list[str]) -> bool:
    if not parts:
        return True
    head, rest = parts[0], parts[1:]
    if head == "[]":
        return isinstance(value, list) and any(_is_set(item, rest) for item in value)
    if not isinstance(value, dict):
        return False
    if head == "*":
        return any(_is_set(item, rest) for item in value.values())
    return head in value and _is_set(value[head], rest)
