"""Sidecar: https://istio.io/latest/docs/reference/config/networking/sidecar/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from mlmesh_local.resources.checked import host, part, selector
from mlmesh_local.resources.domains import domain_problem, is_ip, is_label
from mlmesh_local.resources.entries import UNIX, protocol
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.gateways import server_tls
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_routes import Destination
from mlmesh_local.resources.model_sidecars import EgressHost, EgressListener, IngressListener, Sidecar
from mlmesh_local.resources.pools import connection_pool
from mlmesh_local.resources.protocols import is_tls

_CAPTURE = ("DEFAULT", "IPTABLES", "NONE")
_OWN_ADDRESSES = ("", "127.0.0.1", "0.0.0.0", "::1", "::")  # noqa: S104  (what a field may say)
_PARTS = ("egress", "ingress", "outboundTrafficPolicy", "inboundConnectionPool")


def parse_sidecar(meta: Meta, spec: Fields) -> Sidecar:
    """Read a Sidecar's spec."""
    if not any(spec.has(name) for name in _PARTS[2:]) and not (spec.items("egress") or spec.items("ingress")):
        spec.problems.add(spec.at, "must have at least one of " + ", ".join(f'"{name}"' for name in _PARTS))
    mode, proxy = part(spec, "outboundTrafficPolicy", _outbound) or ("", None)
    egress = tuple(_egress(item) for item in spec.messages("egress"))
    _check_egress(spec, egress)
    ingress = tuple(_ingress(item) for item in spec.messages("ingress"))
    for number in _twice([listener.port for listener in ingress]):
        spec.refuse("ingress", f"the port {number} occurs twice")
    return Sidecar(
        meta=meta,
        selector=selector(spec, "workloadSelector", "labels"),
        ingress=ingress,
        egress=egress,
        pool=part(spec, "inboundConnectionPool", connection_pool),
        outbound=cast('Literal["", "ALLOW_ANY", "REGISTRY_ONLY"]', mode),
        egress_proxy=proxy,
    )


def _twice(numbers: Sequence[int | None]) -> list[int]:
    return sorted({number for number in numbers if number and numbers.count(number) > 1})


def _check_egress(spec: Fields, listeners: Sequence[EgressListener]) -> None:
    for place, listener in enumerate(listeners):
        if listener.port is None and place < len(listeners) - 1:
            spec.refuse("egress", "the listener without a port must be the last")
    for number in _twice([listener.port for listener in listeners]):
        spec.refuse("egress", f"the port {number} occurs twice")
    sockets = [listener.bind for listener in listeners if listener.port == 0]
    for socket in sorted({socket for socket in sockets if sockets.count(socket) > 1}):
        spec.refuse("egress", f'the socket "{socket}" occurs twice')


def _outbound(fields: Fields) -> tuple[str, Destination | None]:
    mode = fields.choice("mode", ("REGISTRY_ONLY", "ALLOW_ANY"), "REGISTRY_ONLY")
    proxy = part(fields, "egressProxy", _egress_proxy)
    if proxy is not None and mode != "ALLOW_ANY":
        fields.refuse("egressProxy", "goes with mode ALLOW_ANY only")
    return mode, proxy


def _egress_proxy(fields: Fields) -> Destination:
    name = host(fields, "host", wildcard=False)
    number = 0
    if fields.required("port"):
        with fields.message("port") as inner:
            number = inner.port("number", required=True)
    fields.ignored("port")
    subset = fields.text("subset")
    if subset and not is_label(subset):
        fields.refuse("subset", f'"{subset}" is not a DNS label')
    return Destination(host=name, subset=subset, port=number, at=fields.at)


def _port(fields: Fields, *, unix: bool) -> tuple[int, str, Fields]:
    """Number and name of a listener's port; 0 is one on a unix socket, if it may be one."""
    with fields.message("port") as inner:
        number = inner.integer("number", low=0 if unix else 1, high=65535)
        if number is None and not inner.has("number"):
            number = 0
            if not unix:
                inner.required("number")
        name = inner.text("name")
        if name and not is_label(name):
            inner.refuse("name", f'"{name}" is not a DNS label')
        if inner.integer("targetPort"):
            inner.refuse("targetPort", "means nothing here; use defaultEndpoint")
        inner.ignored("protocol")
        return number or 0, name, inner


