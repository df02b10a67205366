"""Resources of the Gateway API as Istio's own: what Istio's controller makes of them, purely from resources."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from mlmesh_local.resources.gateway_api.attach import (
    ROUTE_KINDS,
    Binding,
    Fault,
    Surroundings,
    bindings_of,
    hosts_overlap,
    intersection,
)
from mlmesh_local.resources.gateway_api.backends import PolicyResult, convert_policies
from mlmesh_local.resources.gateway_api.listeners import INTERNAL_NAME, PARENTS
from mlmesh_local.resources.gateway_api.model import (
    GatewayClass,
    GrpcRoute,
    HttpRoute,
    KubernetesGateway,
    ListenerSet,
    Namespace,
    ReferenceGrant,
    Route,
    RouteRule,
    TcpRoute,
    TlsRoute,
)
from mlmesh_local.resources.gateway_api.model_tls import BackendTlsPolicy, CaBundle
from mlmesh_local.resources.gateway_api.owners import (
    Derived,
    Document,
    GatewayResult,
    convert_gateway,
    is_ours,
    istio_gateways,
    parents_of,
    workload,
)
from mlmesh_local.resources.gateway_api.rules import HardError, precedence, rule_documents, stream_destinations
from mlmesh_local.resources.meta import Meta

ROUTE_SEMANTICS = "internal.istio.io/route-semantics"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteResult:
    """A route with the parents that it names and what is wrong with its rules, for the mesh and for gateways."""

    route: Route
    bindings: tuple[Binding, ...]
    mesh_fault: Fault | None
    gateway_fault: Fault | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What conversion reads, each oldest first. Services and entries as in `Surroundings`."""

    gateways: tuple[KubernetesGateway, ...]
    classes: tuple[GatewayClass, ...]
    routes: tuple[Route, ...]
    grants: tuple[ReferenceGrant, ...]
    namespaces: tuple[Namespace, ...]
    services: frozenset[tuple[str, str]]
    entries: Mapping[tuple[str, str], tuple[str, ...]]
    sets: tuple[ListenerSet, ...] = ()
    policies: tuple[BackendTlsPolicy, ...] = ()
    bundles: Mapping[tuple[str, str], CaBundle] = field(default_factory=dict)
    ports: Mapping[tuple[str, str, str], Mapping[str, int]] = field(default_factory=dict)
    """Numbers of ports by their names, of each Service and ServiceEntry by (kind, namespace, name)."""
    domain: str = "cluster.local"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What followed: resources of Istio and Kubernetes, and the results that statuses tell."""

    derived: tuple[Derived, ...]
    gateways: tuple[GatewayResult, ...]
    routes: tuple[RouteResult, ...]
    policies: tuple[PolicyResult, ...] = ()


def convert(inputs: Inputs) -> Conversion:
    """Convert everything."""
    ours = [gateway for gateway in inputs.gateways if is_ours(gateway, inputs.classes)]
    made = [item for gateway in ours for item in workload(gateway, inputs.sets, inputs.namespaces)]
    services = inputs.services | {(item.meta.namespace, item.meta.name) for item in made if item.kind == "Service"}
    entry_hosts = {(key[0], host) for key, hosts in inputs.entries.items() for host in hosts}
    service_hosts = {(space, f"{name}.{space}.svc.{inputs.domain}") for space, name in services}
    around = Surroundings(
        services=frozenset(services),
        entries=inputs.entries,
        hosts=frozenset(entry_hosts | service_hosts),
        grants=inputs.grants,
        bundles=inputs.bundles,
        domain=inputs.domain,
    )
    results = tuple(convert_gateway(gateway, inputs.sets, around, inputs.namespaces) for gateway in ours)
    around = replace(around, parents=parents_of(results))
    routes: list[RouteResult] = []
    keyed: dict[str, list[tuple[Derived, str]]] = {}
    derived = [*made, *(item for result in results for item in istio_gateways(result))]
    for route in inputs.routes:
        result, bases = _route(route, around)
        routes.append(result)
        for key, base in bases:
            if key:
                keyed.setdefault(key, []).append((base, key))
            else:
                derived.append(base)
    derived += [_merged(key, [base for base, _ in bases]) for key, bases in keyed.items()]
    ports = {**inputs.ports, **_made_ports(made)}
    policies, rules = convert_policies(inputs.policies, inputs.routes, around, ports)
    return Conversion(derived=(*derived, *rules), gateways=results, routes=tuple(routes), policies=policies)


def _made_ports(made: Iterable[Derived]) -> dict[tuple[str, str, str], Mapping[str, int]]:
    return {
        (item.kind, item.meta.namespace, item.meta.name): {port["name"]: port["port"] for port in item.spec["ports"]}
        for item in made
        if item.kind == "Service"
    }


# Routes


def _route(route: Route, around: Surroundings) -> tuple[RouteResult, list[tuple[str, Derived]]]:
    bindings = bindings_of(route, around)
    needs = {binding.is_mesh for binding in bindings}
    faults: dict[bool, Fault | None] = {True: None, False: None}
    converted: dict[bool, list[tuple[Document, RouteRule]]] = {True: [], False: []}
    for mesh in sorted(needs):
        try:
            converted[mesh], faults[mesh] = _rules(route, around, mesh=mesh)
        except HardError as error:
            faults[mesh] = error.fault
    result = RouteResult(route=route, bindings=bindings, mesh_fault=faults[True], gateway_fault=faults[False])
    bases: list[tuple[str, Derived]] = []
    bound = sorted((b for b in bindings if b.denied is None), key=lambda binding: binding.parent.internal)
    for binding in bound:
        rules = converted[binding.is_mesh]
        if not rules:
            continue
        make = _http_services if isinstance(route, HttpRoute | GrpcRoute) else _stream_services
        for key, section, host, documents in make(route, binding, rules, around):
            kind = "~tcp" if section == "tcp" else "~tls" if section == "tls" else ""
            name = f"{route.meta.name}{kind}~{len(bases)}~{INTERNAL_NAME}"
            spec = {
                "hosts": [host],
                "gateways": [binding.parent.internal],
                section: [document for document, _ in documents],
            }
            bases.append((key, _virtual_service(route, name, spec, tuple(rule for _, rule in documents))))
    return result, bases


def _rules(route: Route, around: Surroundings, *, mesh: bool) -> tuple[list[tuple[Document, RouteRule]], Fault | None]:
    kind = ROUTE_KINDS[type(route)]
    if isinstance(route, HttpRoute | GrpcRoute):
        return rule_documents(route, kind, around, mesh=mesh)
    found: list[tuple[Document, RouteRule]] = []
    fault: Fault | None = None
    for rule in route.rules:
        destinations, problem = stream_destinations(rule, route, kind, around, mesh=mesh)
        document: Document = {"route": destinations}
        if isinstance(route, TlsRoute) and any(backend.weight for backend in rule.backends or ()):
            document = {"match": [{"sniHosts": list(route.hostnames) or ["*"]}], **document}
        found.append((document, rule))
        fault = problem or fault
    return found, fault


Made = Iterator[tuple[str, str, str, list[tuple[Document, RouteRule]]]]
"""Key of the VirtualService that it is merged into, part of the spec, host and rules."""


def _http_services(
    route: Route, binding: Binding, rules: list[tuple[Document, RouteRule]], around: Surroundings
) -> Made:
    key, hosts = binding.parent.internal, list(route.hostnames) or ["*"]
    if binding.is_mesh:
        key, hosts = route.meta.namespace, _mesh_hosts(route, binding, around)
        if binding.ref.port:
            key = f"{key}/{binding.ref.port}"
            rules = [(_with_port(document, binding.ref.port), rule) for document, rule in rules]
    ordered = sorted(rules, key=lambda item: precedence(item[0]))
    for host in hosts:
        if binding.admits(host):
            yield f"{key}/{host}", "http", host, ordered


def _stream_services(
    route: Route, binding: Binding, rules: list[tuple[Document, RouteRule]], around: Surroundings
) -> Made:
    section = "tcp" if isinstance(route, TcpRoute) else "tls"
    hosts = ["*"] if section == "tcp" else list(route.hostnames) or ["*"]
    own = binding.parent.hostname
    if binding.is_mesh:
        hosts = _mesh_hosts(route, binding, around)
        if binding.ref.port:
            rules = [
                # A rule for TLS without conditions, as one without backends is, never applies and gets none.
                (_with_port(document, binding.ref.port) if section == "tcp" or "match" in document else document, rule)
                for document, rule in rules
            ]
    elif section == "tls" and own:
        hosts = intersection(hosts, [own])
        rules = [(kept, rule) for document, rule in rules if (kept := _narrowed(document, own)) is not None]
    for host in hosts:
        chosen = rules
        if binding.is_mesh and section == "tls":
            chosen = [(_compatible(document, host), rule) for document, rule in rules]
        yield "", section, host, chosen


def _narrowed(document: Document, own: str) -> Document | None:
    if "match" not in document:
        return document
    hosts = intersection(document["match"][0]["sniHosts"], [own])
    return {**document, "match": [{**document["match"][0], "sniHosts": hosts}]} if hosts else None


def _compatible(document: Document, host: str) -> Document:
    matches = document.get("match", [])
    if len(matches) == 1 and matches[0].get("sniHosts", []) == ["*"]:
        return {**document, "match": [{**matches[0], "sniHosts": [host]}]}
    if len(matches) == 1 and len(matches[0].get("sniHosts", [])) > 1:
        kept = [name for name in matches[0]["sniHosts"] if hosts_overlap(host, name)]
        return {**document, "match": [{**matches[0], "sniHosts": kept}]}
    return document


def _mesh_hosts(route: Route, binding: Binding, around: Surroundings) -> list[str]:
    space = binding.ref.namespace or route.meta.namespace
    if binding.ref.kind == "ServiceEntry":
        return list(around.entries.get((space, binding.ref.name), ()))
    return [f"{binding.ref.name}.{space}.svc.{around.domain}"]


def _with_port(document: Document, port: int) -> Document:
    return {**document, "match": [{**match, "port": port} for match in document.get("match") or [{}]]}


def _virtual_service(route: Route, name: str, spec: Document, rules: tuple[RouteRule, ...]) -> Derived:
    kind = ROUTE_KINDS[type(route)]
    meta = Meta(
        kind="VirtualService",
        namespace=route.meta.namespace,
        name=name,
        labels={},
        annotations={ROUTE_SEMANTICS: "gateway", PARENTS: f"{kind}/{route.meta.name}.{route.meta.namespace}"},
        at=route.meta.at,
        created=route.meta.created,
    )
    return Derived(kind="VirtualService", meta=meta, spec=spec, origin=route.meta, rules=rules)


def _merged(key: str, bases: list[Derived]) -> Derived:
    """VirtualServices of one parent and host as one: rules of all its routes in the API's order, the oldest first."""
    first = bases[0]
    rules = [pair for base in bases for pair in zip(base.spec["http"], base.rules, strict=True)]
    if len(bases) > 1:
        rules.sort(key=lambda item: precedence(item[0]))
    parents = ",".join(base.meta.annotations[PARENTS] for base in bases)
    meta = replace(
        first.meta,
        name=key.replace("/", "~"),
        annotations={ROUTE_SEMANTICS: "gateway", PARENTS: parents},
    )
    return replace(
        first,
        meta=meta,
        spec={**first.spec, "http": [document for document, _ in rules]},
        rules=tuple(rule for _, rule in rules),
    )
