"""Which DestinationRule applies to whose calls of which host: Istio's precedence, merging and scope.

The rules are those of pilot/pkg/model/destination_rule.go and push_context.go in Istio's source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlmesh_local.resources.indexes import HostIndex
from mlmesh_local.resources.model_hosts import DestinationRule, LoadBalancer, Subset, TrafficPolicy
from mlmesh_local.resources.names import full_host

LEAST_REQUEST = LoadBalancer(policy="LEAST_REQUEST")
"""Istio's default load balancer."""

_PARENTS = "internal.istio.io/parents"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPolicy:
    """What DestinationRules say of a host, merged. ``rules`` names them; the first one is ``rule``.

    ``rule`` None: there is none.
    """

    policy: TrafficPolicy | None = None
    subsets: tuple[Subset, ...] = ()
    rules: tuple[str, ...] = ()
    rule: DestinationRule | None = None

    @property
    def selected(self) -> bool:
        """Whether it is for certain workloads only."""
        return self.rule is not None and self.rule.selector is not None

    def subset(self, name: str) -> Subset | None:
        """The subset with a name."""
        return next((subset for subset in self.subsets if subset.name == name), None)


@dataclass(slots=True)
class _Merged:
    """Rules of one host and namespace that became one."""

    rule: DestinationRule
    exported: frozenset[str]
    policy: TrafficPolicy | None
    subsets: dict[str, Subset]
    names: list[str]

    @classmethod
    def of(cls, rule: DestinationRule, exported: frozenset[str]) -> _Merged:
        subsets = {subset.name: subset for subset in rule.subsets}
        return cls(rule, exported, rule.policy, subsets, [str(rule.meta)])

    def add(self, rule: DestinationRule) -> None:
        for subset in rule.subsets:
            self.subsets.setdefault(subset.name, subset)
        if _is_synthesized(self.rule) is _is_synthesized(rule):
            self.policy = self.policy or rule.policy
        elif _is_synthesized(rule):
            self.policy = _filled(self.policy, rule.policy)
        else:
            self.policy = _filled(rule.policy, self.policy)
        self.names.append(str(rule.meta))

    def result(self) -> HostPolicy:
        subsets = tuple(self.subsets.values())
        return HostPolicy(policy=self.policy, subsets=subsets, rules=tuple(self.names), rule=self.rule)


def _is_synthesized(rule: DestinationRule) -> bool:
    """Whether it follows from a policy of the Gateway API: what a person wrote counts more."""
    return _PARENTS in rule.meta.annotations


def _filled(own: TrafficPolicy | None, other: TrafficPolicy | None) -> TrafficPolicy | None:
    """A policy with the parts of another in the places of those that it does not have."""
    if own is None or other is None:
        return own or other
    ports = dict(own.ports)
    for number, theirs in other.ports:
        mine = ports.get(number)
        ports[number] = theirs if mine is None else _filled(mine, theirs) or mine
    return TrafficPolicy(
        connection_pool=own.connection_pool or other.connection_pool,
        outlier=own.outlier or other.outlier,
        load_balancer=own.load_balancer or other.load_balancer,
        tls=own.tls or other.tls,
        tunnel=own.tunnel or other.tunnel,
        proxy_protocol=own.proxy_protocol or other.proxy_protocol,
        retry_budget=own.retry_budget or other.retry_budget,
        ports=tuple(ports.items()),
    )


_Found = list[tuple[HostPolicy, frozenset[str]]]


class RuleIndex:
    """DestinationRules by namespace and host. ``default_export`` is the mesh's, for rules that name nobody."""

    def __init__(
        self,
        rules: Iterable[DestinationRule],
        *,
        domain: str,
        root_namespace: str,
        default_export: tuple[str, ...] = ("*",),
    ) -> None:
        self._root = root_namespace
        own: dict[str, dict[str, list[_Merged]]] = {}
        exported: dict[str, dict[str, list[_Merged]]] = {}
        root_only: dict[str, list[_Merged]] = {}
        # Those with a selector come first; otherwise the oldest does.
        for rule in sorted(rules, key=lambda rule: rule.selector is None):
            namespace = rule.meta.namespace
            host = full_host(rule.host, namespace, domain)
            to = frozenset(rule.export_to) if rule.selector is None else frozenset({"."})
            if not to or to & {"*", ".", namespace}:
                _merge(own.setdefault(namespace, {}).setdefault(host, []), rule, to)
            private = (not to and "." in default_export) or to in ({"."}, {namespace})
            if not private:
                _merge(exported.setdefault(namespace, {}).setdefault(host, []), rule, to)
            elif namespace == root_namespace:
                _merge(root_only.setdefault(host, []), rule, to)
        self._own = {namespace: _index(hosts) for namespace, hosts in own.items()}
        self._exported = {namespace: _index(hosts) for namespace, hosts in exported.items()}
        self._root_only = _index(root_only)

    def candidates(self, host: str, host_namespace: str, client_namespace: str) -> tuple[HostPolicy, ...]:
        """What may apply: rules of the client's namespace, else of the host's, else of the root namespace.

        In each of them those of the most specific host count. Several, where some have a workloadSelector.
        """
        local = self._root_only if client_namespace == self._root else self._own.get(client_namespace)
        found = local.best(host) if local else None
        if found is not None:
            return tuple(policy for policy, _ in found[1])
        for namespace in (host_namespace, self._root):
            index = self._exported.get(namespace)
            found = index.best(host) if index else None
            visible = () if found is None else tuple(p for p, to in found[1] if not to or to & {"*", client_namespace})
            if visible:
                return visible
        return ()


