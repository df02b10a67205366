"""What one proxy is to run: consistent, or not made at all."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mlmesh_local.envoy_types import (
    CLUSTER,
    ENDPOINTS,
    EXTENSIONS,
    LISTENER,
    ROUTES,
    SECRET,
    InvalidMessageError,
    Json,
)
from mlmesh_local.incremental import KEPT_TURNS, Memory
from mlmesh_local.model import CertificateSecret, ProxyNode, Secret, World
from mlmesh_local.packing import VIRTUAL_HOST, Kept, Named, Packed, Packer, find
from mlmesh_local.resources.problems import At, InvalidResource, Problem
from mlmesh_local.translate import Configuration, View, translate
from mlmesh_local.translate.routes import UNKNOWN_SERVICE

FORGET_FROM = 10_000
"""Packed resources, beyond twice those in use, from which on the others are forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Configuration of one proxy at one version of the world. Secrets come apart: see `AdsServer.set_secrets`."""

    node_id: str
    version: str
    resources: Mapping[str, Named]
    """By type URL and name."""
    endpoint_names: frozenset[str]
    """Assignments that the clusters subscribe to."""
    route_names: frozenset[str]
    """Route configurations that the listeners subscribe to."""
    secret_names: frozenset[str]
    """Secrets that clusters, listeners and filters need."""
    extension_names: frozenset[str] = frozenset()
    """Configurations of filters that the listeners subscribe to."""


def build_snapshots(world: World) -> dict[str, Snapshot]:
    """Snapshots of every proxy of a world, by node id. Raises InvalidResource when one would not be consistent.

    For one world after the other use a `SnapshotBuilder`, which does again only what changed.
    """
    return SnapshotBuilder().build(world)


def build_snapshot(world: World, proxy: ProxyNode) -> Snapshot:
    """The snapshot of one proxy, made from nothing."""
    return pack(proxy.id, translate(View(world), proxy), world.version)


def pack(node_id: str, configuration: Configuration, version: str) -> Snapshot:
    """A snapshot of a proxy's configuration. Raises InvalidResource when it is not consistent, or not Envoy's."""
    return _Packing().snapshot(node_id, configuration, version)


def pack_one(type_url: str, name: str, value: Json) -> Packed:
    """One resource of proto-JSON. Raises InvalidMessageError."""
    return Packer().pack(type_url, name, value)


def pack_secrets(secrets: Mapping[str, Secret]) -> dict[str, Packed]:
    """Secrets as Envoy's resources, by SDS name."""
    # Packed apart: what is kept for the next push holds no private keys.
    return {name: pack_one(SECRET, name, _secret(name, secret)) for name, secret in secrets.items()}


class SnapshotBuilder:
    """Builds the snapshots of one world after the other. What did not change is neither translated nor packed again.

    Snapshots share what is equal: a type of which nothing changed is the same mapping as before, which a stream takes
    for having nothing to send. Use it from one thread.
    """

    def __init__(self) -> None:
        self.memory = Memory()
        self._packing = _Packing()

    def build(self, world: World) -> dict[str, Snapshot]:
        """Snapshots of every proxy, by node id. Raises InvalidResource when one would not be consistent."""
        version = world.version
        with _no_collection():
            self.memory.turn(View(world))
            self._packing.turn()
            return {
                proxy.id: self._packing.snapshot(proxy.id, self.memory.translate(proxy), version)
                for proxy in world.proxies
            }

    @property
    def view(self) -> View | None:
        """The world built last, indexed."""
        return self.memory.view

    def configuration(self, proxy: ProxyNode) -> Configuration:
        """What a proxy that is not of the world built last would be told in it."""
        return self.memory.translate(proxy)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A build makes much that stays and no garbage in cycles; looking for it takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _Section:
    """All resources of a type, packed, and what they refer to."""

    named: Named
    refers: Mapping[str, frozenset[str]]


