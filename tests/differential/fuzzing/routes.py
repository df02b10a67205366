"""Random VirtualServices, Gateways and routes of the Gateway API."""

from __future__ import annotations

import fnmatch
from typing import Any

from tests.differential.fuzzing.base import NETWORKING
from tests.differential.fuzzing.chance import NAMESPACES, Chance, Doc, Host

_GATEWAY_HOSTS = ("a.example.com", "b.example.com", "*.example.com", "shop.example.net", "*")
GATEWAY_API = "gateway.networking.k8s.io/v1"


def _string(chance: Chance, exact: str) -> Doc:
    return chance.one([{"exact": exact}, {"prefix": exact[:2]}, {"regex": f"{exact}.*"}])


def _match(chance: Chance, gateways: list[str], *, delegate: bool = False) -> Doc:
    path = chance.one(["/a", "/a/b", "/shop", "/"])
    match: Doc = {
        **chance.maybe(
            0.6,
            uri=chance.one(
                [{"exact": path}, {"prefix": path}, {"prefix": path}] + ([] if delegate else [{"regex": f"{path}.*"}])
            ),
        ),
        **chance.maybe(0.15, method=_string(chance, chance.one(["GET", "POST"]))),
        **chance.maybe(
            0.3, headers={chance.one(["x-a", "x-b", "end-user"]): chance.one([_string(chance, "value"), {}])}
        ),
        **chance.maybe(0.1, withoutHeaders={"x-c": chance.one([_string(chance, "value"), {}])}),
        **chance.maybe(0.15, queryParams={"q": chance.one([{"exact": "1"}, {"prefix": "p"}])}),
        **chance.maybe(0.1, authority=_string(chance, "a.example.com")),
        **chance.maybe(0.05, scheme={"exact": "http"}),
        **chance.maybe(0.1, ignoreUriCase=True),
        **chance.maybe(0.1, name="m"),
    }
    if not delegate:
        match.update(chance.maybe(0.15, port=chance.one([80, 8000, 9000, 8080])))
        match.update(chance.maybe(0.15, sourceLabels={"app": chance.one(["client", "web"])}))
        match.update(chance.maybe(0.1, sourceNamespace=chance.one(NAMESPACES[:2])))
        if gateways:
            match.update(chance.maybe(0.2, gateways=chance.some(gateways, 1, 1)))
    return match or {"uri": {"prefix": path}}


def _destination(chance: Chance, namespace: str, host: Host | None = None) -> Doc:
    host = host or chance.http_host()
    result: Doc = {"host": chance.host_as_written(host, namespace)}
    if host.subsets and chance.yes(0.5):
        result["subset"] = chance.one(host.subsets)
    elif chance.yes(0.05):
        result["subset"] = "nowhere"
    ports = host.http_ports()
    if ports and (len(host.ports) > 1 or chance.yes(0.5)):
        result["port"] = {"number": chance.one(ports)}
    return result


def _headers(chance: Chance) -> Doc:
    return {
        **chance.maybe(
            0.7,
            request={
                "set": {"x-set": "1"},
                **chance.maybe(0.5, add={"x-add": "2"}),
                **chance.maybe(0.3, remove=["x-r"]),
            },
        ),
        **chance.maybe(0.5, response={"add": {"x-out": "3"}, **chance.maybe(0.4, remove=["server"])}),
    }


def _extras(chance: Chance, namespace: str, action: str) -> Doc:
    cors = {"allowOrigins": [_string(chance, "https://x")], "allowMethods": ["GET"]}
    result: Doc = {
        **chance.maybe(0.15, headers=_headers(chance)),
        **chance.maybe(0.15, corsPolicy={**cors, **chance.maybe(0.4, maxAge="1h", allowCredentials=True)}),
    }
    if action != "route":
        return result
    rewrites = [
        {"uri": "/new"},
        {"authority": "else.example.com"},
        {"uri": "/", "authority": "x"},
        {"uriRegexRewrite": {"match": "/a", "rewrite": "/z"}},
    ]
    delay = {"fixedDelay": "1s", "percentage": {"value": 10}}
    abort = {"httpStatus": 503, "percentage": {"value": 5.5}}
    return {
        **result,
        **chance.maybe(0.25, timeout=chance.one(["1s", "0.5s"])),
        **chance.maybe(0.25, retries=_retries(chance)),
        **chance.maybe(0.15, rewrite=chance.one(rewrites)),
        **chance.maybe(0.1, mirror=_destination(chance, namespace), mirrorPercentage={"value": 20}),
        **chance.maybe(0.15, fault={"abort": abort, **chance.maybe(0.6, delay=delay)}),
    }


