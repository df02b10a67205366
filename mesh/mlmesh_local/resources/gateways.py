"""Gateway: https://istio.io/latest/docs/reference/config/networking/gateway/."""

from __future__ import annotations

from typing import Literal, cast

from mlmesh_local.resources.checked import part
from mlmesh_local.resources.fields import Fields, is_host
from mlmesh_local.resources.model import (
    Gateway,
    GatewayServer,
    Meta,
    ServerTls,
)

_TCP_LIKE = ("TCP", "TLS", "MONGO", "MYSQL", "REDIS", "UDP")
_TLS_VERSIONS = ("TLS_AUTO", "TLSV1_2", "TLSV1_3")


def parse_gateway(meta: Meta, spec: Fields) -> Gateway:
    """Read a Gateway's spec."""
    selector = spec.text_map("selector")
    servers = tuple(_server(item, meta.namespace) for item in spec.messages("servers"))
    if not servers:
        spec.problems.add(spec.at, '"servers" needs at least one server')
    names = [server.port_name for server in servers]
    for server in servers:
        if names.count(server.port_name) > 1:
            spec.problems.add(server.at, f'the port name "{server.port_name}" occurs twice')
    return Gateway(meta=meta, selector=selector, servers=servers)


def _server(fields: Fields, namespace: str) -> GatewayServer:
    with fields:
        fields.unsupported("bind", "defaultEndpoint", "name")
        number, name, protocol = 0, "", "HTTP"
        if fields.required("port"):
            with fields.message("port") as inner:
                number = inner.port("number", required=True)
                name = inner.text("name", required=True)
                protocol = _protocol(inner, ("HTTP", "HTTP2", "GRPC", "GRPC-WEB", "HTTPS"), _TCP_LIKE)
                inner.unsupported("targetPort", why="Istio dropped it; the Service has the target port")
        fields.ignored("port")
        tls = part(fields, "tls", _server_tls)
        if protocol == "HTTPS" and tls is None:
            fields.refuse("port", 'protocol HTTPS needs "tls"')
        if protocol != "HTTPS" and tls is not None:
            fields.refuse("tls", f"goes with protocol HTTPS, not {protocol}")
        hosts = _server_hosts(fields, namespace)
        return GatewayServer(
            port=number,
            port_name=name,
            protocol=protocol,
            hosts=tuple(host for _, host in hosts),
            host_namespaces=tuple(bound for bound, _ in hosts),
            tls=tls,
            at=fields.at,
        )


def _server_hosts(fields: Fields, own_namespace: str) -> list[tuple[str, str]]:
    """Namespace ("*" for all) and host of each; "./" is the gateway's own namespace."""
    hosts: list[tuple[str, str]] = []
    for text in fields.texts("hosts"):
        namespace, _, host = text.rpartition("/")
        if is_host(host):
            hosts.append((own_namespace if namespace == "." else namespace or "*", host.lower()))
        else:
            fields.refuse("hosts", f'"{host}" is not a host name')
    if not hosts and not fields.has("hosts"):
        fields.required("hosts")
    return hosts


def _server_tls(fields: Fields) -> ServerTls:
    fields.unsupported(
        "httpsRedirect",
        "serverCertificate",
        "privateKey",
        "caCertificates",
        "caCrl",
        "tlsCertificates",
        "credentialNames",
        "caCertCredentialName",
        "cipherSuites",
        "verifyCertificateSpki",
        "verifyCertificateHash",
        why="the laptop mesh takes credentialName",
    )
    mode = fields.choice(
        "mode",
        ("SIMPLE", "MUTUAL", "ISTIO_MUTUAL", "OPTIONAL_MUTUAL"),
        "SIMPLE",
        unsupported=("PASSTHROUGH", "AUTO_PASSTHROUGH"),
    )
    credential = fields.text("credentialName")
    if mode == "ISTIO_MUTUAL":
        if credential:
            fields.refuse("credentialName", "does not go with mode ISTIO_MUTUAL")
    elif not credential:
        fields.problems.add(fields.at, f'mode {mode} needs "credentialName"')
    return ServerTls(
        mode=cast('Literal["SIMPLE", "MUTUAL", "ISTIO_MUTUAL", "OPTIONAL_MUTUAL"]', mode),
        credential_name=credential,
        subject_alt_names=fields.texts("subjectAltNames"),
        min_version=fields.choice("minProtocolVersion", _TLS_VERSIONS, "TLSV1_2"),
        max_version=fields.choice("maxProtocolVersion", _TLS_VERSIONS, "TLS_AUTO"),
    )


def _protocol(fields: Fields, known: tuple[str, ...], unsupported: tuple[str, ...]) -> str:
    text = fields.text("protocol", required=True).upper()
    if text in known:
        return text
    if text in unsupported:
        fields.refuse("protocol", f'"{text}" is not supported by the laptop mesh; use one of {", ".join(known)}')
    elif text:
        fields.refuse("protocol", f'"{text}" is not one of {", ".join(known)}')
    return "HTTP"
