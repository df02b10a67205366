"""VirtualService: https://istio.io/latest/docs/reference/config/networking/virtual-service/.

What is refused is what Istio's validation refuses (pkg/config/validation in its source), and nothing else but what
Envoy would reject.
"""

from __future__ import annotations

from mlmesh_local.resources.domains import (
    claim_path,
    domain_problem,
    host_covers,
    hosts_overlap,
    is_ip,
    is_label,
    sni_problem,
    subnet_problem,
)
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.http_actions import (
    GRPC_STATUS,
    authorities,
    duration_s,
    parse_cors,
    parse_direct_response,
    parse_fault,
    parse_headers,
    parse_redirect,
    parse_retries,
    parse_rewrite,
)
from mlmesh_local.resources.http_matches import gateway_names, match_port, parse_http_match, source_labels
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_routes import (
    Delegate,
    HttpRule,
    Layer4Match,
    Layer4Rule,
    Origin,
    VirtualService,
    effective_mirrors,
)
from mlmesh_local.resources.route_destinations import parse_destinations, parse_mirror

MESH = "mesh"


def parse_virtual_service(meta: Meta, spec: Fields) -> VirtualService:
    """Read a VirtualService's spec. One without hosts is a delegate."""
    hosts = spec.texts("hosts")
    gateways = gateway_names(spec, "gateways")
    rules = tuple(_rule(item, index, delegate=not hosts) for index, item in enumerate(spec.messages("http")))
    tls = tuple(_layer4(item, tls=True) for item in spec.messages("tls"))
    tcp = tuple(_layer4(item, tls=False) for item in spec.messages("tcp"))
    service = VirtualService(
        meta=meta,
        hosts=tuple(host.lower() for host in hosts),
        gateways=gateways or (MESH,),
        export_to=_export_to(spec, meta.namespace),
        http=rules,
        tls=tls,
        tcp=tcp,
    )
    if not (spec.items("http") or spec.items("tcp") or spec.items("tls")):
        spec.problems.add(spec.at, 'needs "http", "tls" or "tcp"')
    if not hosts:
        for name in ("gateways", "tls", "tcp"):
            if spec.items(name):
                spec.refuse(name, "is not for a VirtualService without hosts, which is a delegate")
    at_gateways_only = bool(gateways) and MESH not in gateways
    _check_hosts(spec, hosts, at_gateways_only=at_gateways_only, tls=tls)
    _check_server_names(spec, service, mesh=MESH in gateways)
    if not at_gateways_only:
        _check_claims(spec, rules)
    return service


def export_to(spec: Fields) -> tuple[str, ...]:
    """`exportTo`: "*" (everyone, the default), "." (the own namespace) or namespaces."""
    return spec.texts("exportTo") or ("*",)


def _export_to(spec: Fields, namespace: str) -> tuple[str, ...]:
    """`exportTo` as Istio checks it; empty when absent."""
    names = spec.texts("exportTo")
    seen: set[str] = set()
    for name in names:
        if name == "~":
            spec.refuse("exportTo", '"~" is for ServiceEntries only')
        elif name not in (".", "*") and not is_label(name):
            spec.refuse("exportTo", f'"{name}" is neither ".", "*" nor the name of a namespace')
        key = namespace if name == "." else name
        if key in seen:
            spec.refuse("exportTo", f'"{name}" occurs twice')
        seen.add(key)
    if "*" in seen and len(names) > 1:
        spec.refuse("exportTo", '"*" cannot be set together with others')
    return names


# What is checked across fields


def _check_hosts(spec: Fields, hosts: tuple[str, ...], *, at_gateways_only: bool, tls: tuple[Layer4Rule, ...]) -> None:
    sni = any(match.sni_hosts for rule in tls for match in rule.matches)
    valid = True
    for host in hosts:
        problem = sni_problem(host) if at_gateways_only and sni else domain_problem(host, wildcard=True)
        if not problem and not at_gateways_only and host == "*":
            problem = '"*" is for gateways only'
        if problem and not is_ip(host):
            spec.refuse("hosts", problem)
            valid = False
    if not valid:
        return
    for index, host in enumerate(hosts):
        for other in hosts[index + 1 :]:
            if hosts_overlap(host, other):
                spec.refuse("hosts", f'"{host}" and "{other}" overlap')


def _check_server_names(spec: Fields, service: VirtualService, *, mesh: bool) -> None:
    """Server names of `tls` are hosts of the VirtualService."""
    for rule in service.tls:
        for match in rule.matches:
            for name in match.sni_hosts:
                problem = domain_problem(name, wildcard=True) if mesh else sni_problem(name)
                if problem:
                    if not is_ip(name):
                        spec.problems.add(match.at.field("sniHosts"), problem)
                elif not any(host_covers(host, name.lower()) for host in service.hosts):
                    known = ", ".join(service.hosts)
                    spec.problems.add(
                        match.at.field("sniHosts"), f'"{name}" is none of the hosts of the VirtualService: {known}'
                    )


