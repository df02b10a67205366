"""ServiceEntry and WorkloadEntry: https://istio.io/latest/docs/reference/config/networking/service-entry/."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

from mlmesh_local.resources.checked import exports, labels, selector
from mlmesh_local.resources.domains import domain_problem, is_ip, is_label, subnet_problem
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model import EntryEndpoint, EntryPort, Meta, Resolution, ServiceEntry, WorkloadEntry
from mlmesh_local.resources.protocols import Protocol, is_http, is_tls, parse_protocol

UNIX = "unix://"
_RESOLUTIONS = ("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")
_ACCOUNT_MAX = 253
_DYNAMIC = ("http", "tls", "grpc", "http2")


def parse_service_entry(meta: Meta, spec: Fields) -> ServiceEntry:
    """Read a ServiceEntry's spec."""
    resolution = spec.choice("resolution", _RESOLUTIONS, "NONE")
    ports = _ports(spec)
    _addresses(spec, resolution)
    entry = ServiceEntry(
        meta=meta,
        hosts=_hosts(spec, resolution),
        ports=ports,
        external=spec.choice("location", ("MESH_EXTERNAL", "MESH_INTERNAL"), "MESH_EXTERNAL") == "MESH_EXTERNAL",
        resolution=cast("Resolution", resolution),
        endpoints=_endpoints(spec, resolution, {port.name for port in ports}),
        selector=selector(spec, "workloadSelector", "labels"),
        addresses=spec.texts("addresses"),
        subject_alt_names=spec.texts("subjectAltNames"),
        export_to=exports(spec, meta.namespace, nobody=True),
    )
    spec.one_of("workloadSelector", "endpoints")
    if (
        resolution != "NONE"
        and len(entry.hosts) > 1
        and not all(is_http(p.protocol) or is_tls(p.protocol) for p in ports)
    ):
        spec.refuse("hosts", "several hosts cannot be told apart on a port that is neither HTTP nor TLS")
    if resolution == "DYNAMIC_DNS":
        _check_dynamic(spec, entry)
    return entry


def _check_dynamic(spec: Fields, entry: ServiceEntry) -> None:
    for name in ("addresses", "endpoints"):
        if spec.has(name):
            spec.refuse(name, "does not go with resolution DYNAMIC_DNS")
    for port in entry.ports:
        if port.protocol not in _DYNAMIC:
            spec.refuse(
                "ports", f'resolution DYNAMIC_DNS does not go with "{port.name}": it is for HTTP, HTTP2, GRPC and TLS'
            )
    if not entry.external and entry.meta.labels.get("istio.io/use-waypoint", "none").lower() not in ("", "none"):
        spec.refuse("location", "MESH_INTERNAL with resolution DYNAMIC_DNS does not go with a waypoint")


def _hosts(spec: Fields, resolution: str) -> tuple[str, ...]:
    hosts: list[str] = []
    for node, at in spec.items("hosts"):
        if not isinstance(node.value, str):
            spec.problems.add(at, f"must be a string, not {node.kind()}")
            continue
        text = node.value
        problem = domain_problem(text, wildcard=True)
        if text == "*":
            problem = '"*" would be every host; name a domain, such as "*.example.com"'
        elif not problem and resolution == "DYNAMIC_DNS" and not text.startswith("*"):
            problem = f'"{text}" must begin with "*": resolution DYNAMIC_DNS is for wildcards'
        elif not problem and resolution.startswith("DNS") and "*" in text and not spec.items("endpoints"):
            problem = f'"{text}" cannot be resolved: a wildcard needs "endpoints"'
        if problem:
            spec.problems.add(at, problem)
        else:
            hosts.append(text)
    if not spec.has("hosts") or (not hosts and not spec.items("hosts")):
        spec.problems.add(spec.at, '"hosts" needs at least one host')
    return tuple(hosts)


def _addresses(spec: Fields, resolution: str) -> None:
    for text in spec.texts("addresses"):
        problem = subnet_problem(text)
        if problem:
            spec.refuse("addresses", problem)
        elif "/" in text and resolution not in ("NONE", "STATIC"):
            spec.refuse("addresses", f"a block of addresses goes with resolution NONE or STATIC, not {resolution}")