class _Packing:
    """Packs configurations, and keeps what it has packed for those to come."""

    def __init__(self) -> None:
        self._packer = Packer()
        self._sections: Kept[_Section] = Kept()
        self._references: Kept[dict[str, frozenset[str]]] = Kept()
        self._assignments: Kept[tuple[Named, Named]] = Kept()
        self._used: dict[int, tuple[int, Mapping[str, Json]]] = {}
        self._turn = 0
        self._live = 0

    def turn(self) -> None:
        """Another world. What the last ones did not use is forgotten, when enough has come together."""
        self._turn += 1
        recent = sum(turn == self._turn - 1 for turn, _ in self._used.values())
        if len(self._packer) <= 2 * self._live + FORGET_FROM and len(self._used) <= 2 * KEPT_TURNS * recent:
            return
        self._used = {key: use for key, use in self._used.items() if use[0] >= self._turn - KEPT_TURNS}
        alive = set(self._used)
        for _, named in self._used.values():
            for value in named.values():
                alive.add(id(value))
                alive.update(map(id, value.get("virtual_hosts", ())))
        for kept in (self._packer, self._sections, self._references, self._assignments):
            kept.retain(alive)
        self._live = len(self._packer)

    def snapshot(self, node_id: str, configuration: Configuration, version: str) -> Snapshot:
        """The snapshot of a configuration."""
        at = At(source=node_id, line=0)
        try:
            sections = {type_url: self._section(type_url, named) for type_url, named in configuration.items()}
        except InvalidMessageError as error:
            raise InvalidResource([Problem(at=at, message=f"cannot be translated: {error}")]) from error
        if not _consistent(sections):
            raise InvalidResource([Problem(at=at, message=problem) for problem in consistency(configuration)])
        clusters, listeners, filters = (sections[type_url].refers for type_url in (CLUSTER, LISTENER, EXTENSIONS))
        packed = {type_url: section.named for type_url, section in sections.items()}
        packed[ENDPOINTS] = self._endpoints(packed[ENDPOINTS], packed[CLUSTER])
        return Snapshot(
            node_id=node_id,
            version=version,
            resources=packed,
            endpoint_names=clusters[ENDPOINTS],
            route_names=listeners[ROUTES],
            secret_names=clusters[SECRET] | listeners[SECRET] | filters[SECRET],
            extension_names=listeners[EXTENSIONS],
        )

    def _section(self, type_url: str, named: Mapping[str, Json]) -> _Section:
        self._used[id(named)] = (self._turn, named)
        found = self._sections.get(type_url, named)
        if found is None:
            refers: dict[str, set[str]] = {kind: set() for kind in (CLUSTER, ENDPOINTS, ROUTES, SECRET, EXTENSIONS)}
            for value in named.values():
                for kind, names in self._refers(type_url, value).items():
                    refers[kind] |= names
            packed = {name: self._packer.pack(type_url, name, value) for name, value in named.items()}
            found = _Section(packed, {kind: frozenset(names) for kind, names in refers.items()})
            self._sections.put(type_url, named, found)
        return found

    def _refers(self, type_url: str, value: Json) -> dict[str, frozenset[str]]:
        found = self._references.get(type_url, value)
        if found is not None:
            return found
        if type_url == ROUTES:
            hosts = [self._refers(VIRTUAL_HOST, host)[CLUSTER] for host in value.get("virtual_hosts", ())]
            return self._references.put(type_url, value, {CLUSTER: frozenset().union(*hosts)})
        return self._references.put(
            type_url, value, {kind: frozenset(names) for kind, names in _referred(type_url, value)}
        )

    def _endpoints(self, assignments: Named, clusters: Named) -> Named:
        kind = str(id(clusters))
        found = self._assignments.get(kind, assignments)
        if found is None or found[1] is not clusters:
            found = self._assignments.put(kind, assignments, (_with_clusters(assignments, clusters), clusters))
        return found[0]


# Destinations that do not exist keep their name, as in Istio: Envoy answers for them that there is no such cluster.
_MAY_BE_MISSING = ("outbound|", UNKNOWN_SERVICE)