def _check_claims(spec: Fields, rules: tuple[HttpRule, ...]) -> None:
    for rule in rules:
        for match in rule.matches:
            for name, _ in (*match.headers, *match.without_headers):
                if claim_path(name):
                    spec.problems.add(
                        match.at, f'"{name}": claims are known at gateways only; name "gateways" other than "mesh"'
                    )


# Rules of HTTP


def _rule(fields: Fields, index: int, *, delegate: bool) -> HttpRule:
    with fields:
        matches = tuple(parse_http_match(item, place) for place, item in enumerate(fields.messages("match")))
        destinations = parse_destinations(fields, headers=True)
        mirror, percent, listed = parse_mirror(fields)
        rule = HttpRule(
            name=fields.text("name"),
            matches=matches,
            destinations=destinations,
            timeout_s=duration_s(fields, "timeout"),
            retries=parse_retries(fields.message("retries")) if fields.has("retries") else None,
            fault=parse_fault(fields.message("fault")) if fields.has("fault") else None,
            mirrors=effective_mirrors(mirror, percent, listed),
            mirror=mirror,
            mirror_percent=percent,
            listed_mirrors=listed,
            headers=parse_headers(fields.message("headers")) if fields.has("headers") else None,
            rewrite=parse_rewrite(fields.message("rewrite")) if fields.has("rewrite") else None,
            redirect=parse_redirect(fields.message("redirect"), matches) if fields.has("redirect") else None,
            direct_response=parse_direct_response(fields.message("directResponse"))
            if fields.has("directResponse")
            else None,
            delegate=_delegate(fields),
            cors=parse_cors(fields.message("corsPolicy")) if fields.has("corsPolicy") else None,
            origin=Origin(rule=index),
            at=fields.at,
        )
        fields.ignored("retries", "fault", "headers", "rewrite", "redirect", "directResponse", "corsPolicy")
        _check_rule(fields, rule, delegate=delegate)
        return rule


def _delegate(fields: Fields) -> Delegate | None:
    if not fields.has("delegate"):
        fields.ignored("delegate")
        return None
    with fields.message("delegate") as inner:
        return Delegate(name=inner.text("name"), namespace=inner.text("namespace"))


def _check_rule(fields: Fields, rule: HttpRule, *, delegate: bool) -> None:
    set_authorities = [*([rule.rewrite.authority] if rule.rewrite else []), *authorities(rule.headers)]
    if len([value for value in set_authorities if value]) > 1:
        fields.problems.add(fields.at, "the authority is set more than once, by headers or by the rewrite")
    if rule.delegate is not None:
        if not delegate:
            for name in ("redirect", "route"):
                if fields.has(name) and (name != "route" or rule.destinations):
                    fields.refuse(name, 'cannot be set together with "delegate"')
            return
        fields.refuse("delegate", "is not for a delegate itself: a VirtualService without hosts")
    answer = "redirect" if rule.redirect else "directResponse" if rule.direct_response else ""
    if answer:
        for name in ("route", "fault", "rewrite", "directResponse"):
            if name != answer and fields.has(name) and (name != "route" or rule.destinations):
                fields.refuse(name, f'cannot be set together with "{answer}"')
    elif not rule.destinations and not fields.items("route"):
        fields.problems.add(fields.at, 'needs "route", "redirect", "directResponse" or "delegate"')


# Rules of connections


def _layer4(fields: Fields, *, tls: bool) -> Layer4Rule:
    with fields:
        matches = tuple(_layer4_match(item, tls=tls) for item in fields.messages("match"))
        if tls and not matches:
            fields.problems.add(fields.at, '"match" needs at least one condition, with "sniHosts"')
        destinations = parse_destinations(fields, headers=False)
        if not destinations and not fields.items("route"):
            fields.problems.add(fields.at, '"route" needs at least one destination')
        return Layer4Rule(matches=matches, destinations=destinations, at=fields.at)


def _layer4_match(fields: Fields, *, tls: bool) -> Layer4Match:
    with fields:
        names: tuple[str, ...] = ()
        if tls:
            names = fields.texts("sniHosts")
            if not names:
                fields.problems.add(fields.at, '"sniHosts" needs at least one server name')
        else:
            # Istio has never looked at it.
            fields.ignored("sourceSubnet")
        subnets = fields.texts("destinationSubnets")
        for subnet in subnets:
            problem = subnet_problem(subnet)
            if problem:
                fields.refuse("destinationSubnets", problem)
        return Layer4Match(
            sni_hosts=names,
            destination_subnets=subnets,
            port=match_port(fields),
            source_labels=source_labels(fields),
            source_namespace=fields.text("sourceNamespace"),
            gateways=gateway_names(fields, "gateways"),
            at=fields.at,
        )


__all__ = ["GRPC_STATUS", "export_to", "parse_virtual_service"]