def _ingress(fields: Fields) -> IngressListener:
    with fields:
        fields.required("port")
        number, name, port = _port(fields, unix=False)
        declared = protocol(port, "protocol")
        bind = fields.text("bind")
        if bind and not is_ip(bind):
            fields.refuse("bind", f'"{bind}" is not an IP address')
        fields.choice("captureMode", _CAPTURE, "DEFAULT")
        endpoint = fields.text("defaultEndpoint")
        problem = _endpoint_problem(endpoint) if endpoint else ""
        if problem:
            fields.refuse("defaultEndpoint", problem)
        if fields.has("tls"):
            if not is_tls(declared):
                fields.refuse("tls", "goes with protocol HTTPS or TLS")
            with fields.message("tls") as tls:
                _tls(tls)
        return IngressListener(
            port=number,
            name=name,
            protocol=declared,
            endpoint=endpoint,
            pool=part(fields, "connectionPool", connection_pool),
        )


def _tls(fields: Fields) -> None:
    """TLS of an ingress listener is checked, and then has no effect: in Istio, too, unless it is told otherwise."""
    tls = server_tls(fields)
    for name in ("subjectAltNames", "httpsRedirect", "credentialName", "credentialNames", "tlsCertificates"):
        node = fields.raw(name)
        if node is not None and node.value:
            fields.refuse(name, "does not go with a Sidecar")
    if tls.mode in ("ISTIO_MUTUAL", "AUTO_PASSTHROUGH"):
        fields.refuse("mode", f'"{tls.mode}" does not go with a Sidecar; use SIMPLE, MUTUAL or OPTIONAL_MUTUAL')


def _endpoint_problem(text: str) -> str:
    if text.startswith(UNIX):
        path = text.removeprefix(UNIX)
        fine = path.startswith("@") or (path.startswith("/") and not path.endswith("/"))
        return "" if fine else f'"{path}" is not the absolute path of a file'
    address, colon, number = text.rpartition(":")
    fine = bool(colon) and number.isdigit() and 1 <= int(number) <= 65535 and address.strip("[]") in _OWN_ADDRESSES
    return "" if fine else f'"{text}" must be 127.0.0.1:PORT, 0.0.0.0:PORT, [::1]:PORT, [::]:PORT or unix:///PATH'


def _egress(fields: Fields) -> EgressListener:
    with fields:
        capture = fields.choice("captureMode", _CAPTURE, "DEFAULT")
        bind = fields.text("bind")
        hosts = _hosts(fields)
        if not fields.has("port"):
            fields.ignored("port")
            return EgressListener(hosts=hosts, bind=bind)
        number, name, port = _port(fields, unix=True)
        declared = protocol(port, "protocol")
        if declared == "http-proxy":
            port.refuse("protocol", "not supported by the laptop mesh: applications call their sidecar by host name")
        if number == 0:
            problem = _endpoint_problem(bind) if bind.startswith(UNIX) else "a port 0 needs a unix socket: unix:///PATH"
            if problem:
                fields.refuse("bind", problem)
            if capture == "IPTABLES":
                fields.refuse("captureMode", "a unix socket is not captured")
            if not problem:
                fields.refuse("bind", "not supported by the laptop mesh: applications call by TCP; use a port")
        elif bind and not is_ip(bind):
            fields.refuse("bind", f'"{bind}" is not an IP address')
        return EgressListener(hosts=hosts, port=number, name=name, protocol=declared, bind=bind)


def _hosts(fields: Fields) -> tuple[EgressHost, ...]:
    hosts: list[EgressHost] = []
    for text in fields.texts("hosts"):
        scope, slash, name = text.partition("/")
        bare = scope.removeprefix("~")
        problem = domain_problem(name, wildcard=True)
        if not slash:
            problem = f'"{text}" must be NAMESPACE/HOST, such as ./* or shop/web.shop.svc.cluster.local'
        if not problem and name != "*" and "." not in name:
            problem = f'"{name}" is a short name; write it with its domain'
        if not problem and "*" in name and len(name) > 1 and not name.startswith("*."):
            problem = f'"{name}": a wildcard stands for whole labels'
        if not problem and (not scope or (bare not in ("", "*", ".") and not is_label(bare))):
            problem = f'"{scope}" is not a namespace'
        if problem:
            fields.refuse("hosts", problem)
            continue
        excluded = scope.startswith("~")
        where = (bare or "*") if excluded else scope
        hosts.append(EgressHost(namespace=where, host=name, excluded=excluded))
    if not fields.has("hosts"):
        fields.required("hosts")
    elif not fields.items("hosts"):
        fields.refuse("hosts", "needs at least one host")
    return tuple(hosts)
