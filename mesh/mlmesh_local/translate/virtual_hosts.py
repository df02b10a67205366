"""Virtual hosts of a sidecar's outbound ports: which VirtualService routes which host, and by which names it is called.

Istio's rules (pilot/pkg/networking/core/httproute.go and route/route.go in its source).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import CatalogService, best_match
from mlmesh_local.resources.domains import host_covers, hosts_overlap, is_ip
from mlmesh_local.resources.model_routes import VirtualService
from mlmesh_local.resources.protocols import is_http
from mlmesh_local.translate import names
from mlmesh_local.translate.matches import ANYTHING, unique
from mlmesh_local.translate.proxy_headers import counted
from mlmesh_local.translate.route_actions import STATE_FILTER, request_marker, timeouts
from mlmesh_local.translate.routes import GATEWAY_SEMANTICS, Frame, default_route, rule_routes
from mlmesh_local.translate.view import View

DIRECT_RESPONSE_BYTES_MAX = 1024 * 1024
"""Istio's bound of the body of a direct response; Envoy's own is 4 KiB."""

_WEB_PORT = 80


# Host, domains, which of them are short, service.
_Member = tuple[str, list[str], list[str], CatalogService | None]


@dataclass(slots=True)
class _Group:
    """Services and other hosts that share routes."""

    routes: list[Json]
    services: list[CatalogService] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)


def route_configuration(name: str, virtual_hosts: list[Json]) -> Json:
    """A route configuration with what Istio sets on every one that is routed by host."""
    return {
        "name": name,
        "virtual_hosts": virtual_hosts,
        "validate_clusters": False,
        "ignore_port_in_host_matching": True,
        "max_direct_response_body_size_bytes": DIRECT_RESPONSE_BYTES_MAX,
    }


def outbound_virtual_hosts(frame: Frame) -> list[Json]:
    """Virtual hosts of a port, by name; the last takes what no service has."""
    port = frame.listener_port
    egress = frame.view.egress(frame.proxy, port)
    seen = (*egress.services, *egress.aliases) if egress else ()
    here = {service.host: service for service in seen if service.port(port) is not None}
    bound = egress.virtual_services if egress else ()
    owners = _owners(bound, seen)
    wildcards = [host for host in here if host.startswith("*")]
    groups: list[_Group] = []
    ruled: set[str] = set()
    for virtual_service in bound:
        # Istio knows hosts without a service on port 80 only, or beside those of a service.
        if port != _WEB_PORT and not any(_overlaps(host, here, wildcards) for host in virtual_service.hosts):
            continue
        group = _group(frame, virtual_service, here, owners)
        if group is not None:
            groups.append(group)
            ruled.update(service.host for service in group.services)
    groups += [
        _Group(routes=_default_routes(frame, service), services=[service])
        for host, service in here.items()
        if host not in ruled and _routed(service, port) and not service.alias_for
    ]
    hosts = [*sorted(_built(frame, groups), key=lambda host: str(host["name"])), _rest(frame)]
    return counted(frame.view, frame.proxy, hosts)


def _overlaps(host: str, here: Mapping[str, CatalogService], wildcards: Iterable[str]) -> bool:
    """Whether a VirtualService's host means something on the port; hosts are many, and most are no wildcards."""
    names = here if host.startswith("*") else wildcards
    return host in here or any(hosts_overlap(host, name) for name in names)


def _default_routes(frame: Frame, service: CatalogService) -> list[Json]:
    port = frame.listener_port
    return frame.view.part(
        ("default route", service.host, port), lambda: [default_route(frame, service, port)], service, frame.tracing
    )


def _rule_routes(frame: Frame, virtual_service: VirtualService) -> list[Json]:
    meta = virtual_service.meta
    key = ("rules", frame.gateway, frame.listener_port, meta.namespace, meta.name)
    return frame.view.part(key, lambda: rule_routes(frame, virtual_service), virtual_service, frame.tracing)


def _routed(service: CatalogService, port: int) -> bool:
    described = service.port(port)
    return described is not None and (is_http(described.protocol) or described.protocol == "unknown")


def _owners(bound: Iterable[VirtualService], seen: Iterable[CatalogService]) -> dict[str, VirtualService]:
    """The VirtualService of each service whose host, or narrowest wildcard, names it; the oldest where several do."""
    by_host: dict[str, VirtualService] = {}
    for virtual_service in bound:
        for host in virtual_service.hosts:
            by_host.setdefault(host, virtual_service)
    # Hosts are many, wildcards few: only those are compared.
    wildcards = [host for host in by_host if host.startswith("*")]
    found: dict[str, VirtualService] = {}
    for service in seen:
        pattern = service.host if service.host in by_host else best_match(wildcards, service.host)
        if pattern is not None:
            found[service.host] = by_host[pattern]
    return found