def _ports(spec: Fields) -> tuple[EntryPort, ...]:
    ports: list[EntryPort] = []
    for item in spec.messages("ports"):
        with item:
            port = EntryPort(
                number=item.port("number", required=True),
                name=item.text("name", required=True),
                protocol=protocol(item, "protocol"),
                target_port=item.port("targetPort"),
            )
            if port.name and not is_label(port.name):
                item.refuse("name", f'"{port.name}" is not a DNS label')
            if any(other.name == port.name for other in ports):
                item.refuse("name", f'the port name "{port.name}" occurs twice')
            if any(other.number == port.number for other in ports):
                item.refuse("number", f"the port {port.number} occurs twice")
            ports.append(port)
    return tuple(ports)


def protocol(fields: Fields, name: str) -> Protocol:
    """A port's protocol by Istio's name; absent or empty is found out from the first bytes."""
    text = fields.text(name)
    found = parse_protocol(text)
    if text and found is None:
        fields.refuse(name, f'"{text}" is not one of HTTP, HTTPS, HTTP2, GRPC, GRPC-WEB, TLS, TCP, MONGO, MYSQL, REDIS')
    return found or "unknown"


def _endpoints(spec: Fields, resolution: str, ports: Collection[str]) -> tuple[EntryEndpoint, ...]:
    found = tuple(_endpoint(item, resolution, ports) for item in spec.messages("endpoints"))
    if spec.has("endpoints") and resolution == "NONE":
        spec.refuse("endpoints", "does not go with resolution NONE; use STATIC or DNS")
    if len(found) > 1 and resolution == "DNS_ROUND_ROBIN":
        spec.refuse("endpoints", "resolution DNS_ROUND_ROBIN takes one endpoint")
    return found


def _endpoint(item: Fields, resolution: str, ports: Collection[str]) -> EntryEndpoint:
    with item:
        dns = resolution.startswith("DNS")
        found = read_endpoint(item, host_names=dns, unix=not dns)
        for name in found.ports:
            if name not in ports:
                item.refuse("ports", f'"{name}" is the name of none of the ports')
        if found.address.startswith(UNIX) and len(ports) != 1:
            item.refuse("address", "a unix socket goes with exactly one port")
        if dns and not found.address:
            item.required("address")
        return found


def parse_workload_entry(meta: Meta, spec: Fields) -> WorkloadEntry:
    """Read a WorkloadEntry's spec. Its labels are those of the spec and of its metadata, which win."""
    found = read_endpoint(spec, host_names=True, unix=True)
    merged = {**found.labels, **meta.labels}
    return WorkloadEntry(
        meta=meta,
        endpoint=EntryEndpoint(
            address=found.address,
            ports=found.ports,
            labels=merged,
            weight=found.weight,
            service_account=found.service_account,
            locality=found.locality,
            network=found.network,
        ),
    )


def read_endpoint(fields: Fields, *, host_names: bool, unix: bool) -> EntryEndpoint:
    """The fields that an endpoint and a WorkloadEntry have in common."""
    address, network = fields.text("address"), fields.text("network")
    if not address and not network:
        fields.problems.add(fields.at, '"address" is required, or "network" where only a gateway is called')
    problem = _address_problem(address, host_names=host_names, unix=unix) if address else ""
    if problem:
        fields.refuse("address", problem)
    numbers: dict[str, int] = {}
    with fields.message("ports") as inner:
        for name in inner.names():
            numbers[name] = inner.port(name)
            if not is_label(name):
                inner.refuse(name, "is not a DNS label")
    if fields.has("ports") and address.startswith(UNIX):
        fields.refuse("ports", "does not go with a unix socket")
    account = fields.text("serviceAccount")
    if len(account) > _ACCOUNT_MAX:
        fields.refuse("serviceAccount", f"must have at most {_ACCOUNT_MAX} characters, not {len(account)}")
    return EntryEndpoint(
        address=address,
        ports=numbers,
        labels=labels(fields, "labels"),
        weight=fields.integer("weight") or 0,
        service_account=account,
        locality=fields.text("locality"),
        network=network,
    )


def _address_problem(address: str, *, host_names: bool, unix: bool) -> str:
    if unix and address.startswith(UNIX):
        path = address.removeprefix(UNIX)
        fine = path.startswith("@") or (path.startswith("/") and not path.endswith("/"))
        return "" if fine else f'"{path}" is not the absolute path of a file'
    if is_ip(address):
        return ""
    if not host_names:
        return f'"{address}" is not an IP address'
    problem = domain_problem(address, wildcard=False)
    return f'"{address}" is neither an IP address nor a host name' if problem else ""
