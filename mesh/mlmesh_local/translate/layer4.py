"""Connections that are forwarded as they are: TCP proxies, and which of them takes which connection.

Istio's rules (pilot/pkg/networking/core/tls.go and networkfilter.go in its source). Istio gives each service an address
of its own and captures it; here all services of a port share the sidecar's outbound address. Connections with TLS are
told apart by their server name; of services without, the oldest has the port.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from mlmesh_local.envoy_types import Json, canonical
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import MESH_GATEWAY, CatalogService, HostPolicy
from mlmesh_local.resources.domains import hosts_overlap
from mlmesh_local.resources.model_hosts import TrafficPolicy
from mlmesh_local.resources.model_routes import Layer4Match, Layer4Rule, VirtualService, WeightedDestination
from mlmesh_local.resources.protocols import is_http, is_tls
from mlmesh_local.translate import names
from mlmesh_local.translate.dynamic_hosts import dns_cache, is_dynamic
from mlmesh_local.translate.matches import connection_applies
from mlmesh_local.translate.names import filter_of, seconds
from mlmesh_local.translate.observation import network_logging
from mlmesh_local.translate.reporting import Role
from mlmesh_local.translate.routes import Frame, provenance
from mlmesh_local.translate.view import View
from mlmesh_local.translate.virtual_hosts import alternatives

_MONGO = "envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy"
_TCP_PROXY = "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """A filter chain to be: which connections it takes (no names and no subnets: all), and what forwards them.

    ``protocols`` are those that a client offers in TLS; ``config`` is the metadata of the VirtualService that asked for
    it.
    """

    filters: tuple[Json, ...]
    server_names: tuple[str, ...] = ()
    subnets: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    config: Json | None = None

    @property
    def takes_all(self) -> bool:
        """Whether it takes every connection."""
        return not self.server_names and not self.subnets

    def match(self) -> Json:
        """listener.v3.FilterChainMatch."""
        result: Json = {}
        if self.server_names:
            result["server_names"] = list(self.server_names)
        if self.subnets:
            result["prefix_ranges"] = [cidr(subnet) for subnet in self.subnets]
        if self.protocols:
            result["application_protocols"] = list(self.protocols)
        return result

    def envoy(self) -> Json:
        """listener.v3.FilterChain."""
        chain: Json = {"filters": list(self.filters)}
        match = self.match()
        if match:
            chain["filter_chain_match"] = match
        if self.config:
            chain["metadata"] = self.config
        return chain


def cidr(subnet: str) -> Json:
    """core.v3.CidrRange of an address or a block of addresses."""
    base, slash, length = subnet.partition("/")
    return {"address_prefix": base, "prefix_len": int(length) if slash else 128 if ":" in base else 32}


def layer4_services(view: View, proxy: ProxyNode, port: int) -> tuple[list[CatalogService], bool]:
    """Services of a port whose connections are forwarded as they are, oldest first; and whether others speak HTTP.

    Where no protocol is declared both hold. A port that a Sidecar declares for requests takes them, whoever is there;
    connections only to services that its other calls may go to, too: these have addresses of their own in Istio. A port
    that it declares for connections takes requests only where its other calls may go to other services there.
    """
    found: list[CatalogService] = []
    protocol = view.egress_protocol(proxy, port)
    if protocol != "unknown" and not is_http(protocol):
        found = [one for one in view.egress_services(proxy, port) if one.port(port) is not None]
        return _by_age(view, found), _requested(view, proxy, port, {one.host for one in found})
    requests = declared = is_http(protocol)
    others = {service.host for service in view.other_services(proxy)} if declared else set()
    for service in view.egress_services(proxy, port):
        described = service.port(port)
        if described is None or (declared and not is_http(described.protocol) and service.host not in others):
            continue
        requests = requests or is_http(described.protocol) or described.protocol == "unknown"
        if not is_http(described.protocol):
            found.append(service)
    return _by_age(view, found), requests


def _requested(view: View, proxy: ProxyNode, port: int, taken: set[str]) -> bool:
    described = (one.port(port) for one in view.other_services(proxy) if one.host not in taken)
    return any(one is not None and is_http(one.protocol) for one in described)


def _by_age(view: View, found: list[CatalogService]) -> list[CatalogService]:
    ages = {host: age for age, host in enumerate(view.services_by_age())} if len(found) > 1 else {}
    return sorted(found, key=lambda service: (ages.get(service.host, len(ages)), service.host))


def outbound_chains(view: View, proxy: ProxyNode, port: int, services: list[CatalogService]) -> list[Chain]:
    """Chains of a port's services, the oldest first. Of chains that take the same connections the first stays."""
    egress = view.egress(proxy, port)
    bound = [one for one in (egress.virtual_services if egress else ()) if one.tls or one.tcp]
    seen = {service.host: service for service in view.services_seen_by(proxy)}
    frame = Frame(view=view, proxy=proxy, gateway=MESH_GATEWAY, listener_port=port, tracing=None, services=seen)
    chains: list[Chain] = []
    declared = view.egress_protocol(proxy, port)
    for service in services:
        own = [one for one in bound if any(hosts_overlap(host, service.host) for host in one.hosts)]
        described = service.port(port)
        own_protocol = described.protocol if described is not None else "unknown"
        if is_tls(own_protocol if declared == "unknown" or is_http(declared) else declared):
            chains += _tls_chains(frame, service, own, alone=len(services) == 1)
        else:
            chains += _tcp_chains(frame, service, own)
    return distinct(chains)