def chosen(
    candidates: tuple[HostPolicy, ...], client_namespace: str, labels: Mapping[str, str], *, inbound: bool = False
) -> HostPolicy:
    """Which of the candidates applies to a workload: the first whose selector selects it, else that without one.

    Selectors count for calls that the workload makes, not for those it takes.
    """
    general = HostPolicy()
    for policy in candidates:
        rule = policy.rule
        if rule is None or rule.selector is None:
            general = policy
        elif not inbound and rule.meta.namespace == client_namespace and rule.selector.items() <= labels.items():
            return policy
    return general


def _index(hosts: Mapping[str, list[_Merged]]) -> HostIndex[_Found]:
    return HostIndex({host: [(one.result(), one.exported) for one in merged] for host, merged in hosts.items()})


def _merge(merged: list[_Merged], rule: DestinationRule, exported: frozenset[str]) -> None:
    separate = True
    for one in merged:
        if exported == one.exported:
            separate = False
        else:
            separate = True
            if not one.exported or not exported >= one.exported:
                # What others see must not change by a rule that they do not see.
                continue
        theirs, ours = one.rule.selector, rule.selector
        if theirs is not None and ours is not None and theirs != ours:
            separate = True
            continue
        if (theirs is None) is (ours is None):
            separate = False
        one.add(rule)
    if separate:
        merged.append(_Merged.of(rule, exported))


def port_policy(policy: TrafficPolicy | None, port: int) -> tuple[TrafficPolicy | None, bool]:
    """A policy as it is for one port, and whether that is a port-level one: those inherit nothing."""
    if policy is not None:
        for number, own in policy.ports:
            if number == port:
                return own, True
    return policy, False


def subset_policy(base: TrafficPolicy | None, own: TrafficPolicy | None, port: int) -> TrafficPolicy | None:
    """A rule's policy with what a subset sets in its place, for one port.

    Each part is replaced as a whole; port-level settings of a subset leave no part of the rule's.
    """
    base, _ = port_policy(base, port)
    if own is None:
        return base
    own, for_port = port_policy(own, port)
    if base is None or own is None:
        return own
    return TrafficPolicy(
        connection_pool=own.connection_pool if for_port else own.connection_pool or base.connection_pool,
        outlier=own.outlier if for_port else own.outlier or base.outlier,
        load_balancer=own.load_balancer if for_port else own.load_balancer or base.load_balancer,
        tls=own.tls if for_port else own.tls or base.tls,
        tunnel=own.tunnel or base.tunnel,
        proxy_protocol=own.proxy_protocol or base.proxy_protocol,
        retry_budget=own.retry_budget or base.retry_budget,
    )


def effective_policy(
    policy: HostPolicy, subset: str, port: int, default: TrafficPolicy | None = None
) -> TrafficPolicy | None:
    """What applies to calls of a subset's port (or of all endpoints). ``default`` is the mesh's, part by part."""
    base, _ = port_policy(policy.policy, port)
    if default is not None:
        base = dataclasses.replace(
            base or TrafficPolicy(),
            connection_pool=(base.connection_pool if base else None) or default.connection_pool,
            outlier=(base.outlier if base else None) or default.outlier,
            ports=(),
        )
    own = policy.subset(subset) if subset else None
    return subset_policy(base, own.policy, port) if own else base


def load_balancer_of(policy: TrafficPolicy | None) -> LoadBalancer:
    """How endpoints are chosen."""
    return (policy.load_balancer if policy else None) or LEAST_REQUEST
