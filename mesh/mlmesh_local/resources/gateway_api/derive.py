"""The active resources with those that follow from the Gateway API: what is translated and run.

    derive(resources).specs(VirtualService)

Pure; the last results are kept, because every change of an endpoint asks again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from mlmesh_local.resources.destinations import parse_destination_rule
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.gateway_api.convert import Conversion, Inputs, convert
from mlmesh_local.resources.gateway_api.model import (
    GatewayClass,
    KubernetesGateway,
    ListenerSet,
    Namespace,
    ReferenceGrant,
    Route,
    RouteRule,
)
from mlmesh_local.resources.gateway_api.model_tls import BackendTlsPolicy, CaBundle
from mlmesh_local.resources.gateway_api.owners import Derived
from mlmesh_local.resources.gateways import parse_gateway
from mlmesh_local.resources.model import Service, ServiceEntry
from mlmesh_local.resources.model_routes import Layer4Match
from mlmesh_local.resources.networking import parse_virtual_service
from mlmesh_local.resources.problems import At, Problems
from mlmesh_local.resources.services import parse_service
from mlmesh_local.resources.tree import Node
from mlmesh_local.resources.workload import parse_deployment, parse_service_account

if TYPE_CHECKING:
    from mlmesh_local.resources.resource_set import ResourceSet

S = TypeVar("S")
DOMAIN = "cluster.local"
_KEPT_MAX = 8
_NO_NAME, _NO_MATCH = "no-name.invalid", "no-match.invalid"
_PARSERS: dict[str, Any] = {
    "VirtualService": parse_virtual_service,
    "DestinationRule": parse_destination_rule,
    "Gateway": parse_gateway,
    "Deployment": parse_deployment,
    "Service": parse_service,
    "ServiceAccount": parse_service_account,
}
_kept: OrderedDict[str, ResourceSet] = OrderedDict()


def derive(resources: ResourceSet) -> ResourceSet:
    """A set with everything that follows from its Gateways and routes; itself where nothing does, or already derived.

    Raises InvalidResource for a route that asks for what this mesh cannot do.
    """
    from mlmesh_local.resources.resource_set import Resource  # noqa: PLC0415  The set cross-checks what is derived.

    kept = _kept.get(resources.digest)
    if kept is not None:
        _kept.move_to_end(resources.digest)
        return kept
    if not any(isinstance(resource.spec, KubernetesGateway | Route | BackendTlsPolicy) for resource in resources):
        return resources
    conversion = conversion_of(resources)
    problems = Problems()
    made: dict[tuple[str, str, str], list[Resource]] = {}
    born = {resource.key: resource.born for resource in resources}
    taken = set(born)
    for item in conversion.derived:
        key = (item.meta.kind, item.meta.namespace, item.meta.name)
        if key in taken:
            # What a person wrote under that name stays, as it does in a cluster.
            continue
        taken.add(key)
        spec = _parse(item, problems)
        plain = {"kind": item.kind, "metadata": {"namespace": item.meta.namespace, "name": item.meta.name}}
        origin = (item.origin.kind, item.origin.namespace, item.origin.name)
        resource = Resource(spec=spec, plain={**plain, "spec": item.spec}, text="", born=born[origin])
        made.setdefault(origin, []).append(resource)
    problems.refuse()
    result = type(resources).of([one for old in resources for one in (old, *made.get(old.key, ()))])
    for digest in (resources.digest, result.digest):
        _kept[digest] = result
    while len(_kept) > _KEPT_MAX:
        _kept.popitem(last=False)
    return result


def conversion_of(resources: ResourceSet) -> Conversion:
    """The conversion itself, with the results that statuses tell."""
    return convert(
        Inputs(
            gateways=resources.specs(KubernetesGateway),
            classes=resources.specs(GatewayClass),
            routes=_by_age(resources, Route),
            grants=resources.specs(ReferenceGrant),
            namespaces=_namespaces(resources),
            services=frozenset((s.meta.namespace, s.meta.name) for s in resources.specs(Service)),
            entries={(e.meta.namespace, e.meta.name): e.hosts for e in resources.specs(ServiceEntry)},
            sets=_by_age(resources, ListenerSet),
            policies=_by_age(resources, BackendTlsPolicy),
            bundles={(one.meta.namespace, one.meta.name): one for one in resources.specs(CaBundle)},
            ports=_ports(resources),
            domain=DOMAIN,
        )
    )


def _by_age(resources: ResourceSet, kind: type[S]) -> tuple[S, ...]:
    """Specs of a kind, the oldest first: of one age, the Gateway API takes them by namespace and name."""
    found = sorted(resources, key=lambda one: (one.age[:3], one.spec.meta.namespace, one.spec.meta.name))
    return tuple(resource.spec for resource in found if isinstance(resource.spec, kind))


def _ports(resources: ResourceSet) -> dict[tuple[str, str, str], dict[str, int]]:
    named: tuple[Service | ServiceEntry, ...] = (*resources.specs(Service), *resources.specs(ServiceEntry))
    return {
        (one.meta.kind, one.meta.namespace, one.meta.name): {port.name: port.number for port in one.ports}
        for one in named
    }


def _namespaces(resources: ResourceSet) -> tuple[Namespace, ...]:
    """Every namespace: in a cluster all that something is in are there, here they need not be written."""
    written = resources.specs(Namespace)
    used = {resource.spec.meta.namespace: resource.spec.meta for resource in resources if resource.spec.meta.namespace}
    for one in written:
        used.pop(one.meta.name, None)
    made = (replace(meta, kind="Namespace", namespace="", name=name, labels={}) for name, meta in used.items())
    return (*written, *(Namespace(meta=meta) for meta in made))


def _parse(item: Derived, problems: Problems) -> Any:
    origin = item.origin.at
    at = At(source=origin.source, line=item.meta.at.line, resource=str(item.origin), path="")
    document = dict(item.spec)
    if item.kind == "VirtualService":
        # No person can write its gateways, nor server names that are none of its hosts: the parser would refuse them.
        document.update(hosts=["*"], gateways=[f"{item.meta.namespace}/listener"])
    node = _node(document, at.line)
    if item.rules and isinstance(node.value, dict):
        section = next(name for name in ("http", "tls", "tcp") if name in item.spec)
        named = _named if section == "tls" else dict
        rules = [_node(named(rule_document), rule.at.line) for rule_document, rule in _rules(item, section)]
        node.value[section] = Node(at.line, list(rules))
    fields = Fields(node, at, problems)
    spec = _PARSERS[item.kind](item.meta, fields)
    fields.done()
    if item.kind == "VirtualService":
        hosts, gateways = tuple(item.spec["hosts"]), tuple(item.spec["gateways"])
        tls = tuple(replace(rule, matches=_as_derived(rule.matches)) for rule in spec.tls)
        return replace(spec, hosts=hosts, gateways=gateways, tls=tls, semantics="gateway")
    return spec


def _named(rule: dict[str, Any]) -> dict[str, Any]:
    """A rule for TLS with the server names that no person can leave out: a route may have none that its parent has."""
    matches = [one if one.get("sniHosts") else {**one, "sniHosts": [_NO_NAME]} for one in rule.get("match", ())]
    return {**rule, "match": matches or [{"sniHosts": [_NO_MATCH]}]}


def _as_derived(matches: Iterable[Layer4Match]) -> tuple[Layer4Match, ...]:
    real = (match for match in matches if match.sni_hosts != (_NO_MATCH,))
    return tuple(replace(match, sni_hosts=()) if match.sni_hosts == (_NO_NAME,) else match for match in real)


def _rules(item: Derived, section: str) -> Iterable[tuple[Any, RouteRule]]:
    return zip(item.spec[section], item.rules, strict=True)


def _node(value: Any, line: int) -> Node:
    if isinstance(value, dict):
        return Node(line, {key: _node(inner, line) for key, inner in value.items()})
    if isinstance(value, list):
        return Node(line, [_node(inner, line) for inner in value])
    return Node(line, value)