def distinct(chains: Iterable[Chain]) -> list[Chain]:
    """Chains of which no two take the same connections: Envoy would reject them. The first stays."""
    kept: dict[str, Chain] = {}
    names_taken: set[str] = set()
    for chain in chains:
        free = chain.server_names
        if not chain.subnets:
            free = tuple(name for name in free if name not in names_taken)
            if chain.server_names and not free:
                continue
            names_taken.update(free)
        one = replace(chain, server_names=free)
        kept.setdefault(canonical(one.match()), one)
    return list(kept.values())


def _tls_chains(frame: Frame, service: CatalogService, bound: list[VirtualService], *, alone: bool) -> list[Chain]:
    chains: list[Chain] = []
    handled: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
    for virtual_service in bound:
        for rule, match in _matches(frame, virtual_service, virtual_service.tls):
            key = (match.sni_hosts, match.destination_subnets)
            if key not in handled:
                handled.add(key)
                chains.append(_rule_chain(frame, virtual_service, rule, match))
    if chains:
        return chains
    # Where a service has an address of its own Istio takes whatever name comes to it.
    own = [address for address in service.addresses if "/" not in address]
    addressed = not service.is_entry or (bool(own) and not service.host.startswith("*"))
    named = () if alone and addressed else server_names(service, frame.view.world.domain, frame.proxy.namespace)
    return [_service_chain(frame, service, named)]


def _tcp_chains(frame: Frame, service: CatalogService, bound: list[VirtualService]) -> list[Chain]:
    chains: list[Chain] = []
    mongo = _is_mongo(service, frame.listener_port)
    for virtual_service in bound:
        for rule in virtual_service.tcp:
            if not rule.destinations:
                continue
            applying = [match for _, match in _matches(frame, virtual_service, (rule,))]
            if not rule.matches or any(not match.destination_subnets for match in applying):
                # It takes every connection: nothing after it is reached.
                chains.append(_rule_chain(frame, virtual_service, rule, None, mongo=mongo))
                return chains
            subnets = tuple(subnet for match in applying for subnet in match.destination_subnets)
            if subnets:
                chains.append(
                    replace(_rule_chain(frame, virtual_service, rule, None, mongo=mongo), subnets=subnets, config=None)
                )
    return [*chains, _service_chain(frame, service, ())]


def _matches(
    frame: Frame, service: VirtualService, rules: tuple[Layer4Rule, ...]
) -> list[tuple[Layer4Rule, Layer4Match]]:
    return [
        (rule, match)
        for rule in rules
        for match in rule.matches
        if rule.destinations
        and connection_applies(match, frame.proxy, frame.gateway, service.meta.namespace, frame.listener_port)
    ]


def _rule_chain(
    frame: Frame, service: VirtualService, rule: Layer4Rule, match: Layer4Match | None, *, mongo: bool = False
) -> Chain:
    return Chain(
        filters=tuple(forward(frame, rule.destinations, f"{service.meta.name}.{service.meta.namespace}", mongo=mongo)),
        server_names=wanted_names(match.sni_hosts) if match else (),
        subnets=match.destination_subnets if match else (),
        config=provenance(service.meta),
    )


def _service_chain(frame: Frame, service: CatalogService, named: tuple[str, ...]) -> Chain:
    port = frame.listener_port
    cluster = names.outbound_cluster(port, "", service.host)
    rules = frame.view.policy(service, frame.proxy)
    filters = [*counted(cluster, _is_mongo(service, port)), tcp_proxy(frame, {"cluster": cluster}, cluster, rules, "")]
    if is_dynamic(service):
        filters.insert(0, _resolve_server_name(service, port))
    return Chain(filters=tuple(filters), server_names=named)


