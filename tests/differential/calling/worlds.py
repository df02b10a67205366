"""Random worlds in which every call can be made on one machine, and random calls in them.

Services and workloads are the same in all worlds, so that their Envoys start once; all else is drawn by the generators
of tests/differential/fuzzing. What chance or time would decide is made certain: faults and mirrors are of all calls or
none, timeouts are longer than a busy machine needs.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from mlmesh_local.explain.signatures import decoded
from tests.differential.calling.meshes import OUTSIDE_PORT
from tests.differential.fuzzing import destinations, entries, gateways, routes, security
from tests.differential.fuzzing.chance import NAMESPACES, Chance, Doc, Host
from tests.support.tokens import Issuer

TIMEOUT_S = 3.0
ISSUERS = ("issuer", "second", "third")
_PARTS: tuple[Callable[[Chance], None], ...] = (
    *[routes.virtual_service] * 7,
    gateways.http_route,
    *[gateways.gateway] * 2,
    *[destinations.destination_rule] * 3,
    *[security.peer_authentication] * 2,
    *[security.authorization_policy] * 3,
    *[security.request_authentication] * 2,
    entries.sidecar,
)
_FIRST = (gateways.gateway, destinations.destination_rule)


def _workload(name: str, namespace: str, labels: Mapping[str, str], ports: list[int], account: str) -> Iterator[Doc]:
    meta = {"namespace": namespace}
    yield {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, **meta}}
    container = {"name": "app", "command": ["serve"], "ports": [{"containerPort": port} for port in ports]}
    template = {
        "metadata": {"labels": dict(labels)},
        "spec": {"serviceAccountName": account, "containers": [container]},
    }
    spec = {"selector": {"matchLabels": dict(labels)}, "template": template}
    yield {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, **meta}, "spec": spec}


_HOSTS = {
    ("web", "mlmesh"): {8000: "http", 9000: "grpc"},
    ("api", "other"): {8000: "http", 9000: "grpc"},
    ("db", "mlmesh"): {8000: "http2", 7001: "tcp"},
}
_TARGETS = {"api": 10000}


def fixed() -> str:
    """Services and workloads, the same in every world."""
    found: list[Doc] = []
    for (app, namespace), ports in _HOSTS.items():
        written = [
            {"name": f"{protocol}-{number}", "port": number, "targetPort": number + _TARGETS.get(app, 0)}
            for number, protocol in ports.items()
        ]
        spec = {"selector": {"app": app}, "ports": written}
        meta = {"name": app, "namespace": namespace}
        found.append({"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})
        targets = [number + _TARGETS.get(app, 0) for number in ports]
        for version in ("v1", "v2") if app == "web" else ("v1",):
            found += _workload(
                f"{app}-{version}", namespace, {"app": app, "version": version}, targets, f"{app}-account"
            )
    found += _workload("client", "mlmesh", {"app": "client", "team": "red"}, [], "client")
    found += _workload("stranger", "other", {"app": "client", "team": "blue"}, [], "stranger")
    gateway = list(_workload("gateway", "third", {"istio": "gateway"}, [], "gateway"))
    gateway[1]["spec"]["template"]["metadata"]["annotations"] = {"inject.istio.io/templates": "gateway"}
    gateway[1]["spec"]["template"]["spec"]["containers"] = [{"name": "istio-proxy", "image": "auto"}]
    # Two versions have one ServiceAccount.
    once = {json.dumps([document["kind"], document["metadata"]]): document for document in [*found, *gateway]}
    return yaml.safe_dump_all(json.loads(json.dumps([*once.values()])), sort_keys=False)


@dataclass(frozen=True, kw_only=True)
class RandomCall:
    """One call. ``client`` is a workload, or "" for somebody outside at the gateway; ``grpc`` or HTTP/1.1."""

    client: str
    host: str
    port: int
    path: str
    method: str
    grpc: bool
    headers: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> str:
        """In one line, tokens as their claims."""
        return re.sub(r"[\w-]+\.([\w-]{8,})\.[\w-]+", _claims, f"{self}")


def _claims(token: re.Match[str]) -> str:
    return decoded(token[1]).decode()


def world(seed: int, outside: str, issuers: Mapping[str, Issuer]) -> tuple[str, list[RandomCall]]:
    """The documents of a seed, and calls in their world."""
    chance = Chance(seed)
    chance.hosts += [
        Host(name=f"{app}.{ns}.svc.cluster.local", short=app, namespace=ns, ports=dict(ports), labels={"app": app})
        for (app, ns), ports in _HOSTS.items()
    ]
    if chance.yes(0.5):
        _entry(chance, outside)
    parts = [chance.one(_PARTS) for _ in range(chance.number(3, 8))]
    for part in sorted(parts, key=lambda part: _FIRST.index(part) if part in _FIRST else len(_FIRST)):
        part(chance)
    found = [_certain(document, issuers, chance) for document in chance.documents]
    found += list(_fresh_connections(found))
    text = yaml.dump_all(json.loads(json.dumps(found)), sort_keys=False, default_flow_style=None, width=150)
    return text, [_call(chance, found, issuers) for _ in range(40)]


def _entry(chance: Chance, outside: str) -> None:
    hosts = chance.some(["a.example.com", "b.example.com"], 1, 2)
    endpoints = [{"address": outside, "labels": {"version": "v1"}}]
    port = {"number": 8000, "name": "http", "protocol": "HTTP", "targetPort": OUTSIDE_PORT}
    spec: Doc = {"hosts": hosts, "ports": [port], "resolution": "STATIC", "endpoints": endpoints}
    spec.update(chance.maybe(0.5, location="MESH_EXTERNAL"))
    namespace = chance.one(NAMESPACES[:2])
    chance.add("networking.istio.io/v1", "ServiceEntry", spec, namespace=namespace)
    chance.hosts += [Host(name=h, short="", namespace=namespace, ports={8000: "http"}, labels={}) for h in hosts]


def _certain(document: Doc, issuers: Mapping[str, Issuer], chance: Chance) -> Doc:
    """Without what chance or time decides."""
    kind, spec = document["kind"], document.get("spec") or {}
    if kind == "VirtualService":
        for rule in spec.get("http", ()):
            _certain_rule(rule, chance)
    elif kind == "DestinationRule":
        for policy in _policies(spec):
            _certain_policy(policy)
    elif kind == "Gateway":
        for server in spec["servers"]:
            _certain_server(server)
    elif kind == "Sidecar":
        spec.pop("ingress", None)
        if "egress" not in spec:
            spec["egress"] = [{"hosts": ["*/*"]}]
    elif kind == "RequestAuthentication":
        for rule in spec["jwtRules"]:
            rule.pop("jwksUri", None)
            rule["jwks"] = issuers[rule["issuer"]].jwks if rule["issuer"] in issuers else '{"keys":[]}'
    elif kind == "HTTPRoute":
        for rule in spec["rules"]:
            rule.pop("timeouts", None)
    return document


def _certain_policy(policy: Doc) -> None:
    for name in ("outlierDetection", "proxyProtocol", "tunnel"):
        policy.pop(name, None)
    # No files are read, and no secrets but those of the mesh: Envoy would wait for them.
    tls = policy.get("tls", {})
    if tls.get("mode") == "MUTUAL":
        policy["tls"] = {"mode": "ISTIO_MUTUAL"}
    for name in ("caCertificates", "credentialName", "caCrl"):
        tls.pop(name, None)
    http = policy.get("connectionPool", {}).get("http", {})
    kept = {name: http[name] for name in ("h2UpgradePolicy", "useClientProtocol") if name in http}
    policy["connectionPool"] = {"http": {**kept, "maxRequestsPerConnection": 1}}


def _certain_server(server: Doc) -> None:
    port, tls = server["port"], server.get("tls", {})
    if port["number"] < 1024:
        port["number"] += 8100
    if "serverCertificate" in tls:
        for name in ("serverCertificate", "privateKey", "caCertificates"):
            tls.pop(name, None)
        tls["credentialName"] = "cert"
    tls.pop("subjectAltNames", None)
    tls.pop("cipherSuites", None)


def _certain_rule(rule: Doc, chance: Chance) -> None:
    for part in ("delay", "abort"):
        if part in rule.get("fault", {}):
            rule["fault"][part]["percentage"] = {"value": chance.one([0, 100, 100])}
            if part == "delay":
                rule["fault"][part]["fixedDelay"] = "0.01s"
    for mirror in (rule, *rule.get("mirrors", ())):
        for name in ("mirrorPercentage", "percentage"):
            if name in mirror:
                mirror[name] = {"value": chance.one([0, 100])}
    if "timeout" in rule:
        rule["timeout"] = f"{TIMEOUT_S:g}s"
    if "perTryTimeout" in rule.get("retries", {}):
        rule["retries"]["perTryTimeout"] = f"{TIMEOUT_S:g}s"


def _policies(spec: Doc) -> Iterator[Doc]:
    for holder in (spec, *spec.get("subsets", ())):
        policy = holder.setdefault("trafficPolicy", {})
        yield policy
        yield from policy.get("portLevelSettings", ())


def _fresh_connections(found: list[Doc]) -> Iterator[Doc]:
    """A connection for each call: Istio keeps policies in listeners, and an open connection those of before."""
    known = {
        (d["metadata"]["namespace"], d["spec"]["host"].partition(".")[0])
        for d in found
        if d["kind"] == "DestinationRule"
    }
    for app, namespace in _HOSTS:
        if (namespace, app) not in known:
            pool = {"connectionPool": {"http": {"maxRequestsPerConnection": 1}}}
            host = f"{app}.{namespace}.svc.cluster.local"
            meta = {"name": f"fresh-{app}", "namespace": namespace}
            spec = {"host": host, "trafficPolicy": pool}
            yield {"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": meta, "spec": spec}


def _call(chance: Chance, found: list[Doc], issuers: Mapping[str, Issuer]) -> RandomCall:
    gateways = [d for d in found if d["kind"] == "Gateway"]
    outside = bool(gateways) and chance.yes(0.4)
    headers: dict[str, str] = {}
    for name in chance.some(["x-a", "x-b", "end-user", "x-c", "x-r", "x-add", "x-set"], 0, 3):
        headers[name] = chance.one(["value", "va", "valuex", "VALUE", "1", "p1", "x"])
    path = chance.one(["/", "/a", "/a/b", "/a/x", "/ab", "/A/b", "/shop", "/shop/1", "/b", "/health", "/new", "/x/y"])
    path += chance.one(["", "", "", "?q=1", "?q=p7", "?a=b&q=1"])
    if chance.yes(0.35):
        path = _with_token(chance, headers, path, issuers)
    if outside:
        server = chance.one(chance.one(gateways)["spec"]["servers"])
        port = server["port"]["number"]
        host = chance.one(["a.example.com", "b.example.com", "c.example.com", "shop.example.net", "web.mlmesh"])
        grpc = chance.yes(0.4)
        client = ""
    else:
        client = chance.one(["client", "client", "stranger"])
        target = chance.one(chance.hosts)
        port = chance.one(list(target.ports))
        host = target.name
        if target.short:
            same = (client == "client") == (target.namespace == "mlmesh")
            names = [host, f"{target.short}.{target.namespace}", f"{target.short}.{target.namespace}.svc"]
            host = chance.one(names + ([target.short] if same else []))
        grpc = target.ports[port] == "grpc" or (target.ports[port] == "http2" and chance.yes(0.5))
        if chance.yes(0.05):
            host = "nobody.example.org"
    method = "POST" if grpc else chance.one(["GET", "GET", "POST", "DELETE"])
    if chance.yes(0.15):
        headers["x-fail"] = f"503*{chance.number(1, 5)}"
    elif chance.yes(0.03):
        headers["x-slow"] = "1"
    return RandomCall(client=client, host=host, port=port, path=path, method=method, grpc=grpc, headers=headers)


def _with_token(chance: Chance, headers: dict[str, str], path: str, issuers: Mapping[str, Issuer]) -> str:
    """A token at any of the places where one may be, good or not."""
    claims: dict[str, Any] = {
        **chance.maybe(0.6, aud="aud"),
        **chance.maybe(0.6, role=chance.one(["admin", "user"])),
        **chance.maybe(0.3, a={"b": chance.one(["x", "y"])}),
        "sub": chance.one(["sub", "somebody"]),
        "exp": time.time() + 86400,
        **chance.maybe(0.15, exp=1),
        **chance.maybe(0.1, iss="https://elsewhere.example"),
    }
    token = issuers[chance.one(ISSUERS)].token(**claims) if chance.yes(0.9) else "none.of.it"
    place = chance.one(["authorization"] * 4 + ["x-token", "bearer x-token", "query", "cookie", "access_token"])
    if place == "authorization":
        headers["authorization"] = f"Bearer {token}"
    elif place.endswith("x-token"):
        headers["x-token"] = f"Bearer {token}" if "bearer" in place else token
    elif place == "cookie":
        headers["cookie"] = f"token={token}"
    else:
        name = "token" if place == "query" else "access_token"
        return f"{path}{'&' if '?' in path else '?'}{name}={token}"
    return path
