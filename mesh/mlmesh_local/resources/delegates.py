"""VirtualServices as they act: short names resolved, and rules of delegates in place of those that name them.

Istio's rules (pilot/pkg/model/virtualservice.go): a delegate's rule keeps its own action and takes from the root what
it does not say; each of its matches is joined with every match of the root that does not contradict it, and a rule
with a match that contradicts all of them is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from mlmesh_local.resources.catalog import full_gateway, full_host
from mlmesh_local.resources.domains import is_ip
from mlmesh_local.resources.model_routes import (
    Destination,
    HttpMatch,
    HttpRule,
    Layer4Rule,
    Mirror,
    Origin,
    StringMatch,
    VirtualService,
    WeightedDestination,
    effective_mirrors,
)

T = TypeVar("T")
_Named = tuple[tuple[str, StringMatch], ...]


def effective(
    services: Iterable[VirtualService], domain: str, default_export_to: tuple[str, ...] = ("*",)
) -> tuple[VirtualService, ...]:
    """VirtualServices that have hosts, in the same order, with full names and without delegates."""
    resolved = [resolve(service, domain, default_export_to) for service in services]
    delegates = {(one.meta.namespace, one.meta.name): one for one in resolved if not one.hosts}
    return tuple(_merged(one, delegates) for one in resolved if one.hosts)


def resolve(service: VirtualService, domain: str, default_export_to: tuple[str, ...]) -> VirtualService:
    """A VirtualService whose hosts, gateways and destinations have their full names."""
    namespace = service.meta.namespace
    names = _Names(namespace, domain)
    return replace(
        service,
        hosts=tuple(names.host(host) for host in service.hosts),
        gateways=tuple(full_gateway(name, namespace) for name in service.gateways),
        export_to=tuple(namespace if target == "." else target for target in service.export_to or default_export_to),
        http=tuple(names.rule(rule) for rule in service.http),
        tls=tuple(names.layer4(rule) for rule in service.tls),
        tcp=tuple(names.layer4(rule) for rule in service.tcp),
    )


class VirtualServices:
    """Every VirtualService as it acts, by the gateways it is bound to. Build one for all proxies of a world."""

    def __init__(
        self, services: Iterable[VirtualService], *, domain: str, default_export_to: tuple[str, ...] = ("*",)
    ) -> None:
        self.effective = effective(services, domain, default_export_to)
        self._by_gateway: dict[str, list[VirtualService]] = {}
        for service in self.effective:
            for name in dict.fromkeys(service.gateways):
                self._by_gateway.setdefault(name, []).append(service)

    def bound(self, gateway: str, namespace: str) -> tuple[VirtualService, ...]:
        """Those bound to a gateway ("mesh" or "namespace/name") that a namespace sees.

        In Istio's order: those that only this namespace sees, those exported to it by name, those that everybody sees
        (in each its own of the Gateway API first); the oldest first in each.
        """
        ranked = [(_rank(one, namespace), one) for one in self._by_gateway.get(gateway, ())]
        return tuple(one for _, one in sorted((it for it in ranked if it[0] >= 0), key=lambda it: it[0]))


def _rank(service: VirtualService, namespace: str) -> int:
    own = service.meta.namespace == namespace
    preferred = own and bool(service.semantics)
    if "*" in service.export_to:
        return 3 if preferred else 4
    if namespace not in service.export_to or "~" in service.export_to:
        return -1
    return 0 if preferred else 1 if own else 2


class _Names:
    """Completes names that a resource of a namespace uses."""

    def __init__(self, namespace: str, domain: str) -> None:
        self._namespace = namespace
        self._domain = domain

    def host(self, host: str) -> str:
        return host if is_ip(host) or not host else full_host(host, self._namespace, self._domain)

    def rule(self, rule: HttpRule) -> HttpRule:
        return replace(
            rule,
            matches=tuple(replace(match, gateways=self._gateways(match.gateways)) for match in rule.matches),
            destinations=self._weighted(rule.destinations),
            mirrors=self._mirrors(rule.mirrors),
            mirror=self._destination(rule.mirror) if rule.mirror else None,
            listed_mirrors=self._mirrors(rule.listed_mirrors),
        )

    def layer4(self, rule: Layer4Rule) -> Layer4Rule:
        return replace(
            rule,
            matches=tuple(replace(match, gateways=self._gateways(match.gateways)) for match in rule.matches),
            destinations=self._weighted(rule.destinations),
        )

    def _gateways(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(full_gateway(name, self._namespace) for name in names)

    def _weighted(self, items: tuple[WeightedDestination, ...]) -> tuple[WeightedDestination, ...]:
        return tuple(replace(item, destination=self._destination(item.destination)) for item in items)

    def _mirrors(self, items: tuple[Mirror, ...]) -> tuple[Mirror, ...]:
        return tuple(replace(item, destination=self._destination(item.destination)) for item in items)

    def _destination(self, destination: Destination) -> Destination:
        return replace(destination, host=self.host(destination.host))


def delegate_of(
    rule: HttpRule, root: VirtualService, delegates: Mapping[tuple[str, str], VirtualService]
) -> VirtualService | None:
    """The delegate that a rule names, where there is one that the root's namespace may use."""
    if rule.delegate is None:
        return None
    found = delegates.get((rule.delegate.namespace or root.meta.namespace, rule.delegate.name))
    if found is None or not {"*", root.meta.namespace} & set(found.export_to):
        return None
    return found


