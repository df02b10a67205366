"""Snapshots of clients without a sidecar: made when a name is asked for, so that a client costs what it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Protocol

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, LISTENER, ROUTES, Json, typed
from mlmesh_local.model import ProxyNode
from mlmesh_local.packing import Packed
from mlmesh_local.proxyless.clusters import client_cluster
from mlmesh_local.proxyless.node import ProxylessNode
from mlmesh_local.proxyless.refusals import CLUSTER_PREFIX, Refusal, refused_cluster, refusing
from mlmesh_local.proxyless.routes import FAULT_FILTER, action_clusters, client_routes
from mlmesh_local.snapshot import Snapshot, pack_one
from mlmesh_local.translate import Configuration, View
from mlmesh_local.translate.names import ADS

_MANAGER: Final = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_FILTERS: Final = [
    {"name": FAULT_FILTER, "typed_config": typed("envoy.extensions.filters.http.fault.v3.HTTPFault")},
    {"name": "envoy.filters.http.router", "typed_config": typed("envoy.extensions.filters.http.router.v3.Router")},
]
# Nothing listens there: a client has no ports of its own.
_NOWHERE: Final = "127.0.0.1"


class Made(Mapping[str, Packed]):
    """Resources of a type, made when they are first asked for."""

    def __init__(self, type_url: str, make: Callable[[str], Json | None]) -> None:
        self._type_url = type_url
        self._make = make
        self._made: dict[str, Packed | None] = {}

    def __getitem__(self, name: str) -> Packed:
        if name not in self._made:
            value = self._make(name)
            self._made[name] = None if value is None else pack_one(self._type_url, name, value)
        packed = self._made[name]
        if packed is None:
            raise KeyError(name)
        return packed

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, packed in self._made.items() if packed is not None])

    def __len__(self) -> int:
        return sum(packed is not None for packed in self._made.values())


def unknown_target(name: str) -> Refusal:
    """What a target that nobody serves is told."""
    why = "no service of the mesh has this host name and port; `mlmesh routes` lists those that exist"
    return Refusal(where=f"xds:///{name}", field="target", why=why)


class Client:
    """What one client may ask for at one version of the world."""

    def __init__(self, view: View, node: ProxylessNode, configuration: Configuration) -> None:
        self._view = view
        self._node = node
        self._asked: set[str] = set()
        self._clusters = configuration[CLUSTER]
        self._endpoints = configuration[ENDPOINTS]
        self._hosts: dict[tuple[str, int], Json] = {}
        self._routes: dict[str, Json] = {}
        for name, routes in configuration[ROUTES].items():
            if not name.isdigit():
                continue
            for host in routes["virtual_hosts"]:
                self._routes.setdefault(host["name"], host)
                for domain in host["domains"]:
                    self._hosts.setdefault((domain, int(name)), host)

    def snapshot(self, version: str) -> Snapshot:
        """Everything, on demand."""
        return Snapshot(
            node_id=self._node.id,
            version=version,
            resources={
                LISTENER: Made(LISTENER, self.listener),
                ROUTES: Made(ROUTES, self.routes),
                CLUSTER: Made(CLUSTER, self.cluster),
                ENDPOINTS: Made(ENDPOINTS, self.endpoints),
            },
            endpoint_names=frozenset(),
            route_names=frozenset(),
            secret_names=frozenset(),
        )

    def listener(self, name: str) -> Json:
        """The listener of "host:port"; one that refuses where nobody serves that."""
        self._asked.add(name)
        host = self._host(name)
        manager: Json = {"stat_prefix": name, "http_filters": _FILTERS}
        if host is not None:
            manager["rds"] = {"config_source": ADS, "route_config_name": host["name"]}
        else:
            cluster = refused_cluster([unknown_target(name)])
            only = {"match": {"prefix": ""}, "route": {"cluster": cluster}}
            manager["route_config"] = {"virtual_hosts": [{"name": name, "domains": ["*"], "routes": [only]}]}
        return {"name": name, "api_listener": {"api_listener": typed(_MANAGER, manager)}}

    def remember(self, targets: Iterable[str]) -> None:
        """Targets that the client dialled before."""
        self._asked.update(targets)

    def _host(self, name: str) -> Json | None:
        host, separator, port = name.rpartition(":")
        if not separator or not port.isdigit():
            return None
        exact = self._hosts.get((host, int(port))) or self._hosts.get((name, int(port)))
        if exact is not None:
            return exact
        labels = host.split(".")
        wildcards = (f"*.{'.'.join(labels[number:])}" for number in range(1, len(labels)))
        return next((self._hosts[key] for domain in wildcards if (key := (domain, int(port))) in self._hosts), None)

    def routes(self, name: str) -> Json | None:
        """The routes of a virtual host. A destination that cannot be called takes the rule with it."""
        host = self._routes.get(name)
        if host is None:
            return None
        made, _ = client_routes(host, self._node.tolerated, self._clusters)
        for route in made["routes"]:
            self._refuse_destinations(route)
        return {"name": name, "virtual_hosts": [made]}

    def _refuse_destinations(self, route: Json) -> None:
        action = route["route"]
        refused: list[Refusal] = []
        for name in action_clusters(action):
            if name in self._clusters:
                refused += self._cluster_refusals(self._clusters[name])
        if refused:
            route["route"] = {"cluster": refused_cluster(refused)}

    def _cluster_refusals(self, cluster: Json) -> list[Refusal]:
        _, found = client_cluster(cluster, self._view)
        return [refusal for refusal in found if refusal.root not in self._node.tolerated]

    def cluster(self, name: str) -> Json | None:
        """A cluster."""
        if name.startswith(CLUSTER_PREFIX):
            return refusing(name)
        found = self._clusters.get(name)
        return client_cluster(found, self._view)[0] if found else None

    def endpoints(self, name: str) -> Json | None:
        """Endpoints; none where the name is a refusal."""
        assignment = self._endpoints.get(name)
        if assignment is None:
            return {"cluster_name": name}
        localities = [
            {
                "locality": locality.get("locality", {}),
                "load_balancing_weight": locality.get("load_balancing_weight", 1),
                "priority": locality.get("priority", 0),
                "lb_endpoints": [
                    {key: value for key, value in item.items() if key != "metadata"}
                    for item in locality["lb_endpoints"]
                ],
            }
            for locality in assignment.get("endpoints", ())
        ]
        return {"cluster_name": name, "endpoints": localities}

    @property
    def asked(self) -> frozenset[str]:
        """Targets that the client dialled."""
        return frozenset(self._asked)

    def refusals(self) -> list[Refusal]:
        """What this client is refused, or does without, of the targets that it dialled."""
        found: list[Refusal] = []
        for name in sorted(self._asked):
            host = self._host(name)
            if host is None:
                found.append(unknown_target(name))
                continue
            made, own = client_routes(host, self._node.tolerated, self._clusters)
            found += own
            for cluster in sorted({cluster for route in made["routes"] for cluster in action_clusters(route["route"])}):
                if cluster in self._clusters:
                    found += client_cluster(self._clusters[cluster], self._view)[1]
        return list(dict.fromkeys(found))


class Builder(Protocol):
    """What makes configurations of a world: `mlmesh_local.snapshot.SnapshotBuilder`."""

    @property
    def view(self) -> View | None:
        """The world, indexed."""

    def configuration(self, proxy: ProxyNode) -> Configuration:
        """What a sidecar would be told."""


def client_of(builder: Builder, node: ProxylessNode, *, before: Client | None = None) -> Client:
    """A client of the world that was built last; ``before`` is the same client in the world before."""
    if builder.view is None:
        raise RuntimeError("no world was built")
    proxy = ProxyNode(
        id=node.id,
        namespace=node.namespace,
        service_account=node.service_account,
        labels=node.labels,
        pod_address=_NOWHERE,
        application_address=_NOWHERE,
        outbound_address=_NOWHERE,
    )
    client = Client(builder.view, node, builder.configuration(proxy))
    client.remember(before.asked if before else ())
    return client
