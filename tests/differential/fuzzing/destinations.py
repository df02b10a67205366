"""Random DestinationRules: every part of a traffic policy, at every level, for every sort of host."""

from __future__ import annotations

from tests.differential.fuzzing.chance import NAMESPACES, NETWORKING, ROOT, Chance, Doc, Host

_REGIONS = ("us", "eu", "asia")
_PLACES = ("us/east/1", "us/east/2", "us/west", "eu/north", "eu")


def destination_rule(chance: Chance) -> None:
    """A DestinationRule of a host, or of all hosts below a name."""
    host = chance.one(chance.hosts)
    namespace = chance.one([host.namespace, host.namespace, *NAMESPACES[:2], ROOT])
    spec: Doc = {"host": chance.host_as_written(host, namespace)}
    if chance.yes(0.12):
        spec["host"] = chance.one(
            ["*.example.com", "*.other.svc.cluster.local", "*.mlmesh.svc.cluster.local", "*.local", "*"]
        )
    if chance.yes(0.7):
        spec["trafficPolicy"] = _policy(chance, list(host.ports))
    if chance.yes(0.6) and not spec["host"].startswith("*"):
        spec["subsets"] = [_subset(chance, host, name) for name in chance.some(["v1", "v2", "all", "none"], 1, 3)]
    if chance.yes(0.12):
        spec["workloadSelector"] = {"matchLabels": chance.one([{"app": "client"}, chance.label()])}
    else:
        spec.update(
            chance.maybe(0.15, exportTo=chance.one([["."], ["*"], ["other"], [".", "third"], ["mlmesh", "other"]]))
        )
    chance.add(NETWORKING, "DestinationRule", spec, namespace=namespace)


def _subset(chance: Chance, host: Host, name: str) -> Doc:
    labels = {"all": {}, "none": {"version": "none"}}.get(name, {"version": name})
    host.subsets.append(name)
    return {
        "name": name,
        **({"labels": labels} if labels else {}),
        **({"trafficPolicy": _policy(chance, list(host.ports))} if chance.yes(0.4) else {}),
    }


def _policy(chance: Chance, ports: list[int]) -> Doc:
    policy = _traffic(chance)
    policy.update(chance.maybe(0.05, proxyProtocol={"version": chance.one(["V1", "V2"])}))
    if "proxyProtocol" not in policy:
        policy.update(chance.maybe(0.08, tunnel={"targetHost": "t.example.com", "targetPort": 443}))
    policy.update(chance.maybe(0.08, retryBudget={"percent": chance.number(1, 50), "minRetryConcurrency": 4}))
    if chance.yes(0.3):
        levels = [{"port": {"number": number}, **_traffic(chance)} for number in chance.some(ports, 1, 2)]
        policy["portLevelSettings"] = levels
    return policy or {"loadBalancer": {"simple": "RANDOM"}}


def _traffic(chance: Chance) -> Doc:
    found = {
        **chance.maybe(0.45, loadBalancer=_balancer(chance)),
        **chance.maybe(0.4, connectionPool=_pool(chance)),
        **chance.maybe(0.4, outlierDetection=_outlier(chance)),
        **chance.maybe(0.25, tls=_tls(chance)),
    }
    return found or {"connectionPool": {"tcp": {"maxConnections": 8}}}


def _balancer(chance: Chance) -> Doc:
    simple = chance.one(["ROUND_ROBIN", "LEAST_REQUEST", "RANDOM", "LEAST_CONN", "UNSPECIFIED"])
    result: Doc = chance.one([{"simple": simple}, {"simple": simple}, {"consistentHash": _hash(chance)}, {}])
    if result.get("simple") in ("ROUND_ROBIN", "LEAST_REQUEST"):
        warmup = {"duration": "20s", **chance.maybe(0.5, minimumPercent=20), **chance.maybe(0.5, aggression=1.5)}
        result.update(chance.one([{}, {"warmup": warmup}, {"warmupDurationSecs": "30s"}]))
    if not result or chance.yes(0.35):
        result["localityLbSetting"] = locality(chance)
    return result


def _hash(chance: Chance) -> Doc:
    cookie = {"name": "c", "ttl": chance.one(["0s", "10s"]), **chance.maybe(0.4, path="/p")}
    key: Doc = chance.one(
        [{"httpHeaderName": "x-a"}, {"useSourceIp": True}, {"httpCookie": cookie}, {"httpQueryParameterName": "q"}]
    )
    ring: Doc = chance.one(
        [
            {},
            {},
            {"ringHash": {"minimumRingSize": 64}},
            {"maglev": {"tableSize": 5003}},
            {"minimumRingSize": 99},
        ]
    )
    return {**key, **ring}