def _merged(root: VirtualService, delegates: Mapping[tuple[str, str], VirtualService]) -> VirtualService:
    if not any(rule.delegate for rule in root.http):
        return root
    rules: list[HttpRule] = []
    for rule in root.http:
        if rule.delegate is None:
            rules.append(rule)
            continue
        delegate = delegate_of(rule, root, delegates)
        if delegate is not None:
            name = f"{delegate.meta.namespace}/{delegate.meta.name}"
            merged = (merge_rules(rule, item, name) for item in delegate.http)
            rules.extend(item for item in merged if item is not None)
    return replace(root, http=tuple(rules))


def merge_rules(root: HttpRule, delegate: HttpRule, delegate_name: str) -> HttpRule | None:
    """A delegate's rule under a root's; None where their matches contradict each other."""
    matches = merge_matches(root.matches, delegate.matches)
    if matches is None:
        return None
    mirror = delegate.mirror or root.mirror
    percent = delegate.mirror_percent if delegate.mirror_percent is not None else root.mirror_percent
    listed = delegate.listed_mirrors or root.listed_mirrors
    return replace(
        delegate,
        name=_joined(root.name, delegate.name),
        matches=matches,
        rewrite=delegate.rewrite or root.rewrite,
        direct_response=delegate.direct_response or root.direct_response,
        timeout_s=delegate.timeout_s if delegate.timeout_s is not None else root.timeout_s,
        retries=delegate.retries or root.retries,
        fault=delegate.fault or root.fault,
        mirrors=effective_mirrors(mirror, percent, listed),
        mirror=mirror,
        mirror_percent=percent,
        listed_mirrors=listed,
        cors=delegate.cors or root.cors,
        headers=delegate.headers or root.headers,
        origin=Origin(rule=root.origin.rule, delegate=delegate_name, delegate_rule=delegate.origin.rule),
    )


def merge_matches(root: tuple[HttpMatch, ...], delegate: tuple[HttpMatch, ...]) -> tuple[HttpMatch, ...] | None:
    """Matches of a delegate's rule under those of the root's; None where one of them contradicts all of the root's."""
    if not root or not delegate:
        return delegate or root
    merged: list[HttpMatch] = []
    for leaf in delegate:
        joined = [_join(one, leaf) for one in root if not contradict(one, leaf)]
        if not joined:
            return None
        merged.extend(joined)
    return tuple(replace(match, index=index) for index, match in enumerate(merged))


def _join(root: HttpMatch, leaf: HttpMatch) -> HttpMatch:
    return replace(
        leaf,
        name=_joined(root.name, leaf.name),
        uri=leaf.uri or root.uri,
        scheme=leaf.scheme or root.scheme,
        method=leaf.method or root.method,
        authority=leaf.authority or root.authority,
        headers=_union(root.headers, leaf.headers),
        without_headers=_union(root.without_headers, leaf.without_headers),
        query_params=_union(root.query_params, leaf.query_params),
        port=leaf.port or root.port,
        source_labels={**root.source_labels, **leaf.source_labels},
        source_namespace=leaf.source_namespace or root.source_namespace,
        gateways=leaf.gateways or root.gateways,
        stat_prefix=leaf.stat_prefix or root.stat_prefix,
    )


def contradict(root: HttpMatch, leaf: HttpMatch) -> bool:
    """Whether a delegate's match is not within the root's, so that the two cannot be joined."""
    pairs = [
        (root.uri, leaf.uri),
        (root.scheme, leaf.scheme),
        (root.method, leaf.method),
        (root.authority, leaf.authority),
    ]
    for ours, theirs in (
        (root.headers, leaf.headers),
        (root.without_headers, leaf.without_headers),
        (root.query_params, leaf.query_params),
    ):
        known = dict(ours)
        pairs += [(known.get(name), match) for name, match in theirs]
    if any(_texts_contradict(one, other) for one, other in pairs):
        return True
    if root.ignore_uri_case != leaf.ignore_uri_case:
        return True
    if root.port and leaf.port and root.port != leaf.port:
        return True
    if root.source_namespace and leaf.source_namespace != root.source_namespace:
        return True
    if any(root.source_labels.get(name, value) != value for name, value in leaf.source_labels.items()):
        return True
    return bool(root.gateways and leaf.gateways) and (
        len(root.gateways) < len(leaf.gateways) or not set(leaf.gateways) <= set(root.gateways)
    )


def _texts_contradict(root: StringMatch | None, leaf: StringMatch | None) -> bool:
    if root is None or leaf is None:
        return False
    # Istio does not compare regular expressions, nor conditions that say nothing.
    if "regex" in (root.how, leaf.how) or not root.value or not leaf.value:
        return True
    if root.how == "exact":
        return leaf != root
    return not leaf.value.startswith(root.value)


def _union(root: _Named, leaf: _Named) -> _Named:
    return tuple(sorted({**dict(root), **dict(leaf)}.items()))


def _joined(root: str, leaf: str) -> str:
    return f"{root}-{leaf}" if root and leaf else root or leaf
