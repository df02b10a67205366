"""Gateway, GatewayClass, ReferenceGrant and Namespace."""

from __future__ import annotations

import re

from mlmesh_local.resources.domains import is_ip
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.gateway_api.filters import repeated
from mlmesh_local.resources.gateway_api.model import (
    GROUP,
    GatewayAddress,
    GatewayClass,
    GrantFrom,
    GrantTo,
    KubernetesGateway,
    LabelRequirement,
    Listener,
    ListenerSet,
    ListenerTls,
    Namespace,
    NamespaceScope,
    ObjectRef,
    ReferenceGrant,
)
from mlmesh_local.resources.gateway_api.policies import read_gateway_tls
from mlmesh_local.resources.gateway_api.reading import (
    HOSTNAME,
    SECTION_NAME,
    at_most,
    group,
    kind,
    metadata_map,
    namespace,
    object_ref,
    selector,
    text,
)
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.names import is_namespace

LISTENERS_MAX = 64
_PROTOCOL = re.compile(
    # The second half is without "^" in the Gateway API's schema, too.
    r"^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?\Z|^.*[a-z0-9]([-a-z0-9]*[a-z0-9])?"
    r"(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\/[A-Za-z0-9]+\Z"
)
_ADDRESS_TYPES = "IPAddress, Hostname, NamedAddress or a type with a domain, such as example.com/Pool"
_ADDRESS_TYPE = re.compile(
    r"^Hostname|^.*IPAddress|^.*NamedAddress|"
    r"^.*[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\/[A-Za-z0-9\/\-._~%!$&'()*+,;=:]+\Z"
)
_CONTROLLER = re.compile(
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\/[A-Za-z0-9\/\-._~%!$&'()*+,;=:]+\Z"
)


def parse_kubernetes_gateway(meta: Meta, spec: Fields) -> KubernetesGateway:
    """Read a Gateway's spec."""
    spec.unsupported("defaultScope", why="Istio has no default gateways")
    listeners = _listeners(spec)
    labels = annotations = parameters = None
    if spec.has("infrastructure"):
        with spec.message("infrastructure") as inner:
            labels = metadata_map(inner, "labels", limit=8, labels=True)
            annotations = metadata_map(inner, "annotations", limit=16, labels=False)
            if inner.has("parametersRef"):
                inner.refuse("parametersRef", "not supported: a local process takes no patches of its Deployment")
            inner.ignored("parametersRef")
    spec.ignored("infrastructure")
    return KubernetesGateway(
        meta=meta,
        class_name=text(spec, "gatewayClassName", None, "a name", required=True),
        listeners=listeners,
        addresses=_addresses(spec),
        labels=labels,
        annotations=annotations,
        parameters=parameters,
        sets=_allowed_sets(spec),
        tls=read_gateway_tls(spec),
    )


def parse_listener_set(meta: Meta, spec: Fields) -> ListenerSet:
    """Read a ListenerSet's spec."""
    spec.required("parentRef")
    with spec.message("parentRef") as inner:
        parent = object_ref(inner, group_default=GROUP, kind_default="Gateway")
    return ListenerSet(meta=meta, parent=parent, listeners=_listeners(spec))


def _listeners(spec: Fields) -> tuple[Listener, ...]:
    listeners = tuple(_listener(item) for item in spec.messages("listeners"))
    if not listeners:
        spec.problems.add(spec.at, '"listeners" needs at least one listener')
    at_most(spec, "listeners", len(listeners), LISTENERS_MAX)
    repeated(spec, "listeners", [listener.name for listener in listeners])
    seen: dict[tuple[int, str, str], Listener] = {}
    for listener in listeners:
        first = seen.setdefault((listener.port, listener.protocol, listener.hostname), listener)
        if first is not listener:
            spec.problems.add(
                listener.at, f'has the port, the protocol and the host name of the listener "{first.name}"'
            )
    return listeners


def _allowed_sets(spec: Fields) -> NamespaceScope:
    found = NamespaceScope(how="None")
    if spec.has("allowedListeners"):
        with spec.message("allowedListeners") as inner:
            if inner.has("namespaces"):
                with inner.message("namespaces") as scope:
                    how = scope.choice("from", ("All", "Selector", "Same", "None"), "None")
                    chosen = selector(scope.message("selector")) if scope.has("selector") else None
                    scope.ignored("selector")
                    found = NamespaceScope(how=how, selector=chosen)
            inner.ignored("namespaces")
    spec.ignored("allowedListeners")
    return found


def _addresses(spec: Fields) -> tuple[GatewayAddress, ...]:
    found: list[GatewayAddress] = []
    for item in spec.messages("addresses"):
        with item:
            address = GatewayAddress(
                type=text(item, "type", _ADDRESS_TYPE, f"one of {_ADDRESS_TYPES}", default="IPAddress"),
                value=text(item, "value", None, "an address"),
            )
            if address.type == "Hostname" and address.value and not HOSTNAME.match(address.value):
                item.refuse("value", f'"{address.value}" is not a host name')
            if address.type == "IPAddress" and item.has("value") and not is_ip(address.value):
                item.refuse("value", f'"{address.value}" is not an IP address')
            if address in found and address.value and address.type in ("IPAddress", "Hostname"):
                item.refuse("value", f'"{address.value}" occurs twice')
            found.append(address)
    at_most(spec, "addresses", len(found), 16)
    return tuple(found)


def _listener(fields: Fields) -> Listener:
    with fields:
        name = text(fields, "name", SECTION_NAME, "the name of a listener", required=True)
        protocol = text(fields, "protocol", _PROTOCOL, "a protocol", required=True, longest=255)
        host = text(fields, "hostname", HOSTNAME, "a host name in lower case, without port")
        tls = None
        if fields.has("tls"):
            with fields.message("tls") as inner:
                tls = _tls(inner)
            if protocol in ("HTTP", "TCP", "UDP"):
                fields.refuse("tls", f"does not go with protocol {protocol}")
            elif protocol == "HTTPS" and tls.mode != "Terminate":
                fields.refuse("tls", "must have mode Terminate for protocol HTTPS")
        elif protocol == "TLS":
            fields.problems.add(fields.at, 'protocol TLS needs "tls" with a mode')
        fields.ignored("tls")
        if host and protocol in ("TCP", "UDP"):
            fields.refuse("hostname", f"does not go with protocol {protocol}")
        scope, requirements, kinds = _allowed(fields)
        return Listener(
            name=name,
            hostname=host,
            port=fields.port("port", required=True),
            protocol=protocol,
            tls=tls,
            namespaces=scope,
            selector=requirements,
            kinds=kinds,
            at=fields.at,
        )


def _allowed(fields: Fields) -> tuple[str, tuple[LabelRequirement, ...] | None, tuple[tuple[str, str], ...]]:
    scope, requirements = "Same", None
    kinds: list[tuple[str, str]] = []
    if fields.has("allowedRoutes"):
        with fields.message("allowedRoutes") as allowed:
            if allowed.has("namespaces"):
                with allowed.message("namespaces") as inner:
                    scope = inner.choice("from", ("All", "Selector", "Same"), "Same")
                    if inner.has("selector"):
                        requirements = selector(inner.message("selector"))
                    inner.ignored("selector")
            allowed.ignored("namespaces")
            for item in allowed.messages("kinds"):
                with item:
                    kinds.append((group(item, GROUP), kind(item, required=True)))
            at_most(allowed, "kinds", len(kinds), 8)
    fields.ignored("allowedRoutes")
    return scope, requirements, tuple(kinds)


def _tls(fields: Fields) -> ListenerTls:
    mode = fields.choice("mode", ("Terminate", "Passthrough"), "Terminate")
    options = dict(fields.text_map("options"))
    at_most(fields, "options", len(options), 16)
    certificates: list[ObjectRef] = []
    for item in fields.messages("certificateRefs"):
        with item:
            certificates.append(object_ref(item, group_default="", kind_default="Secret"))
    if mode == "Terminate" and not certificates and not options:
        fields.problems.add(fields.at, 'mode Terminate needs "certificateRefs" or "options"')
    return ListenerTls(mode=mode, certificates=tuple(certificates), options=options)


def parse_gateway_class(meta: Meta, spec: Fields) -> GatewayClass:
    """Read a GatewayClass's spec."""
    if len(text(spec, "description", None, "a text", shortest=0)) > 64:
        spec.refuse("description", "must have at most 64 characters")
    if spec.has("parametersRef"):
        with spec.message("parametersRef") as inner:
            group(inner, "", required=True)
            kind(inner, required=True)
            text(inner, "name", None, "a name", required=True)
            namespace(inner)
    spec.ignored("parametersRef")
    return GatewayClass(
        meta=meta,
        controller=text(spec, "controllerName", _CONTROLLER, "the name of a controller (domain/path)", required=True),
    )


def parse_reference_grant(meta: Meta, spec: Fields) -> ReferenceGrant:
    """Read a ReferenceGrant's spec."""
    origins: list[GrantFrom] = []
    targets: list[GrantTo] = []
    for item in spec.messages("from"):
        with item:
            origins.append(
                GrantFrom(
                    group=group(item, "", required=True),
                    kind=kind(item, required=True),
                    namespace=namespace(item, required=True),
                )
            )
    for item in spec.messages("to"):
        with item:
            targets.append(
                GrantTo(
                    group=group(item, "", required=True),
                    kind=kind(item, required=True),
                    name=text(item, "name", None, "a name"),
                )
            )
    for name, count in (("from", len(origins)), ("to", len(targets))):
        if not count:
            spec.problems.add(spec.at, f'"{name}" needs at least one item')
        at_most(spec, name, count, 16)
    return ReferenceGrant(meta=meta, origins=tuple(origins), targets=tuple(targets))


def parse_namespace(meta: Meta, body: Fields) -> Namespace:
    """Read a Namespace: its labels decide which routes a listener admits."""
    body.ignored("spec")
    if not is_namespace(meta.name):
        body.refuse("metadata", f'"{meta.name}" is not the name of a namespace: a DNS label in lower case')
    return Namespace(meta=meta)