def locality(chance: Chance) -> Doc:
    """A localityLbSetting."""
    spread = {chance.one(["us/east/*", "us/*", "us/east/1", "eu/*"]): 70, "other/*": 30}
    near, far = chance.some(_REGIONS, 2, 2)
    shapes: list[Doc] = [
        {},
        {"distribute": [{"from": chance.one(["*", "us/*", "us/east/*", "eu/north/*"]), "to": spread}]},
        {"failover": [{"from": near, "to": far}]},
        {
            "failoverPriority": chance.some(
                ["version", "app", "team=red", "topology.kubernetes.io/region", "topology.kubernetes.io/zone"], 1, 3
            )
        },
    ]
    return {**chance.one(shapes), **chance.maybe(0.5, enabled=chance.yes(0.8))}


def _pool(chance: Chance) -> Doc:
    keepalive = {"probes": 3, "time": "60s", "interval": "10s"}
    tcp = {
        **chance.maybe(0.7, maxConnections=chance.number(1, 99)),
        **chance.maybe(0.4, connectTimeout=chance.one(["2s", "0.25s", "1500ms"])),
        **chance.maybe(0.3, tcpKeepalive=chance.one([keepalive, {"time": "7200s"}, {}])),
        **chance.maybe(0.2, maxConnectionDuration="1h"),
        **chance.maybe(0.2, idleTimeout=chance.one(["20s", "0s"])),
    }
    upgrade: Doc = chance.one(
        [{"h2UpgradePolicy": "UPGRADE"}, {"h2UpgradePolicy": "DO_NOT_UPGRADE"}, {"useClientProtocol": True}]
    )
    ping = {"interval": "30s", "timeout": "5s"}
    http = {
        **chance.maybe(0.5, http1MaxPendingRequests=chance.number(1, 99)),
        **chance.maybe(0.3, http2MaxRequests=chance.number(1, 99)),
        **chance.maybe(0.3, maxRequestsPerConnection=chance.number(0, 9)),
        **chance.maybe(0.3, maxRetries=2),
        **chance.maybe(0.3, idleTimeout="9s"),
        **chance.maybe(0.2, maxConcurrentStreams=50),
        **chance.maybe(0.1, http2KeepAlive=ping),
        **(upgrade if chance.yes(0.4) else {}),
    }
    found = {**(chance.maybe(0.7, tcp=tcp) if tcp else {}), **(chance.maybe(0.7, http=http) if http else {})}
    return found or {"tcp": {"maxConnections": 6}}


def _outlier(chance: Chance) -> Doc:
    split = chance.yes(0.2)
    return {
        **chance.maybe(0.6, consecutive5xxErrors=chance.number(0, 9)),
        **chance.maybe(0.3, consecutiveGatewayErrors=chance.number(0, 9)),
        **({"splitExternalLocalOriginErrors": True} if split else {}),
        **(chance.maybe(0.5, consecutiveLocalOriginFailures=chance.number(0, 4)) if split else {}),
        **chance.maybe(0.4, interval="5s"),
        **chance.maybe(0.3, baseEjectionTime="15s"),
        **chance.maybe(0.3, maxEjectionPercent=chance.number(0, 100)),
        **chance.maybe(0.3, minHealthPercent=chance.number(0, 80)),
    }


def _tls(chance: Chance) -> Doc:
    mode = chance.one(["DISABLE", "ISTIO_MUTUAL", "SIMPLE", "MUTUAL"])
    result: Doc = {"mode": mode}
    if mode == "MUTUAL":
        result.update(
            chance.one(
                [
                    {"credentialName": "client-cert"},
                    {
                        "clientCertificate": "/etc/c.pem",
                        "privateKey": "/etc/k.pem",
                        **chance.maybe(0.5, caCertificates="/etc/ca.pem"),
                    },
                ]
            )
        )
    elif mode == "SIMPLE":
        result.update(
            chance.one([{}, {"caCertificates": "/etc/ca.pem"}, {"credentialName": "ca"}, {"insecureSkipVerify": True}])
        )
    if mode in ("SIMPLE", "MUTUAL"):
        result.update(chance.maybe(0.5, sni="x.example.com"))
        result.update(
            chance.maybe(0.3, subjectAltNames=["a.example.com", "spiffe://cluster.local/ns/x/sa/y"])
            if "insecureSkipVerify" not in result
            else {}
        )
    elif mode == "ISTIO_MUTUAL":
        result.update(
            chance.maybe(0.2, sni="y.example.com"),
            **chance.maybe(0.2, subjectAltNames=["spiffe://cluster.local/ns/x/sa/y"]),
        )
    return result
