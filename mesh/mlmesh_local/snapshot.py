"""What one proxy is to run: consistent, or not made at all."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlmesh_local.envoy_types import (
    CLUSTER,
    ENDPOINTS,
    EXTENSIONS,
    LISTENER,
    ROUTES,
    SECRET,
    InvalidMessageError,
    Json,
    build_bytes,
    canonical,
)
from mlmesh_local.model import CertificateSecret, ProxyNode, Secret, World
from mlmesh_local.references import references
from mlmesh_local.resources.problems import At, InvalidResource, Problem
from mlmesh_local.translate import Configuration, View, translate


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One Envoy resource: its bytes and a version that changes when they do."""

    name: str
    version: str
    content: bytes = field(repr=False)


Named = Mapping[str, Packed]

PACKED_MAX = 16384
"""Most packed resources that are kept for the next push."""


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

    @classmethod
    def of_packed(cls, node_id: str, version: str, resources: Mapping[str, Mapping[str, bytes]]) -> Snapshot:
        """A snapshot of serialized resources by type URL and name, such as another control plane sends them.

        They go to Envoy byte by byte as they are. What they refer to is read out of them, so that the order is the same
        as for our own; what is referred to and not there is not waited for.
        """
        packed = {
            type_url: {
                name: Packed(name=name, version=_version(content), content=content) for name, content in named.items()
            }
            for type_url, named in resources.items()
        }
        packed[ENDPOINTS] = _with_clusters(packed.get(ENDPOINTS, {}), packed.get(CLUSTER, {}))
        found = references(resources)
        there = {type_url: found[type_url] & packed.get(type_url, {}).keys() for type_url in found}
        return cls(
            node_id=node_id,
            version=version,
            resources=packed,
            endpoint_names=there[ENDPOINTS],
            route_names=there[ROUTES],
            secret_names=found[SECRET],
            extension_names=there[EXTENSIONS],
        )


def build_snapshots(world: World) -> dict[str, Snapshot]:
    """Snapshots of every proxy of a world, by node id. Raises InvalidResource when one would not be consistent."""
    view = View(world)
    version = world.version
    return {proxy.id: _snapshot(view, proxy, version) for proxy in world.proxies}


def build_snapshot(world: World, proxy: ProxyNode) -> Snapshot:
    """The snapshot of one proxy. For several of one world use `build_snapshots`, which indexes it once."""
    return _snapshot(View(world), proxy, world.version)


def pack_secrets(secrets: Mapping[str, Secret]) -> dict[str, Packed]:
    """Secrets as Envoy's resources, by SDS name."""
    # Not kept: they hold private keys.
    return {name: _pack(SECRET, name, _secret(name, secret)) for name, secret in secrets.items()}


def _snapshot(view: View, proxy: ProxyNode, version: str) -> Snapshot:
    return pack(proxy.id, translate(view, proxy), version)


def pack(node_id: str, configuration: Configuration, version: str) -> Snapshot:
    """A snapshot of a proxy's configuration. Raises InvalidResource when it is not consistent, or not Envoy's."""
    problems = consistency(configuration)
    if problems:
        at = At(source=node_id, line=0)
        raise InvalidResource([Problem(at=at, message=problem) for problem in problems])
    try:
        packed = {
            type_url: {name: _pack_once(type_url, name, canonical(value)) for name, value in named.items()}
            for type_url, named in configuration.items()
        }
    except InvalidMessageError as error:
        at = At(source=node_id, line=0)
        raise InvalidResource([Problem(at=at, message=f"cannot be translated: {error}")]) from error
    return Snapshot(
        node_id=node_id,
        version=version,
        resources={**packed, ENDPOINTS: _with_clusters(packed[ENDPOINTS], packed[CLUSTER])},
        endpoint_names=frozenset(_endpoint_names(configuration)),
        route_names=frozenset(_route_names(configuration)),
        secret_names=frozenset(_secret_names(configuration)),
        extension_names=frozenset(_extension_names(configuration)),
    )


