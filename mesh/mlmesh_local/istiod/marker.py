"""Tells which state of the cluster a push of Istio's has: a cluster by the name of a number, which every proxy gets.

An EnvoyFilter of the root namespace reaches all proxies, whatever their Sidecar resources let them see.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

from mlmesh_local.envoy_types import CLUSTER, Json
from mlmesh_local.istiod.store import Object

NAME = "mlmesh-marker"


def marker(number: int, root_namespace: str) -> Object:
    """The EnvoyFilter that marks a state."""
    cluster = {"name": cluster_name(number), "type": "STATIC", "connect_timeout": "1s"}
    patch = {
        "applyTo": "CLUSTER",
        "match": {"context": "ANY"},
        "patch": {"operation": "ADD", "value": cluster},
    }
    return {
        "apiVersion": "networking.istio.io/v1alpha3",
        "kind": "EnvoyFilter",
        "metadata": {
            "name": NAME,
            "namespace": root_namespace,
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"configPatches": [patch]},
    }


def cluster_name(number: int) -> str:
    """Name of the cluster that marks a state."""
    return f"{NAME}-{number}"


def mark(clusters: Iterable[str]) -> str:
    """The marker's name among those of clusters; empty when there is none."""
    return next((name for name in clusters if name.startswith(f"{NAME}-")), "")


def take(resources: MutableMapping[str, dict[str, Any]]) -> int:
    """Remove the marker from a proxy's resources, and give its number; 0 when there is none."""
    clusters: dict[str, Json] = resources.get(CLUSTER, {})
    name = mark(clusters)
    if not name:
        return 0
    del clusters[name]
    return int(name.rpartition("-")[2])