def _group(
    frame: Frame, virtual_service: VirtualService, here: Mapping[str, CatalogService], owners: dict[str, VirtualService]
) -> _Group | None:
    """What a VirtualService routes on the port; None where it routes nothing there for this proxy."""
    routes = _rule_routes(frame, virtual_service)
    if not routes:
        return None
    services: list[CatalogService] = []
    others: list[str] = []
    of_gateway_api = virtual_service.semantics == GATEWAY_SEMANTICS
    for host in virtual_service.hosts:
        if not host.startswith("*"):
            services += [here[host]] if host in here else []
            others += [] if host in here else [host]
            continue
        covered = [] if of_gateway_api else [service for name, service in here.items() if host_covers(host, name)]
        services += [service for service in covered if owners.get(service.host) is virtual_service]
        others += [] if covered else [host]
    if of_gateway_api:
        own = frame.proxy.namespace == virtual_service.meta.namespace
        services = [one for one in services if own or one.namespace == virtual_service.meta.namespace]
        if not services:
            return None
    routed = [service for service in services if _routed(service, frame.listener_port)]
    if not routed and frame.listener_port != _WEB_PORT:
        return None
    return _Group(routes=routes, services=routed, hosts=others)


def _built(frame: Frame, groups: list[_Group]) -> list[Json]:
    """Virtual hosts of groups. Envoy takes a name and a domain once: what comes first has them."""
    port = frame.listener_port
    full_names = {service.host for group in groups for service in group.services}
    taken_names: set[str] = set()
    taken_domains: set[str] = {"*"}
    found: list[Json] = []
    for group in groups:
        members: list[_Member] = [(host, [bracketed(host)], [], None) for host in group.hosts]
        members += [
            (service.host, *service_domains(frame.view, service, frame.proxy), service) for service in group.services
        ]
        for host, domains, short, service in members:
            name = f"{bracketed(host)}:{port}"
            if name in taken_names:
                continue
            taken_names.add(name)
            # A short name may be the full name of another service.
            kept = [
                domain
                for domain in unique(domains)
                if domain.lower() not in taken_domains and not (domain in short and domain in full_names)
            ]
            taken_domains.update(domain.lower() for domain in kept)
            if kept:
                make = functools.partial(_virtual_host, name, kept, group.routes, service, port)
                found.append(frame.view.part(("virtual host", name), make, kept, group.routes, service))
    return found


def _virtual_host(name: str, domains: list[str], routes: list[Json], service: CatalogService | None, port: int) -> Json:
    result: Json = {
        "name": name,
        "domains": domains,
        "routes": routes,
        "include_request_attempt_count": True,
    }
    described = service.port(port) if service else None
    if described is not None and described.protocol == "unknown":
        result["typed_per_filter_config"] = {STATE_FILTER: request_marker()}
    return result


def service_domains(view: View, service: CatalogService, proxy: ProxyNode) -> tuple[list[str], list[str]]:
    """Names by which a proxy's application may call a service, and which of them are not its full name.

    The full host, with and without the dot that ends it, and the short names that a pod's DNS search list completes.
    """
    domains: list[str] = []
    short: list[str] = []
    for host in (service.host, *(alias for _, alias in service.aliases)):
        other = alternatives(host, proxy.namespace, view.world.domain)
        domains += [bracketed(host), *other]
        short += other
    if service.headless and not service.is_entry:
        # Each pod of a headless Service has a name of its own below that of the Service.
        domains += [f"*.{domain}" for domain in domains]
    domains += [bracketed(address) for address in service.addresses if "/" not in address]
    return domains, short


def alternatives(host: str, namespace: str, domain: str) -> list[str]:
    """The other names of a host: with the dot that ends it, and short ones that a namespace's clients may use."""
    if is_ip(host):
        return []
    found = [f"{host}."]
    suffix = f".svc.{domain}"
    short = host.removesuffix(suffix)
    name, dot, owner = short.partition(".")
    if host.endswith(suffix) and dot:
        found += [name, f"{short}.svc", short] if owner == namespace else [short, f"{short}.svc"]
    return found


def bracketed(host: str) -> str:
    """A host as it is in an authority: IPv6 addresses in brackets."""
    return f"[{host}]" if ":" in host else host


def _rest(frame: Frame) -> Json:
    """What takes hosts that no service has: the proxy that a Sidecar names for them, else a refusal."""
    sidecar = frame.view.scope(frame.proxy).sidecar
    proxy = sidecar.egress_proxy if sidecar else None
    if proxy is None:
        return block_all(frame.listener_port)
    cluster = names.outbound_cluster(proxy.port, proxy.subset, proxy.host)
    action = {"cluster": cluster, **timeouts(None)}
    return {
        "name": "allow_any",
        "domains": ["*"],
        "routes": [{"name": "allow_any", "match": dict(ANYTHING), "route": action}],
        "include_request_attempt_count": True,
    }


def block_all(port: int) -> Json:
    """Without capture nothing can be passed through: an authority that nobody serves is refused, and says so."""
    text = f"no service of the mesh has this host name on port {port}; `mlmesh routes` lists those that exist"
    answer = {"status": 502, "body": {"inline_string": text}}
    return {
        "name": "block_all",
        "domains": ["*"],
        "routes": [{"name": "block_all", "match": dict(ANYTHING), "direct_response": answer}],
        "include_request_attempt_count": True,
    }