def wanted_names(hosts: tuple[str, ...]) -> tuple[str, ...]:
    """Server names as Envoy matches them; "*" is all of them."""
    return () if "*" in hosts else tuple(dict.fromkeys(host.lower() for host in hosts))


def server_names(service: CatalogService, domain: str, namespace: str) -> tuple[str, ...]:
    """Names that clients of a service may send in TLS: its host and the short forms of it."""
    hosts = () if service.is_entry else (service.host, *(alias for _, alias in service.aliases))
    found = [service.host, *(name for host in hosts for name in (host, *alternatives(host, namespace, domain)))]
    return wanted_names(tuple(found))


def forward(
    frame: Frame, destinations: tuple[WeightedDestination, ...], name: str, *, mongo: bool = False
) -> list[Json]:
    """Network filters that send connections to destinations by weight. ``mongo``: what is asked is counted."""
    first = destinations[0].destination
    service = frame.services.get(first.host)
    rules = frame.view.policy(service, frame.proxy) if service else HostPolicy()
    if len(destinations) == 1:
        cluster = frame.cluster(first)
        return [*counted(cluster, mongo), tcp_proxy(frame, {"cluster": cluster}, cluster, rules, first.subset)]
    clusters = [
        {"name": frame.cluster(item.destination), "weight": item.weight} for item in destinations if item.weight
    ]
    proxy = tcp_proxy(frame, {"weighted_clusters": {"clusters": clusters}}, name, rules, "")
    return [*counted(name, mongo), proxy]


def counted(stat_prefix: str, mongo: bool) -> list[Json]:
    """The filter that counts what Mongo is asked: the only one of its kind that is on in Istio unless turned off."""
    config = {"stat_prefix": stat_prefix}
    return [filter_of("envoy.filters.network.mongo_proxy", _MONGO, config)] if mongo else []


def tcp_proxy(
    frame: Frame,
    target: Mapping[str, Json | str],
    stat_prefix: str,
    rules: HostPolicy,
    subset: str,
    *,
    tunnels: bool = True,
) -> Json:
    """A TCP proxy with what the destination's rule says of connections: idle time, age, hashing, tunnel."""
    config: Json = {"stat_prefix": stat_prefix, **target}
    pool = rules.policy.connection_pool if rules.policy else None
    if pool is not None and pool.tcp_idle_timeout_s is not None:
        config["idle_timeout"] = seconds(pool.tcp_idle_timeout_s)
    if pool is not None and pool.max_connection_duration_s is not None:
        config["max_downstream_connection_duration"] = seconds(pool.max_connection_duration_s)
    if _hashes_source(rules, subset):
        config["hash_policy"] = [{"source_ip": {}}]
    chosen = rules.subset(subset) if subset else None
    policy: TrafficPolicy | None = chosen.policy if chosen else None if subset else rules.policy
    if tunnels and policy is not None and policy.tunnel is not None:
        target_host = f"{policy.tunnel.target_host}:{policy.tunnel.target_port}"
        config["tunneling_config"] = {"hostname": target_host, "use_post": policy.tunnel.protocol == "POST"}
    config |= network_logs(frame.view, frame.proxy, "gateway" if frame.proxy.kind == "gateway" else "outbound")
    return filter_of("envoy.filters.network.tcp_proxy", _TCP_PROXY, config)


def network_logs(view: View, proxy: ProxyNode, role: Role) -> Json:
    """Field `access_log` of a TCP proxy, empty where nothing is logged."""
    return network_logging(view, proxy, role)


def _hashes_source(rules: HostPolicy, subset: str) -> bool:
    chosen = rules.subset(subset) if subset else None
    own = chosen.policy.load_balancer if chosen and chosen.policy else None
    balancer = own or (rules.policy.load_balancer if rules.policy else None)
    return balancer is not None and balancer.hash_key is not None and balancer.hash_key.how == "source_ip"


def _is_mongo(service: CatalogService, port: int) -> bool:
    described = service.port(port)
    return described is not None and described.protocol == "mongo"


def _resolve_server_name(service: CatalogService, port: int) -> Json:
    """The filter that resolves the server name of a connection, for hosts that are wildcards."""
    return filter_of(
        "envoy.filters.network.sni_dynamic_forward_proxy",
        "envoy.extensions.filters.network.sni_dynamic_forward_proxy.v3.FilterConfig",
        {"dns_cache_config": dns_cache(service.host), "port_value": port},
    )
