"""Random Gateways, and routes of the Gateway API."""

from __future__ import annotations

from tests.differential.fuzzing.chance import NETWORKING, Chance, Doc

HOSTS = ("a.example.com", "b.example.com", "*.example.com", "shop.example.net", "*.net", "*")
GATEWAY_API = "gateway.networking.k8s.io/v1"
_CIPHERS = ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-GCM-SHA384"]


def gateway(chance: Chance) -> None:
    """A Gateway of servers at the one gateway workload."""
    namespace = chance.one(["mlmesh", "mlmesh", "other", "third"])
    name = chance.name("gw")
    servers = [_server(chance, number) for number in chance.some([8080, 8081, 8443, 8444, 9443, 80, 443], 1, 3)]
    if chance.yes(0.2):
        # A second server of a port, for other hosts.
        first = servers[0]
        other = _server(chance, first["port"]["number"])
        other["port"]["name"] += "-more"
        if {host.rpartition("/")[2] for host in first["hosts"]}.isdisjoint(
            h.rpartition("/")[2] for h in other["hosts"]
        ):
            servers.append(other)
    spec = {"selector": {"istio": "gateway"}, "servers": servers}
    chance.add(NETWORKING, "Gateway", spec, name=name, namespace=namespace)
    chance.gateways.append((namespace, name))


def _server(chance: Chance, number: int) -> Doc:
    hosts = chance.some(HOSTS, 1, 2)
    if "*" in hosts:
        hosts = ["*"]
    if chance.yes(0.3):
        hosts = [f"{chance.one(['*', '.', 'mlmesh', 'other'])}/{host}" for host in hosts]
    server: Doc = {"hosts": hosts, "port": {"number": number, "name": f"p{number}", "protocol": "HTTP"}}
    if number == 9443:
        server["port"]["protocol"] = chance.one(["TCP", "TLS"])
        if server["port"]["protocol"] == "TCP":
            return server
        server["tls"] = chance.one(
            [{"mode": "PASSTHROUGH"}, {"mode": "AUTO_PASSTHROUGH"}, {"mode": "SIMPLE", "credentialName": "cert"}]
        )
    elif number in (443, 8443, 8444):
        server.update(_secure(chance))
        server["port"]["protocol"] = "TLS" if server["tls"]["mode"] == "PASSTHROUGH" else "HTTPS"
    elif chance.yes(0.2):
        server["tls"] = {"httpsRedirect": True}
    elif chance.yes(0.25):
        server["port"]["protocol"] = chance.one(["HTTP2", "GRPC"])
    server.update(chance.maybe(0.15, name=f"s{number}{chance.number(1, 99)}"))
    return server


def _secure(chance: Chance) -> Doc:
    mode = chance.one(["SIMPLE", "SIMPLE", "MUTUAL", "OPTIONAL_MUTUAL", "PASSTHROUGH", "ISTIO_MUTUAL"])
    tls: Doc = {"mode": mode}
    if mode in ("SIMPLE", "MUTUAL", "OPTIONAL_MUTUAL"):
        files = {"serverCertificate": "/etc/c.pem", "privateKey": "/etc/k.pem"}
        if mode != "SIMPLE":
            files["caCertificates"] = "/etc/ca.pem"
        tls.update(chance.one([{"credentialName": "cert"}, {"credentialName": "other-cert"}, files]))
        tls.update(chance.maybe(0.2, minProtocolVersion=chance.one(["TLSV1_2", "TLSV1_3"])))
        tls.update(chance.maybe(0.15, maxProtocolVersion="TLSV1_3"))
        tls.update(chance.maybe(0.15, cipherSuites=_CIPHERS))
        if mode != "SIMPLE":
            tls.update(chance.maybe(0.3, subjectAltNames=["c.example.com"]))
    return {"tls": tls}


def http_route(chance: Chance) -> None:
    """An HTTPRoute of a Service of its namespace, as GAMMA has it."""
    own = [host for host in chance.hosts if host.short and host.http_ports() and host.labels]
    parent = chance.one(own)
    namespace = parent.namespace
    targets = [host for host in own if host.namespace == namespace]
    rules = []
    for _ in range(chance.number(1, 3)):
        refs: list[Doc] = []
        for _ in range(chance.number(1, 2)):
            host = chance.one(targets)
            refs.append(
                {
                    "name": host.short,
                    "port": chance.one(host.http_ports()),
                    **chance.maybe(0.5, weight=chance.number(0, 9)),
                }
            )
        matches: list[Doc] = [
            {
                "path": {"type": chance.one(["Exact", "PathPrefix"]), "value": chance.one(["/a", "/a/b", "/"])},
                **chance.maybe(0.3, headers=[{"name": "x-a", "value": "1"}]),
                **chance.maybe(0.3, method="GET"),
                **chance.maybe(0.2, queryParams=[{"name": "q", "value": "1"}]),
            }
            for _ in range(chance.number(1, 2))
        ]
        filters = [{"type": "RequestHeaderModifier", "requestHeaderModifier": {"set": [{"name": "x", "value": "v"}]}}]
        rules.append(
            {
                **({"matches": matches} if chance.yes(0.8) else {}),
                "backendRefs": refs,
                **chance.maybe(0.3, filters=filters),
                **chance.maybe(0.2, timeouts={"request": "2s"}),
            }
        )
    ref = {
        "group": "",
        "kind": "Service",
        "name": parent.short,
        **chance.maybe(0.5, port=chance.one(parent.http_ports())),
    }
    chance.add(GATEWAY_API, "HTTPRoute", {"parentRefs": [ref], "rules": rules}, namespace=namespace)
