"""Gateway: https://istio.io/latest/docs/reference/config/networking/gateway/.

What is refused is what Istio's validation refuses: pkg/config/validation/validation.go and the rules of its CRD.
"""

from __future__ import annotations

from typing import cast

from mlmesh_local.resources.checked import part
from mlmesh_local.resources.domains import domain_problem, is_ip, is_label
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_gateways import Gateway, GatewayServer, ServerTls, ServerTlsMode

PROTOCOLS = (
    "HTTP",
    "HTTPS",
    "GRPC",
    "GRPC-WEB",
    "HTTP2",
    "MONGO",
    "TCP",
    "TLS",
    "MYSQL",
    "REDIS",
    "UDP",
    "HTTP_PROXY",
)
UNIX = "unix://"
_GATEWAY_API = "internal.istio.io/gateway-semantics"
_TLS_VERSIONS = ("TLS_AUTO", "TLSV1_0", "TLSV1_1", "TLSV1_2", "TLSV1_3")
_MODES: tuple[ServerTlsMode, ...] = (
    "PASSTHROUGH",
    "SIMPLE",
    "MUTUAL",
    "AUTO_PASSTHROUGH",
    "ISTIO_MUTUAL",
    "OPTIONAL_MUTUAL",
)
_CERTIFICATES_MAX = 2


def parse_gateway(meta: Meta, spec: Fields) -> Gateway:
    """Read a Gateway's spec."""
    converted = _GATEWAY_API in meta.annotations
    if not converted and not is_label(meta.name):
        spec.problems.add(meta.at, f'"{meta.name}" is not the name of a gateway: it must be a DNS label')
    selector = spec.text_map("selector")
    servers = tuple(_server(item, meta.namespace, converted=converted) for item in spec.messages("servers"))
    if not servers:
        spec.problems.add(spec.at, '"servers" needs at least one server')
    names = [server.port_name for server in servers]
    for server in servers:
        if names.count(server.port_name) > 1:
            spec.problems.add(server.at, f'the port name "{server.port_name}" occurs twice')
    return Gateway(meta=meta, selector=selector, servers=servers)


def _server(fields: Fields, namespace: str, *, converted: bool) -> GatewayServer:
    with fields:
        # Istio reads it nowhere.
        fields.ignored("defaultEndpoint")
        bind = _bind(fields)
        number, name, protocol = 0, "", "HTTP"
        if fields.required("port"):
            with fields.message("port") as inner:
                number = _number(inner, unix=bind.startswith(UNIX))
                name = inner.text("name", required=True)
                protocol = _protocol(inner)
                if inner.integer("targetPort"):
                    inner.refuse("targetPort", "means nothing at gateways; the Service has the target port")
        fields.ignored("port")
        tls = part(fields, "tls", lambda inner: server_tls(inner, converted=converted))
        _check_tls(fields, protocol, tls)
        hosts = _server_hosts(fields, namespace, converted=converted)
        return GatewayServer(
            port=number,
            port_name=name,
            protocol=protocol,
            hosts=tuple(host for _, host in hosts),
            host_namespaces=tuple(bound for bound, _ in hosts),
            tls=tls,
            bind=bind,
            name=fields.text("name"),
            at=fields.at,
        )


def _bind(fields: Fields) -> str:
    bind = fields.text("bind")
    if bind.startswith(UNIX):
        path = bind.removeprefix(UNIX)
        if not path.startswith("@") and (not path.startswith("/") or path.endswith("/")):
            fields.refuse("bind", f'"{path}" is not the path of a socket')
    elif bind and not is_ip(bind):
        fields.refuse("bind", f'"{bind}" is neither an IP address nor {UNIX} with a path')
    return bind


def _number(fields: Fields, *, unix: bool) -> int:
    if not unix:
        return fields.port("number", required=True)
    number = fields.integer("number", low=0, high=65535) or 0
    if number:
        fields.refuse("number", "must be 0 for a socket of the file system")
    return 0


def _protocol(fields: Fields) -> str:
    text = fields.text("protocol", required=True).upper()
    if text and text not in PROTOCOLS:
        fields.refuse("protocol", f'"{text}" is not one of {", ".join(PROTOCOLS)}')
    return text if text in PROTOCOLS else "HTTP"


def _check_tls(fields: Fields, protocol: str, tls: ServerTls | None) -> None:
    if protocol in ("HTTPS", "TLS"):
        if tls is None:
            fields.refuse("port", f'protocol {protocol} needs "tls"')
        return
    if tls is None:
        return
    if protocol in ("HTTP", "HTTP2", "GRPC", "GRPC-WEB", "HTTP_PROXY"):
        inner = fields.message("tls")
        pair = inner.has("serverCertificate") or inner.has("privateKey")
        if not tls.passes_through or pair or tls.ca_certificates:
            fields.refuse("tls", f"of protocol {protocol} only httpsRedirect can be set")
    else:
        fields.refuse("tls", f"goes with protocol HTTPS or TLS, not {protocol}")