def _consistent(sections: Mapping[str, _Section]) -> bool:
    clusters, listeners = sections[CLUSTER], sections[LISTENER]
    unknown = sections[ROUTES].refers[CLUSTER] - clusters.named.keys()
    return (
        clusters.refers[ENDPOINTS] <= sections[ENDPOINTS].named.keys()
        and listeners.refers[ROUTES] <= sections[ROUTES].named.keys()
        and listeners.refers[EXTENSIONS] <= sections[EXTENSIONS].named.keys()
        and all(name.startswith(_MAY_BE_MISSING) for name in unknown)
    )


def _referred(type_url: str, value: Json) -> Iterator[tuple[str, Iterable[str]]]:
    if type_url == CLUSTER:
        yield ENDPOINTS, [value["eds_cluster_config"]["service_name"]] if value.get("type") == "EDS" else []
    if type_url == LISTENER:
        yield ROUTES, [rds["route_config_name"] for rds in find(value, "rds")]
        yield EXTENSIONS, list(_extension_names(value))
    if type_url in (CLUSTER, LISTENER, EXTENSIONS):
        yield SECRET, list(_secret_names(value))
    if type_url == VIRTUAL_HOST:
        yield CLUSTER, list(_clusters_named(value))


def consistency(configuration: Configuration) -> list[str]:
    """What is referenced but missing: endpoints of clusters, routes and filters of listeners, clusters of routes."""
    # Destinations that do not exist keep their name, as in Istio: Envoy answers for them that there is no such cluster.
    clusters = configuration[CLUSTER]
    problems = [
        f"the cluster {name} has no endpoints resource"
        for name in _names(configuration, CLUSTER, ENDPOINTS)
        if name not in configuration[ENDPOINTS]
    ]
    problems += [
        f"a listener needs the route configuration {name}, which there is not"
        for name in _names(configuration, LISTENER, ROUTES)
        if name not in configuration[ROUTES]
    ]
    problems += [
        f"a listener needs the configuration of the filter {name}, which there is not"
        for name in sorted(set(_names(configuration, LISTENER, EXTENSIONS)))
        if name not in configuration[EXTENSIONS]
    ]
    for name, routes in configuration[ROUTES].items():
        problems += [
            f"the route configuration {name} sends to the cluster {cluster}, which there is not"
            for cluster in sorted(set(_clusters_named(routes)) - clusters.keys())
            if not cluster.startswith(_MAY_BE_MISSING)
        ]
    return problems


def _names(configuration: Configuration, type_url: str, wanted: str) -> list[str]:
    found = (names for value in configuration[type_url].values() for names in _referred(type_url, value))
    return [name for kind, names in found if kind == wanted for name in names]


def _extension_names(listener: Json) -> Iterator[str]:
    for filters in (*find(listener, "http_filters"), *find(listener, "filters")):
        yield from (item["name"] for item in filters if "config_discovery" in item)


def _secret_names(value: Json) -> Iterator[str]:
    for context in find(value, "tls_certificate_sds_secret_configs"):
        yield from (item["name"] for item in context)
    for context in find(value, "validation_context_sds_secret_config"):
        yield context["name"]


def _clusters_named(routes: Json) -> Iterator[str]:
    for action in find(routes, "route"):
        if "cluster" in action:
            yield action["cluster"]
        yield from (item["name"] for item in action.get("weighted_clusters", {}).get("clusters", ()))
        yield from (item["cluster"] for item in action.get("request_mirror_policies", ()))


def _with_clusters(assignments: Named, clusters: Named) -> dict[str, Packed]:
    """Endpoints that change with their cluster: Envoy keeps a changed one warming until endpoints arrive."""
    return {
        name: Packed(name=name, version=f"{item.version}-{clusters[name].version}", content=item.content)
        if name in clusters
        else item
        for name, item in assignments.items()
    }


def _secret(name: str, secret: Secret) -> Json:
    if isinstance(secret, CertificateSecret):
        certificate = {
            "certificate_chain": {"inline_string": secret.certificate_chain.decode()},
            "private_key": {"inline_string": secret.private_key.decode()},
        }
        return {"name": name, "tls_certificate": certificate}
    return {"name": name, "validation_context": {"trusted_ca": {"inline_string": secret.roots.decode()}}}
