"""How traffic is routed, for a person: rules of VirtualServices in their order, then services without. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlmesh_local.metrics.rules import Place, Sent
from mlmesh_local.resources.catalog import full_host
from mlmesh_local.resources.delegates import effective
from mlmesh_local.resources.domains import host_covers
from mlmesh_local.resources.model import HttpMatch, HttpRule, Service, VirtualService
from mlmesh_local.resources.model_routes import Layer4Match, Layer4Rule
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.stats import Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a route sends; ``share`` is 0 to 1, -1 where no weight applies."""

    host: str
    subset: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One rule of one host.

    Attributes:
        place: where it stands in its VirtualService; None for connections and for services without rules.
        hosts: all hosts of its VirtualService.
    """

    virtual_service: str
    host: str
    rule: str
    match: str
    targets: tuple[Target, ...]
    policy: str
    place: Place | None = None
    hosts: tuple[str, ...] = ()

    def counts(self, observed: Mapping[Sent, Counts]) -> dict[tuple[str, str], Counts]:
        """What it sent, by host and subset; by two empty texts what it answered itself."""
        found: dict[tuple[str, str], Counts] = {}
        for sent, counts in observed.items():
            if self._is_of(sent):
                found[sent.host, sent.subset] = found.get((sent.host, sent.subset), Counts()) + counts
        return found

    def _is_of(self, sent: Sent) -> bool:
        if sent.virtual_service != self.virtual_service:
            return False
        if not self.virtual_service:
            return sent.host == self.host
        if self.place is None or sent.name.split(".")[0] != self.rule.split(".")[0]:
            return False
        if sent.place is not None and sent.place != self.place:
            return False
        called = next((host for host in self.hosts if _calls(sent.authority, host)), self.hosts[0])
        return called == self.host


def _calls(authority: str, host: str) -> bool:
    """Whether a host is meant by what a caller wrote: its full name or the begin of it."""
    return host.startswith(f"{authority}.") or host_covers(host, authority)


def list_routes(resources: ResourceSet, host: str = "", *, domain: str = "cluster.local") -> list[Route]:
    """Routes (of a host, short or full) in the order in which they are tried."""
    routes: list[Route] = []
    ruled: set[str] = set()
    for service in effective(resources.specs(VirtualService), domain):
        for full in service.hosts:
            if "mesh" in service.gateways:
                ruled.add(full)
            routes += [_route(service, full, rule, domain) for rule in service.http]
            routes += [_connections(service, full, rule) for rule in (*service.tls, *service.tcp)]
    for plain in resources.specs(Service):
        full = full_host(plain.meta.name, plain.meta.namespace, domain)
        if full not in ruled and plain.selector:
            target = Target(host=full, subset="", share=-1)
            routes.append(Route(virtual_service="", host=full, rule="", match="any", targets=(target,), policy=""))
    return [route for route in routes if host in {"", route.host, route.host.split(".")[0]}]


def configured_shares(resources: ResourceSet) -> dict[tuple[str, str], float]:
    """Share by (host, subset) that the first catch-all rule of each host gives; -1 for hosts without weights."""
    result: dict[tuple[str, str], float] = {}
    done: set[str] = set()
    for route in list_routes(resources):
        if route.match != "any" or route.host in done:
            continue
        done.add(route.host)
        for target in route.targets:
            result[target.host, target.subset] = target.share
    return result


def _route(service: VirtualService, host: str, rule: HttpRule, domain: str) -> Route:
    # As in Istio the weights are proportions; a single destination gets everything whatever its weight says.
    total = sum(item.weight for item in rule.destinations)
    alone = len(rule.destinations) == 1
    targets = tuple(
        Target(
            host=full_host(item.destination.host, service.meta.namespace, domain),
            subset=item.destination.subset,
            share=1.0 if alone else item.weight / total if total else 0.0,
        )
        for item in rule.destinations
    )
    return Route(
        virtual_service=f"{service.meta.namespace}/{service.meta.name}",
        host=host,
        rule=rule.name,
        match=" or ".join(_match(match) for match in rule.matches) or "any",
        targets=targets,
        policy=_policy(rule),
        place=Place(rule=rule.origin.rule, delegate=rule.origin.delegate, delegate_rule=rule.origin.delegate_rule),
        hosts=service.hosts,
    )


def _connections(service: VirtualService, host: str, rule: Layer4Rule) -> Route:
    total = sum(item.weight for item in rule.destinations)
    targets = tuple(
        Target(
            host=item.destination.host,
            subset=item.destination.subset,
            share=item.weight / total if len(rule.destinations) > 1 and total else 1.0,
        )
        for item in rule.destinations
    )
    return Route(
        virtual_service=f"{service.meta.namespace}/{service.meta.name}",
        host=host,
        rule="",
        match=" or ".join(_connection_match(match) for match in rule.matches) or "any connection",
        targets=targets,
        policy="",
    )


def _connection_match(match: Layer4Match) -> str:
    parts = [f"server name {' or '.join(match.sni_hosts)}"] if match.sni_hosts else []
    parts += [f"to {subnet}" for subnet in match.destination_subnets]
    return " and ".join([*parts, *_common(match)]) or "any connection"


def _match(match: HttpMatch) -> str:
    named = (("uri", match.uri), ("scheme", match.scheme), ("method", match.method), ("authority", match.authority))
    parts = [f"{name} {value}" for name, value in named if value]
    parts += [f"header {name} {value}" for name, value in match.headers]
    parts += [f"not header {name} {value}" for name, value in match.without_headers]
    parts += [f"query {name} {value}" for name, value in match.query_params]
    return " and ".join([*parts, *_common(match)]) or "any"


def _common(match: HttpMatch | Layer4Match) -> list[str]:
    """What requests and connections have in common."""
    parts = [f"port {match.port}"] if match.port else []
    parts += [f"from {key}={value}" for key, value in sorted(match.source_labels.items())]
    if match.source_namespace:
        parts.append(f"from namespace {match.source_namespace}")
    if match.gateways:
        parts.append(f"gateways {', '.join(match.gateways)}")
    return parts


def _policy(rule: HttpRule) -> str:
    parts: list[str] = []
    if rule.timeout_s:
        parts.append(f"timeout {rule.timeout_s:g} s")
    if rule.retries:
        parts.append(f"{rule.retries.attempts} retries" if rule.retries.attempts else "no retries")
    if rule.fault and rule.fault.delay:
        parts.append(f"delay {rule.fault.delay.fixed_delay_s:g} s for {rule.fault.delay.percent:g} %")
    if rule.fault and rule.fault.abort:
        status = rule.fault.abort.grpc_status or f"HTTP {rule.fault.abort.http_status}"
        parts.append(f"abort {status} for {rule.fault.abort.percent or 0:g} %")
    parts += [
        f"mirror {mirror.percent:g} % to {mirror.destination.host} {mirror.destination.subset}".rstrip()
        for mirror in rule.mirrors
    ]
    if rule.headers:
        parts.append("header edits")
    if rule.rewrite:
        parts.append("rewrite")
    if rule.redirect:
        parts.append(f"redirect {rule.redirect.code}")
    if rule.direct_response:
        parts.append(f"answer {rule.direct_response.status}")
    if rule.delegate:
        parts.append(f"delegate {rule.delegate.namespace or 'own'}/{rule.delegate.name}")
    if rule.cors:
        parts.append("CORS")
    return ", ".join(parts)