def _retries(chance: Chance) -> Doc:
    if chance.yes(0.2):
        return {"attempts": 0}
    attempts = {"attempts": chance.number(1, 3)}
    return {**attempts, **chance.maybe(0.5, perTryTimeout="0.2s"), **chance.maybe(0.5, retryOn="5xx,reset")}


def _rule(chance: Chance, namespace: str, gateways: list[str], delegates: list[Doc], *, delegate: bool = False) -> Doc:
    rule: Doc = {}
    if chance.yes(0.7):
        rule["match"] = [_match(chance, gateways, delegate=delegate) for _ in range(chance.number(1, 3))]
    rule.update(chance.maybe(0.3, name=chance.one(["first", "second"])))
    action = chance.one(["route"] * 6 + ["redirect", "direct"] + (["delegate"] * 4 if delegates else []))
    if action == "route":
        targets: list[Doc] = [{"destination": _destination(chance, namespace)} for _ in range(chance.number(1, 3))]
        if len(targets) > 1:
            for target in targets:
                target["weight"] = chance.number(1, 60)
                target.update(chance.maybe(0.2, headers=_headers(chance)))
        rule["route"] = targets
    elif action == "redirect":
        rule["redirect"] = {
            "uri": "/elsewhere",
            **chance.maybe(0.4, authority="c.example.com"),
            **chance.maybe(0.3, redirectCode=302),
            **chance.maybe(0.3, scheme="https"),
        }
    elif action == "direct":
        rule["directResponse"] = {"status": chance.one([200, 404, 503]), **chance.maybe(0.5, body={"string": "text"})}
    else:
        rule["delegate"] = chance.one(delegates)
        for match in rule.get("match", []):
            match.pop("uri", None) if "regex" in match.get("uri", {}) else None
            if not match:
                match["uri"] = {"prefix": "/"}
    if action != "delegate":
        rule.update(_extras(chance, namespace, action))
    return rule


def _delegates(chance: Chance, namespace: str) -> list[Doc]:
    found: list[Doc] = []
    for _ in range(chance.number(1, 2) if chance.yes(0.2) else 0):
        where = chance.one([namespace, *NAMESPACES[:2]])
        spec: Doc = {"http": [_rule(chance, where, [], [], delegate=True) for _ in range(chance.number(1, 3))]}
        spec.update(chance.maybe(0.1, exportTo=["."]))
        document = chance.add(NETWORKING, "VirtualService", spec, namespace=where)
        found.append(
            {
                "name": document["metadata"]["name"],
                **({"namespace": where} if where != namespace or chance.yes(0.5) else {}),
            }
        )
    return found


def virtual_service(chance: Chance) -> None:
    """A VirtualService of the mesh, of gateways, or of both."""
    namespace = chance.one(NAMESPACES[:2])
    at_gateway = bool(chance.gateways) and chance.yes(0.45)
    in_mesh = not at_gateway or chance.yes(0.4)
    gateways = (
        [f"{ns}/{n}" if ns != namespace or chance.yes(0.5) else n for ns, n in chance.gateways] if at_gateway else []
    )
    gateways = chance.some(gateways, 1, 2) if gateways else []
    names = [chance.host_as_written(host, namespace) for host in chance.some(chance.hosts, 1, 2)]
    if chance.yes(0.1):
        names.append(chance.one(["*.example.com", "*.other.svc.cluster.local", "*.mlmesh.svc.cluster.local"]))
    if at_gateway:
        some = chance.some(_GATEWAY_HOSTS[: 4 if in_mesh else 5], 1, 2)
        names = some if not in_mesh or chance.yes(0.5) else [*some, *names]
    spec: Doc = {"hosts": _apart(names)}
    if gateways:
        gateways = [*gateways, *(["mesh"] if in_mesh else [])]
        spec["gateways"] = gateways
    delegates = _delegates(chance, namespace)
    tls_targets = [host for host in chance.hosts if host.byte_ports()]
    if chance.yes(0.85) or not tls_targets:
        spec["http"] = [_rule(chance, namespace, gateways, delegates) for _ in range(chance.number(1, 4))]
    if tls_targets and ("http" not in spec or chance.yes(0.3)):
        _layer4(chance, spec, namespace, tls_targets)
    if not spec.keys() & {"http", "tls", "tcp"}:
        spec["http"] = [_rule(chance, namespace, gateways, delegates)]
    spec.update(chance.maybe(0.1, exportTo=chance.one([["."], ["*"], ["other"], [".", "third"]])))
    chance.add(NETWORKING, "VirtualService", spec, namespace=namespace)


