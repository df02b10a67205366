"""Paths of the fields that documents set, such as "VirtualService.spec.http.match.headers"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Maps whose keys are the user's: what is below is the same field.
MAPS = frozenset(
    {
        "add",
        "annotations",
        "claimToHeaders",
        "distribute",
        "environmentVariables",
        "headers",
        "inclusionPrefixes",
        "labels",
        "matchLabels",
        "nodeSelector",
        "ports",
        "queryParams",
        "selector",
        "set",
        "sourceLabels",
        "tagOverrides",
        "tags",
        "customTags",
        "withoutHeaders",
        "workloadSelector",
        "value",
    }
)
KINDS = frozenset(
    {
        "VirtualService",
        "DestinationRule",
        "Gateway",
        "ServiceEntry",
        "WorkloadEntry",
        "Sidecar",
        "ProxyConfig",
        "PeerAuthentication",
        "AuthorizationPolicy",
        "RequestAuthentication",
        "Telemetry",
        "HTTPRoute",
        "GRPCRoute",
        "ReferenceGrant",
        "EnvoyFilter",
    }
)
"""Kinds whose fields the table has."""


def kind_of(document: Mapping[str, Any]) -> str:
    """Kind; the Gateway of the Gateway API is a KubernetesGateway."""
    kind = str(document.get("kind", ""))
    if kind == "Gateway" and str(document.get("apiVersion", "")).startswith("gateway.networking.k8s.io"):
        return "KubernetesGateway"
    return kind


def fields_of(documents: Iterable[Mapping[str, Any]]) -> set[str]:
    """Paths of all fields set in documents of the kinds of the table."""
    found: set[str] = set()
    for document in documents:
        kind = kind_of(document)
        if kind in KINDS or kind == "KubernetesGateway":
            found.update(_paths(document.get("spec"), f"{kind}.spec"))
    return found


def _paths(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if _is_map(path):
                # Values of the user's keys: matchers have fields of their own.
                yield from _paths(item, path)
                continue
            yield f"{path}.{key}"
            yield from _paths(item, f"{path}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item, path)


def _is_map(path: str) -> bool:
    last = path.rpartition(".")[2]
    if last not in MAPS:
        return False
    # The same word for something else.
    return not path.endswith(
        (
            ".http.headers",
            ".route.headers",
            ".spec.ports",
            ".subsets.trafficPolicy.ports",
            "Sidecar.spec.workloadSelector",
            "ServiceEntry.spec.workloadSelector",
            "DestinationRule.spec.workloadSelector",
            "AuthorizationPolicy.spec.selector",
            "RequestAuthentication.spec.selector",
            "PeerAuthentication.spec.selector",
            "Telemetry.spec.selector",
            "ProxyConfig.spec.selector",
            "delegate.headers",
            ".set.value",
        )
    )