def _server_hosts(fields: Fields, own_namespace: str, *, converted: bool) -> list[tuple[str, str]]:
    """Namespace ("*" for all) and host of each; "./" is the gateway's own namespace."""
    hosts: list[tuple[str, str]] = []
    for text in fields.texts("hosts"):
        namespace, slash, host = text.rpartition("/")
        nobody = namespace == "~" and converted
        if slash and namespace not in ("*", ".") and not nobody and not is_label(namespace):
            fields.refuse("hosts", f'"{namespace}" is not the name of a namespace')
        problem = "" if converted else _host_problem(host)
        if problem:
            fields.refuse("hosts", problem)
        else:
            hosts.append((own_namespace if namespace == "." else namespace or "*", host.lower()))
    if not fields.items("hosts"):
        fields.problems.add(fields.at, '"hosts" needs at least one host')
    return hosts


def _host_problem(host: str) -> str:
    if host == "*":
        return ""
    if "." not in host:
        return f'"{host}" is a short name; give the full host name'
    if is_ip(host):
        return ""
    if "*" in host and not host.startswith("*."):
        return f'"{host}": a wildcard is a whole label, such as *.example.com'
    return domain_problem(host, wildcard=True)


def server_tls(fields: Fields, *, converted: bool = False) -> ServerTls:
    """Read `tls` of a server, or of a Sidecar's ingress listener.

    ``converted``: of a listener of the Gateway API, which Istio does not validate again; it may lack certificates.
    """
    mode = cast("ServerTlsMode", fields.choice("mode", _MODES, "PASSTHROUGH"))
    pair = (fields.text("serverCertificate"), fields.text("privateKey"))
    listed = tuple(_certificate(item, mode) for item in fields.messages("tlsCertificates"))
    tls = ServerTls(
        mode=mode,
        https_redirect=fields.boolean("httpsRedirect"),
        credential_name=fields.text("credentialName"),
        credential_names=fields.texts("credentialNames"),
        ca_credential_name=fields.text("caCertCredentialName"),
        certificates=listed or ((pair,) if any(pair) else ()),
        ca_certificates=fields.text("caCertificates"),
        ca_crl=fields.text("caCrl"),
        subject_alt_names=fields.texts("subjectAltNames"),
        verify_spki=fields.texts("verifyCertificateSpki"),
        verify_hash=fields.texts("verifyCertificateHash"),
        min_version=fields.choice("minProtocolVersion", _TLS_VERSIONS, "TLS_AUTO"),
        max_version=fields.choice("maxProtocolVersion", _TLS_VERSIONS, "TLS_AUTO"),
        # Istio leaves out what it does not know; so does translation.
        cipher_suites=fields.texts("cipherSuites"),
        insecure_skip_verify=fields.boolean("insecureSkipVerify"),
    )
    for name in ("credentialNames", "tlsCertificates"):
        if fields.has(name) and not 1 <= len(fields.items(name)) <= _CERTIFICATES_MAX:
            fields.refuse(name, f"must have 1 or {_CERTIFICATES_MAX} entries")
    if mode == "ISTIO_MUTUAL":
        _check_mesh_certificates(fields)
    elif not converted:
        _check_certificates(fields, tls, pair)
    return tls


def _certificate(fields: Fields, mode: str) -> tuple[str, str]:
    with fields:
        # Istio's own validation is all that reads it.
        fields.text("caCertificates")
        found = (fields.text("serverCertificate"), fields.text("privateKey"))
        if mode in ("SIMPLE", "MUTUAL", "OPTIONAL_MUTUAL"):
            for name, value in zip(("serverCertificate", "privateKey"), found, strict=True):
                if not value:
                    fields.problems.add(fields.at, f'"{name}" is required')
        return found


def _check_mesh_certificates(fields: Fields) -> None:
    for name in (
        "serverCertificate",
        "privateKey",
        "caCertificates",
        "tlsCertificates",
        "credentialName",
        "credentialNames",
    ):
        if fields.has(name):
            fields.refuse(name, "does not go with mode ISTIO_MUTUAL")


def _check_certificates(fields: Fields, tls: ServerTls, pair: tuple[str, str]) -> None:
    sources = {
        "serverCertificate": all(pair),
        "credentialName": bool(tls.credential_name),
        "credentialNames": bool(tls.credential_names),
        "tlsCertificates": fields.has("tlsCertificates"),
    }
    given = [name for name, there in sources.items() if there]
    if len(given) > 1:
        fields.refuse(given[1], f'cannot be set together with "{given[0]}"')
    if tls.mode not in ("SIMPLE", "MUTUAL", "OPTIONAL_MUTUAL") or tls.credentials:
        return
    if tls.mode != "SIMPLE" and not tls.ca_certificates:
        fields.problems.add(fields.at, f'mode {tls.mode} needs "caCertificates" or "credentialName"')
    if not fields.has("tlsCertificates"):
        for name, value in zip(("serverCertificate", "privateKey"), pair, strict=True):
            if not value:
                fields.problems.add(fields.at, f'mode {tls.mode} needs "{name}" or "credentialName"')
    if tls.ca_crl and tls.mode == "SIMPLE":
        fields.refuse("caCrl", "does not go with mode SIMPLE")
