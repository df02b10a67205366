"""Kubernetes' Service, as far as a mesh knows it: https://kubernetes.io/docs/concepts/services-networking/service/."""

from __future__ import annotations

from typing import Final, Literal

from mlmesh_local.resources.domains import domain_problem, is_label
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model import Meta, Service, ServicePort
from mlmesh_local.resources.names import is_port_name, is_service_name
from mlmesh_local.resources.protocols import port_protocol

EXPORT_TO = "networking.istio.io/exportTo"
"""Annotation: namespaces, "." or "*" that see the Service, separated by commas; "~" for none."""

DISTRIBUTION = "networking.istio.io/traffic-distribution"
"""Annotation in place of `trafficDistribution`: of Services, ServiceEntries, and of Namespaces for all in them."""

# fmt: off
_CLUSTER_ONLY = (
    "allocateLoadBalancerNodePorts", "clusterIPs", "externalIPs", "externalTrafficPolicy", "healthCheckNodePort",
    "ipFamilies", "ipFamilyPolicy", "loadBalancerClass", "loadBalancerIP", "loadBalancerSourceRanges",
    # Sidecars choose endpoints themselves, in Istio too.
    "sessionAffinity", "sessionAffinityConfig",
)
# fmt: on
Distribution = Literal["", "zone", "node", "any"]
_DISTRIBUTIONS: Final[dict[str, Distribution]] = {
    "PreferClose": "zone",
    "PreferSameZone": "zone",
    "PreferSameNode": "node",
}


def parse_service(meta: Meta, spec: Fields) -> Service:
    """Read a Service's spec."""
    spec.ignored(*_CLUSTER_ONLY)
    if not is_service_name(meta.name):
        problem = "is not the name of a Service: up to 63 letters in lower case, digits and hyphens, a letter first"
        spec.problems.add(meta.at.field("metadata.name"), f'"{meta.name}" {problem}')
    kind = spec.choice("type", ("ClusterIP", "LoadBalancer", "NodePort", "ExternalName"), "ClusterIP")
    headless = spec.text("clusterIP") == "None"
    external = spec.text("externalName")
    if kind == "ExternalName":
        problem = domain_problem(external, wildcard=False)
        if problem:
            spec.refuse("externalName", problem)
    ports = _ports(spec)
    if not ports and not headless and kind != "ExternalName":
        spec.problems.add(spec.at, '"ports" needs at least one port')
    return Service(
        meta=meta,
        selector=spec.text_map("selector"),
        ports=ports,
        headless=headless,
        external_name=external if kind == "ExternalName" else "",
        export_to=tuple(word.strip() for word in meta.annotations.get(EXPORT_TO, "").split(",") if word.strip()),
        distribution=_distribution(meta, spec),
        node_local=spec.choice("internalTrafficPolicy", ("Cluster", "Local"), "Cluster") == "Local",
        not_ready=spec.boolean("publishNotReadyAddresses"),
    )


def _distribution(meta: Meta, spec: Fields) -> Distribution:
    declared = spec.choice("trafficDistribution", ("", *_DISTRIBUTIONS))
    return _DISTRIBUTIONS[declared] if declared else annotated_distribution(meta)


def annotated_distribution(meta: Meta) -> Distribution:
    """What the annotation says; a word that it does not know is "any", as in Istio."""
    annotated = meta.annotations.get(DISTRIBUTION, "").lower()
    unknown: Distribution = "any" if annotated else ""
    return next((place for name, place in _DISTRIBUTIONS.items() if name.lower() == annotated), unknown)


def _ports(spec: Fields) -> tuple[ServicePort, ...]:
    ports: list[ServicePort] = []
    taken: set[tuple[int, str]] = set()
    items = list(spec.messages("ports"))
    for item in items:
        with item:
            transport = item.choice("protocol", ("TCP", "UDP", "SCTP"), "TCP")
            port = _port(item, transport)
            if len(items) > 1 and not port.name:
                item.problems.add(item.at, '"name" is required where there are several ports')
            if port.name and port.name in {other.name for other in ports}:
                item.refuse("name", f'the port name "{port.name}" occurs twice')
            if (port.number, transport) in taken:
                item.refuse("port", f"the port {port.number} occurs twice")
            taken.add((port.number, transport))
            # Envoy does not see what is not TCP.
            if transport == "TCP":
                ports.append(port)
    return tuple(ports)


def _port(fields: Fields, transport: str) -> ServicePort:
    fields.ignored("nodePort")
    number = fields.port("port", required=True)
    name = fields.text("name")
    if name and not (is_label(name) and name == name.lower()):
        fields.refuse("name", f'"{name}" is not a DNS label')
    application = fields.text("appProtocol") if fields.has("appProtocol") else None
    target: int | str = port_or_name(fields, "targetPort") if fields.has("targetPort") else number
    fields.ignored("targetPort", "appProtocol")
    return ServicePort(
        number=number, name=name, target=target, protocol=port_protocol(number, name, application, transport)
    )


def port_or_name(fields: Fields, name: str) -> int | str:
    """A port's number, or the name of a container port."""
    node = fields.raw(name)
    if node is None:
        fields.required(name)
        return 0
    if isinstance(node.value, str):
        if not node.value.isdigit() and not is_port_name(node.value):
            problem = "is not the name of a port: up to 15 letters in lower case, digits and hyphens"
            fields.refuse(name, f'"{node.value}" {problem}')
        return int(node.value) if node.value.isdigit() else node.value
    return fields.port(name)
