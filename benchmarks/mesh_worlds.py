"""Worlds of a given size for the mesh's benchmarks: services, their endpoints, rules and routes, and proxies."""

from __future__ import annotations

import json
from typing import Any

from mlmesh_local.model import Endpoint, ProxyNode
from mlmesh_local.resources import Document, ResourceSet, load_resources

NAMESPACES = 4
PORTS = (9000, 9001)
SUBSETS_SHARE = 0.3
"""Of all services, those that have a DestinationRule with two subsets and a route that splits between them."""


def namespace_of(number: int) -> str:
    """Namespace of a service."""
    return f"ns{number % NAMESPACES}"


def host_of(number: int) -> str:
    """Full host of a service."""
    return f"svc{number}.{namespace_of(number)}.svc.cluster.local"


def service_documents(count: int) -> list[dict[str, Any]]:
    """Services, a third of them with subsets, each with a VirtualService of two rules."""
    documents: list[dict[str, Any]] = []
    for number in range(count):
        port = {"name": "grpc", "port": PORTS[number % len(PORTS)], "targetPort": 8000}
        documents.append(_document("v1", "Service", number, {"selector": {"app": f"svc{number}"}, "ports": [port]}))
        if number < count * SUBSETS_SHARE:
            documents.append(rule_document(number, "LEAST_REQUEST"))
        documents.append(route_document(number, subsets=number < count * SUBSETS_SHARE, weight=90))
    return documents


def rule_document(number: int, balancer: str) -> dict[str, Any]:
    """A DestinationRule with two subsets."""
    subsets = [{"name": name, "labels": {"version": name}} for name in ("v1", "v2")]
    spec = {"host": f"svc{number}", "subsets": subsets, "trafficPolicy": {"loadBalancer": {"simple": balancer}}}
    return _document("networking.istio.io/v1", "DestinationRule", number, spec)


def route_document(number: int, *, subsets: bool, weight: int) -> dict[str, Any]:
    """A VirtualService of two rules: one by header, one by weight."""
    host = f"svc{number}"
    route: list[dict[str, Any]] = [{"destination": {"host": host}}]
    if subsets:
        route = [
            {"destination": {"host": host, "subset": "v1"}, "weight": weight},
            {"destination": {"host": host, "subset": "v2"}, "weight": 100 - weight},
        ]
    special = {
        "name": "user",
        "match": [{"headers": {"x-user": {"exact": "ada"}}}],
        "route": [{"destination": route[-1]["destination"]}],
        "timeout": f"{weight}s",
    }
    spec = {"hosts": [host_of(number)], "http": [special, {"route": route}]}
    return _document("networking.istio.io/v1", "VirtualService", number, spec)


def policy_document(number: int, caller: str) -> dict[str, Any]:
    """An AuthorizationPolicy of a namespace."""
    spec = {"rules": [{"from": [{"source": {"namespaces": [caller]}}]}]}
    return _document("security.istio.io/v1", "AuthorizationPolicy", number, spec)


def _document(version: str, kind: str, number: int, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": f"svc{number}", "namespace": namespace_of(number)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def yaml_of(documents: list[dict[str, Any]]) -> str:
    """The documents as a file; JSON is YAML."""
    return "\n---\n".join(map(json.dumps, documents)) + "\n---\n"


def read(documents: list[dict[str, Any]]) -> ResourceSet:
    """Each document validated on its own."""
    return load_resources([Document(source="benchmark.yaml", text=yaml_of(documents))])


def endpoints_of(count: int, each: int, *, more_of: int = -1) -> tuple[Endpoint, ...]:
    """Ready endpoints, half of each version; one more of the service ``more_of``."""
    found: list[Endpoint] = []
    for number in range(count):
        for ordinal in range(each + (number == more_of)):
            address = number * 16 + ordinal
            found.append(
                Endpoint(
                    host=host_of(number),
                    port=PORTS[number % len(PORTS)],
                    address=f"10.{address >> 16}.{address >> 8 & 255}.{address & 255}",
                    target_port=8000,
                    labels={"app": f"svc{number}", "version": f"v{1 + ordinal % 2}"},
                    ready=True,
                    instance=f"svc{number}-{ordinal}",
                )
            )
    return tuple(found)


def proxies_of(count: int) -> tuple[ProxyNode, ...]:
    """Sidecars, one for each of the first services."""
    return tuple(
        ProxyNode(
            id=f"svc{number}-0",
            namespace=namespace_of(number),
            service_account="default",
            labels={"app": f"svc{number}", "version": "v1"},
            pod_address=f"127.64.1.{number + 1}",
            application_address=f"127.64.2.{number + 1}",
            outbound_address=f"127.64.3.{number + 1}",
            container_ports={"8000": 8000},
        )
        for number in range(count)
    )
