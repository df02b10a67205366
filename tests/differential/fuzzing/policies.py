"""Random DestinationRules and policies: PeerAuthentication, AuthorizationPolicy, RequestAuthentication, Telemetry."""

from __future__ import annotations

from tests.differential.fuzzing.base import NETWORKING
from tests.differential.fuzzing.chance import NAMESPACES, ROOT, Chance, Doc

SECURITY = "security.istio.io/v1"


def _traffic(chance: Chance, *, port_level: bool = False) -> Doc:
    hashed: Doc = chance.one(
        [{"httpHeaderName": "x-a"}, {"useSourceIp": True}, {"httpCookie": {"name": "c", "ttl": "10s"}}]
    )
    balancers: list[Doc] = [
        {"simple": chance.one(["ROUND_ROBIN", "LEAST_REQUEST", "RANDOM"])},
        {"consistentHash": {**hashed, **chance.maybe(0.3, ringHash={"minimumRingSize": 64})}},
        {"simple": "ROUND_ROBIN", "warmup": {"duration": "20s"}},
        {"localityLbSetting": {"enabled": chance.yes(0.7)}},
    ]
    modes = ["DISABLE", "ISTIO_MUTUAL", "SIMPLE"]
    tls: Doc = {"mode": chance.one(modes)}
    if tls["mode"] == "SIMPLE":
        tls.update(chance.maybe(0.5, sni="x.example.com"), **chance.maybe(0.3, caCertificates="/etc/ca.pem"))
    policy: Doc = {
        **chance.maybe(0.4, loadBalancer=chance.one(balancers)),
        **chance.maybe(0.4, connectionPool=_pool(chance)),
        **chance.maybe(
            0.3,
            outlierDetection={
                "consecutive5xxErrors": chance.number(1, 9),
                **chance.maybe(0.5, interval="5s"),
                **chance.maybe(0.3, minHealthPercent=40),
            },
        ),
        **chance.maybe(0.25, tls=tls),
    }
    if not port_level:
        policy.update(chance.maybe(0.05, proxyProtocol={"version": "V2"}))
    return policy or {"loadBalancer": {"simple": "RANDOM"}}


def _pool(chance: Chance) -> Doc:
    tcp = {"maxConnections": chance.number(1, 99), **chance.maybe(0.4, connectTimeout="2s")}
    http = {
        "http1MaxPendingRequests": chance.number(1, 99),
        **chance.maybe(0.3, h2UpgradePolicy=chance.one(["UPGRADE", "DO_NOT_UPGRADE"])),
        **chance.maybe(0.3, maxRetries=2),
        **chance.maybe(0.3, idleTimeout="9s"),
    }
    return chance.one([{"tcp": tcp}, {"http": http}, {"tcp": tcp, "http": http}])


def destination_rule(chance: Chance) -> None:
    """A DestinationRule of a host, or of all hosts below a name."""
    host = chance.one(chance.hosts)
    namespace = chance.one([host.namespace, host.namespace, *NAMESPACES[:2], ROOT])
    spec: Doc = {"host": chance.host_as_written(host, namespace)}
    if chance.yes(0.12):
        spec["host"] = chance.one(["*.example.com", "*.other.svc.cluster.local", "*.local"])
    if chance.yes(0.7):
        spec["trafficPolicy"] = _policy(chance, list(host.ports))
    if chance.yes(0.6) and not spec["host"].startswith("*"):
        subsets = []
        for name in chance.some(["v1", "v2", "all"], 1, 3):
            labels = {} if name == "all" else {"version": name}
            subset = {"name": name, **({"labels": labels} if labels else {})}
            if chance.yes(0.4):
                subset["trafficPolicy"] = _policy(chance, list(host.ports))
            subsets.append(subset)
            host.subsets.append(name)
        spec["subsets"] = subsets
    if chance.yes(0.12):
        spec["workloadSelector"] = {"matchLabels": chance.one([{"app": "client"}, chance.label()])}
    else:
        spec.update(chance.maybe(0.12, exportTo=chance.one([["."], ["*"], ["other"]])))
    chance.add(NETWORKING, "DestinationRule", spec, namespace=namespace)