def _apart(names: list[str]) -> list[str]:
    """Without names that another one of them is, or includes."""
    found: list[str] = []
    for name in names:
        if not any(fnmatch.fnmatch(name, other) or fnmatch.fnmatch(other, name) for other in found):
            found.append(name)
    return found


def _layer4(chance: Chance, spec: Doc, namespace: str, targets: list[Host]) -> None:
    host = chance.one(targets)
    port = chance.one(host.byte_ports())
    written = chance.host_as_written(host, namespace)
    spec["hosts"] = _apart([*spec["hosts"], written])
    route: list[Any] = [{"destination": {"host": written, "port": {"number": port}}}]
    if host.subsets and chance.yes(0.6):
        route[0]["destination"]["subset"] = chance.one(host.subsets)
    if chance.yes(0.3):
        other = chance.one(targets)
        route.append(
            {
                "destination": {
                    "host": chance.host_as_written(other, namespace),
                    "port": {"number": other.byte_ports()[0]},
                }
            }
        )
        for item, weight in zip(route, (30, 70), strict=True):
            item["weight"] = weight
    if host.ports[port] == "tcp":
        match: Doc = {
            **chance.maybe(0.5, port=port),
            **chance.maybe(0.3, sourceLabels={"app": "client"}),
            **chance.maybe(0.2, gateways=["mesh"]),
        }
        spec["tcp"] = [{**({"match": [match]} if match else {}), "route": route}]
    elif not any(name == "*" for name in spec["hosts"]):
        sni = [name for name in spec["hosts"] if "." in name][:1] or ["s.example.com"]
        if sni == ["s.example.com"]:
            spec["hosts"] = _apart([*spec["hosts"], *sni])
        spec["tls"] = [{"match": [{"sniHosts": sni, **chance.maybe(0.5, port=port)}], "route": route}]


def gateway(chance: Chance) -> None:
    """A Gateway of servers at the one gateway workload."""
    namespace = chance.one(["mlmesh", "mlmesh", "other"])
    name = chance.name("gw")
    servers: list[Doc] = []
    for number in chance.some([8080, 8081, 8443, 8444], 1, 3):
        hosts = chance.some(_GATEWAY_HOSTS, 1, 2)
        if "*" in hosts:
            hosts = ["*"]
        if chance.yes(0.3):
            hosts = [f"{chance.one(['*', '.', 'mlmesh', 'other'])}/{host}" for host in hosts]
        server: Doc = {"hosts": hosts, "port": {"number": number, "name": f"p{number}", "protocol": "HTTP"}}
        if number >= 8443:
            shape = chance.one(["SIMPLE", "MUTUAL", "PASSTHROUGH", "ISTIO_MUTUAL"])
            server["port"]["protocol"] = "TLS" if shape == "PASSTHROUGH" else "HTTPS"
            server["tls"] = {"mode": shape}
            if shape in ("SIMPLE", "MUTUAL"):
                server["tls"]["credentialName"] = chance.one(["cert", "other-cert"])
                server["tls"].update(chance.maybe(0.2, minProtocolVersion="TLSV1_3"))
        elif chance.yes(0.2):
            server["tls"] = {"httpsRedirect": True}
        servers.append(server)
    chance.add(
        NETWORKING, "Gateway", {"selector": {"istio": "gateway"}, "servers": servers}, name=name, namespace=namespace
    )
    chance.gateways.append((namespace, name))


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
