"""Worlds for unit tests: resources and running instances of a small mesh, without processes."""

from __future__ import annotations

import functools
from typing import Any

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, EXTENSIONS, LISTENER, ROUTES
from mlmesh_local.model import ProxyNode, World
from mlmesh_local.resources import Deployment, Document, ResourceSet, load_resources
from mlmesh_local.snapshot import build_snapshots
from mlmesh_local.translate import View, service_endpoints, translate
from tests.support.mesh_documents import GATEWAY_POD

HOST = "server.mlmesh.svc.cluster.local"

WORKLOADS = (
    """
apiVersion: v1
kind: ServiceAccount
metadata: {name: server}
---
apiVersion: v1
kind: Service
metadata: {name: server}
spec:
  selector: {app: server}
  ports:
    - {name: grpc, port: 9000, targetPort: grpc}
    - {name: http-metrics, port: 9090, targetPort: 9090}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: server-v1}
spec:
  selector: {matchLabels: {app: server, version: v1}}
  template:
    metadata: {labels: {app: server, version: v1}}
    spec:
      serviceAccountName: server
      containers: [{name: app, command: [serve], ports: [{name: grpc, containerPort: 8000}, {containerPort: 9090}]}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: server-v2}
spec:
  selector: {matchLabels: {app: server, version: v2}}
  template:
    metadata: {labels: {app: server, version: v2}}
    spec:
      serviceAccountName: server
      containers: [{name: app, command: [serve], ports: [{name: grpc, containerPort: 8000}, {containerPort: 9090}]}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: client}
spec:
  selector: {matchLabels: {app: client}}
  template:
    metadata: {labels: {app: client, team: red}}
    spec: {containers: [{name: app, command: [call]}]}
---
"""
    + GATEWAY_POD
)


def load(*texts: str) -> ResourceSet:
    """Resources of YAML texts, checked against each other."""
    return ResourceSet().apply(load_alone(*texts)).resources


def load_alone(*texts: str) -> ResourceSet:
    """Resources of YAML texts, each checked on its own."""
    return load_resources(Document(source=f"{index}.yaml", text=text) for index, text in enumerate(texts))


@functools.cache
def _workloads(text: str) -> ResourceSet:
    return load(text)


def world(*texts: str, not_ready: set[str] | None = None, workloads: str = WORKLOADS, **fields: Any) -> World:
    """A world of one instance a replica, all ready but those named."""
    resources = _workloads(workloads).apply(load_alone(*texts)).resources
    proxies: list[ProxyNode] = []
    for number, deployment in enumerate(resources.specs(Deployment), 1):
        gateway = deployment.is_gateway
        proxies.append(
            ProxyNode(
                id=deployment.meta.name,
                kind="gateway" if gateway else "sidecar",
                namespace=deployment.meta.namespace,
                service_account=deployment.service_account,
                labels=deployment.labels,
                pod_address=f"127.64.1.{number}",
                application_address="" if gateway else f"127.64.2.{number}",
                outbound_address="" if gateway else f"127.64.3.{number}",
                container_ports=deployment.container_ports(),
            )
        )
    ready = [proxy.id for proxy in proxies if proxy.id not in (not_ready or set())]
    endpoints = service_endpoints(resources, proxies, ready=ready)
    return World(**{"resources": resources, "proxies": tuple(proxies), "endpoints": endpoints, **fields})


class Told:
    """What one proxy is told, by names; building it also checks that it is consistent and valid for Envoy."""

    def __init__(self, instance: str, *texts: str, **fields: Any) -> None:
        self.world = world(*texts, **fields)
        self.snapshot = build_snapshots(self.world)[instance]
        self.view = View(self.world)
        configuration = translate(self.view, self.proxy_of(instance))
        self.clusters = configuration[CLUSTER]
        self.endpoints = configuration[ENDPOINTS]
        self.extensions = configuration[EXTENSIONS]
        self.listeners = configuration[LISTENER]
        self.routes = configuration[ROUTES]

    def proxy_of(self, instance: str) -> ProxyNode:
        """A proxy of the world."""
        return next(proxy for proxy in self.world.proxies if proxy.id == instance)

    def virtual_host(self, name: str = f"{HOST}:9000", routes: str = "9000") -> dict[str, Any]:
        """A virtual host of a route configuration."""
        found: dict[str, Any] = next(h for h in self.routes[routes]["virtual_hosts"] if h["name"] == name)
        return found

    def rules(self, name: str = f"{HOST}:9000", routes: str = "9000") -> list[dict[str, Any]]:
        """Routes of a virtual host, in order."""
        found: list[dict[str, Any]] = self.virtual_host(name, routes)["routes"]
        return found

    def rule(self) -> dict[str, Any]:
        """The only route to the server."""
        (rule,) = self.rules()
        return rule

    def action(self) -> dict[str, Any]:
        """Where the only route to the server sends."""
        action: dict[str, Any] = self.rule()["route"]
        return action

    def cluster(self, subset: str = "", port: int = 9000, host: str = HOST) -> dict[str, Any]:
        """A cluster of the server."""
        cluster: dict[str, Any] = self.clusters[f"outbound|{port}|{subset}|{host}"]
        return cluster

    def addresses(self, subset: str = "", port: int = 9000, host: str = HOST) -> set[tuple[str, int]]:
        """Endpoints of a cluster that Envoy may call."""
        localities = self.endpoints[f"outbound|{port}|{subset}|{host}"]["endpoints"]
        endpoints = [e for item in localities for e in item["lb_endpoints"] if e.get("health_status") != "UNHEALTHY"]
        found = [e["endpoint"]["address"]["socket_address"] for e in endpoints]
        return {(address["address"], address["port_value"]) for address in found}

    def manager(self, listener: str, chain: int = 0) -> dict[str, Any]:
        """The connection manager of a listener's filter chain."""
        manager: dict[str, Any] = self.listeners[listener]["filter_chains"][chain]["filters"][0]["typed_config"]
        return manager


def virtual_service(http: str, *, fields: str = "hosts: [server]") -> str:
    """A VirtualService of YAML flow text."""
    return f"""
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: server}}
spec: {{{fields}, http: {http}}}
---
"""


def destination_rule(policy: str, subsets: str = "[]") -> str:
    """A DestinationRule of YAML flow text."""
    return f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: server}}
spec: {{host: server, trafficPolicy: {policy}, subsets: {subsets}}}
---
"""


def resource(
    kind: str, spec: str, *, name: str = "it", group: str = "security.istio.io/v1", namespace: str = ""
) -> str:
    """Any resource of YAML flow text."""
    where = f", namespace: {namespace}" if namespace else ""
    return f"""
apiVersion: {group}
kind: {kind}
metadata: {{name: {name}{where}}}
spec: {spec}
---
"""