def _policy(chance: Chance, ports: list[int]) -> Doc:
    policy = _traffic(chance)
    if chance.yes(0.3):
        levels = [
            {"port": {"number": number}, **_traffic(chance, port_level=True)} for number in chance.some(ports, 1, 2)
        ]
        policy["portLevelSettings"] = levels
    return policy


def peer_authentication(chance: Chance) -> None:
    """Of the mesh, of a namespace or of workloads, with ports."""
    namespace = chance.one([*NAMESPACES[:2], ROOT])
    modes = ["STRICT", "PERMISSIVE", "DISABLE", "UNSET"]
    spec: Doc = {**chance.maybe(0.8, mtls={"mode": chance.one(modes)})}
    if namespace != ROOT and chance.yes(0.6):
        host = chance.one([host for host in chance.hosts if host.labels])
        spec["selector"] = {"matchLabels": host.labels}
        namespace = host.namespace if chance.yes(0.9) else namespace
        if chance.yes(0.6):
            ports = chance.some([number + chance.one([0, 10000]) for number in host.ports], 1, 2)
            spec["portLevelMtls"] = {number: {"mode": chance.one(modes)} for number in ports}
    chance.add(SECURITY, "PeerAuthentication", spec, namespace=namespace)


def _source(chance: Chance) -> Doc:
    parts: Doc = {
        **chance.maybe(
            0.4, principals=chance.some(["cluster.local/ns/mlmesh/sa/client", "*", "*/sa/x", "cluster.local/*"], 1, 2)
        ),
        **chance.maybe(0.3, namespaces=chance.some(["mlmesh", "oth*", "other"], 1, 2)),
        **chance.maybe(0.2, notNamespaces=["third"]),
        **chance.maybe(0.2, ipBlocks=["10.0.0.0/8", "127.0.0.1"]),
        **chance.maybe(0.1, remoteIpBlocks=["10.1.0.0/16"]),
        **chance.maybe(0.25, requestPrincipals=chance.some(["*", "issuer/sub", "issuer/*"], 1, 2)),
        **chance.maybe(0.1, notRequestPrincipals=["*"]),
        **chance.maybe(0.1, serviceAccounts=chance.one([["client"], ["mlmesh/client", "web-account"]])),
    }
    if "serviceAccounts" in parts:
        for name in ("principals", "namespaces", "notNamespaces"):
            parts.pop(name, None)
    return parts or {"namespaces": ["mlmesh"]}


def _operation(chance: Chance) -> Doc:
    return {
        **chance.maybe(0.5, paths=chance.some(["/a", "/a/*", "*/b", "/{*}/x", "*"], 1, 2)),
        **chance.maybe(0.2, notPaths=["/health"]),
        **chance.maybe(0.4, methods=chance.some(["GET", "POST", "P*"], 1, 2)),
        **chance.maybe(0.2, ports=chance.some(["80", "8000", "10080", "7001", "17001"], 1, 2)),
        **chance.maybe(0.2, hosts=chance.some(["a.example.com", "*.example.com", "web"], 1, 2)),
        **chance.maybe(0.1, notMethods=["DELETE"]),
    } or {"methods": ["GET"]}


def _when(chance: Chance) -> Doc:
    return chance.one(
        [
            {"key": "request.headers[x-a]", "values": ["1", "p*"]},
            {"key": "request.headers[x-b]", "notValues": ["*"]},
            {"key": "source.ip", "values": ["10.0.0.1"]},
            {"key": "source.namespace", "values": ["mlmesh"], "notValues": ["other"]},
            {"key": "source.principal", "values": ["cluster.local/ns/mlmesh/sa/default"]},
            {"key": "destination.port", "values": ["80", "8000"]},
            {"key": "connection.sni", "values": ["*.example.com"]},
            {"key": "request.auth.claims[role]", "values": ["admin"]},
            {"key": "request.auth.claims[a][b]", "notValues": ["x"]},
            {"key": "request.auth.principal", "values": ["issuer/*"]},
            {"key": "request.auth.audiences", "values": ["aud"]},
        ]
    )


def _target(chance: Chance, namespace: str) -> Doc:
    if chance.yes(0.6):
        return {"selector": {"matchLabels": chance.one([chance.label(), {"istio": "gateway"}])}}
    return {}