def consistency(configuration: Configuration) -> list[str]:
    """What is referenced but missing: endpoints of clusters, routes and filters of listeners, clusters of routes."""
    # Destinations that do not exist keep their name, as in Istio: Envoy answers for them that there is no such cluster.
    clusters = configuration[CLUSTER]
    problems = [
        f"the cluster {name} has no endpoints resource"
        for name in _endpoint_names(configuration)
        if name not in configuration[ENDPOINTS]
    ]
    problems += [
        f"a listener needs the route configuration {name}, which there is not"
        for name in _route_names(configuration)
        if name not in configuration[ROUTES]
    ]
    problems += [
        f"a listener needs the configuration of the filter {name}, which there is not"
        for name in sorted(set(_extension_names(configuration)))
        if name not in configuration[EXTENSIONS]
    ]
    for name, routes in configuration[ROUTES].items():
        problems += [
            f"the route configuration {name} sends to the cluster {cluster}, which there is not"
            for cluster in sorted(set(_clusters_named(routes)) - clusters.keys())
            if not cluster.startswith("outbound|")
        ]
    return problems


def _endpoint_names(configuration: Configuration) -> list[str]:
    clusters = configuration[CLUSTER].values()
    return [cluster["eds_cluster_config"]["service_name"] for cluster in clusters if cluster.get("type") == "EDS"]


def _route_names(configuration: Configuration) -> list[str]:
    return [rds["route_config_name"] for rds in _find(configuration[LISTENER], "rds")]


def _extension_names(configuration: Configuration) -> Iterator[str]:
    for listener in configuration[LISTENER].values():
        for filters in (*_find(listener, "http_filters"), *_find(listener, "filters")):
            yield from (item["name"] for item in filters if "config_discovery" in item)


def _secret_names(configuration: Configuration) -> Iterator[str]:
    for section in (configuration[CLUSTER], configuration[LISTENER], configuration[EXTENSIONS]):
        for context in _find(section, "tls_certificate_sds_secret_configs"):
            yield from (item["name"] for item in context)
        for context in _find(section, "validation_context_sds_secret_config"):
            yield context["name"]


def _clusters_named(routes: Json) -> Iterator[str]:
    for action in _find(routes, "route"):
        if "cluster" in action:
            yield action["cluster"]
        yield from (item["name"] for item in action.get("weighted_clusters", {}).get("clusters", ()))
        yield from (item["cluster"] for item in action.get("request_mirror_policies", ()))


def _find(value: Any, key: str) -> Iterator[Any]:
    """Values of a key, wherever it is."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            else:
                yield from _find(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _find(inner, key)


def _with_clusters(assignments: Named, clusters: Named) -> dict[str, Packed]:
    """Endpoints that change with their cluster: Envoy keeps a changed one warming until endpoints arrive."""
    return {
        name: Packed(name=name, version=f"{item.version}-{clusters[name].version}", content=item.content)
        if name in clusters
        else item
        for name, item in assignments.items()
    }


def pack_one(type_url: str, name: str, value: Json) -> Packed:
    """One resource of proto-JSON. Raises InvalidMessageError."""
    return _pack(type_url, name, value)


def _pack(type_url: str, name: str, value: Json) -> Packed:
    content = build_bytes(type_url, value)
    return Packed(name=name, version=_version(content), content=content)


def _version(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@functools.lru_cache(maxsize=PACKED_MAX)
def _pack_once(type_url: str, name: str, text: str) -> Packed:
    """Most resources are the same from push to push, and clusters the same for many proxies."""
    return _pack(type_url, name, json.loads(text))


def _secret(name: str, secret: Secret) -> Json:
    if isinstance(secret, CertificateSecret):
        certificate = {
            "certificate_chain": {"inline_string": secret.certificate_chain.decode()},
            "private_key": {"inline_string": secret.private_key.decode()},
        }
        return {"name": name, "tls_certificate": certificate}
    return {"name": name, "validation_context": {"trusted_ca": {"inline_string": secret.roots.decode()}}}