def authorization_policy(chance: Chance) -> None:
    """Rules of sources, operations and conditions, for one action."""
    namespace = chance.one([*NAMESPACES[:2], *NAMESPACES, ROOT])
    actions = ["ALLOW", "ALLOW", "DENY", "AUDIT"]
    if any(document["kind"] == "ConfigMap" for document in chance.documents):
        actions.append("CUSTOM")
    action = chance.one(actions)
    spec: Doc = {**_target(chance, namespace), **({} if action == "ALLOW" and chance.yes(0.5) else {"action": action})}
    rules = []
    for _ in range(chance.number(0 if action == "ALLOW" else 1, 3)):
        rule: Doc = {
            **chance.maybe(0.6, **{"from": [{"source": _source(chance)} for _ in range(chance.number(1, 2))]}),
            **chance.maybe(0.6, to=[{"operation": _operation(chance)} for _ in range(chance.number(1, 2))]),
            **chance.maybe(0.4, when=[_when(chance) for _ in range(chance.number(1, 2))]),
        }
        rules.append(rule)
    if action == "CUSTOM":
        spec["provider"] = {"name": chance.one(["check", "ask", "nobody"])}
        rules = [{"to": [{"operation": _operation(chance)}]} for _ in rules]
    if rules:
        spec["rules"] = rules
    metadata: Doc = {}
    if chance.yes(0.1) and action in ("ALLOW", "DENY"):
        metadata = {"annotations": {"istio.io/dry-run": "true"}}
    chance.add(SECURITY, "AuthorizationPolicy", spec, namespace=namespace, **metadata)


def _issuer(chance: Chance, issuer: str) -> Doc:
    return {
        "issuer": issuer,
        "jwks": '{"keys":[]}',
        **chance.maybe(0.3, audiences=["aud"]),
        **chance.maybe(0.3, fromHeaders=[{"name": "x-token", **chance.maybe(0.5, prefix="Bearer ")}]),
        **chance.maybe(0.2, fromParams=["token"]),
        **chance.maybe(0.2, fromCookies=["token"]),
        **chance.maybe(0.3, forwardOriginalToken=True),
        **chance.maybe(0.2, outputPayloadToHeader="x-payload"),
        **chance.maybe(0.2, outputClaimToHeaders=[{"header": "x-sub", "claim": "sub"}]),
    }


def request_authentication(chance: Chance) -> None:
    """Issuers with their keys inline."""
    namespace = chance.one([*NAMESPACES, ROOT])
    rules = [_issuer(chance, issuer) for issuer in chance.some(["issuer", "second", "third"], 1, 2)]
    chance.add(
        SECURITY, "RequestAuthentication", {**_target(chance, namespace), "jwtRules": rules}, namespace=namespace
    )


def telemetry(chance: Chance) -> None:
    """Tracing, access logs and metrics at every level; one of a namespace without a selector, as Istio has it."""
    namespace = chance.one([*NAMESPACES[:2], ROOT])
    selector = {"selector": {"matchLabels": chance.label()}} if namespace != ROOT and chance.yes(0.5) else {}
    for other in chance.documents:
        if other["kind"] == "Telemetry" and other["metadata"]["namespace"] == namespace:
            return
    with_providers = any(document["kind"] == "ConfigMap" for document in chance.documents)
    tracing: Doc = {
        **chance.maybe(0.6, randomSamplingPercentage=chance.number(0, 100)),
        **chance.maybe(0.3, disableSpanReporting=chance.yes(0.5)),
        **chance.maybe(0.3, customTags={"t": {"literal": {"value": "x"}}, "h": {"header": {"name": "x-h"}}}),
        **(chance.maybe(0.7, providers=[{"name": "spans"}]) if with_providers else {}),
        **chance.maybe(0.2, match={"mode": chance.one(["CLIENT", "SERVER"])}),
    }
    logging: Doc = {
        **(chance.maybe(0.6, providers=[{"name": "lines"}]) if with_providers else {"providers": [{"name": "envoy"}]}),
        **chance.maybe(0.3, filter={"expression": "response.code >= 400"}),
        **chance.maybe(0.3, match={"mode": chance.one(["CLIENT", "SERVER"])}),
        **chance.maybe(0.2, disabled=True),
    }
    spec: Doc = {**selector, **chance.maybe(0.6, tracing=[tracing]), **chance.maybe(0.6, accessLogging=[logging])}
    chance.add("telemetry.istio.io/v1", "Telemetry", spec, namespace=namespace)
