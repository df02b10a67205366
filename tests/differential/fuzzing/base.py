"""Services and workloads of a random world, and MeshConfig."""

from __future__ import annotations

import yaml

from tests.differential.fuzzing.chance import NAMESPACES, ROOT, Chance, Doc, Host
from tests.differential.fuzzing.destinations import locality

_APPS = ("web", "api", "cart", "db")
_HTTP_PORTS = (80, 8000, 9000)
# How a port says its protocol: by its name, or beside a name that says nothing.
_APPLICATION = {
    "http": ("http", "kubernetes.io/ws"),
    "http2": ("http2", "kubernetes.io/h2c"),
    "grpc": ("grpc",),
    "tcp": ("tcp",),
    "tls": ("tls",),
    "https": ("https",),
}
_PLACES = ("us.east.1", "us.east.2", "us.west", "eu.north", "eu")


def base(chance: Chance) -> None:
    """Two to four services with one or two workloads each, a client in each of two namespaces, and a gateway."""
    # Bytes share a sidecar's address: their ports are of one service each.
    bytes_from = 7000
    near = chance.yes(0.4)
    for app in chance.some(_APPS, 2, 4):
        namespace = chance.one(NAMESPACES[:2])
        ports: dict[int, str] = {}
        for number in chance.some(_HTTP_PORTS, 1, 2):
            ports[number] = chance.one(["http", "http", "grpc", "http2"])
        for _ in range(chance.number(0, 2) if app == "db" else chance.number(0, 1)):
            bytes_from += 1
            ports[bytes_from] = chance.one(["tcp", "tcp", "tls", "https"])
        _service(chance, app, namespace, ports, near=near)
    for namespace in NAMESPACES[:2]:
        labels = {"app": "client", "team": chance.one(["red", "blue"])}
        _deployment(chance, f"client-{namespace}", namespace, _placed(chance, labels, near=near), [])
    _gateway(chance)
    if chance.yes(0.2):
        _alias(chance)
    if chance.yes(0.25):
        _second(chance)


def _alias(chance: Chance) -> None:
    name, namespace = "outside", chance.one(NAMESPACES[:2])
    ports = {chance.one(_HTTP_PORTS): "http"}
    named = [host.name for host in chance.hosts if set(ports) <= set(host.ports)]
    target = chance.one(["ext.example.org", *named])
    spec = {"type": "ExternalName", "externalName": target, "ports": _ports(chance, ports, {})}
    chance.add("v1", "Service", spec, name=name, namespace=namespace)
    chance.hosts.append(
        Host(name=f"{name}.{namespace}.svc.cluster.local", short=name, namespace=namespace, ports=ports, labels={})
    )


def _second(chance: Chance) -> None:
    """Another Service of workloads that have one."""
    first = chance.one([host for host in chance.hosts if host.labels])
    number, protocol = chance.one([(n, p) for n, p in first.ports.items() if p in ("http", "grpc", "http2")])
    labels = {**first.labels, **chance.maybe(0.5, version="v1")}
    name = chance.name("more-")
    target = 10000 + number if chance.yes(0.5) else number
    port = chance.one(_HTTP_PORTS)
    protocol = protocol if chance.yes(0.7) else "http"
    spec = {"selector": labels, "ports": _ports(chance, {port: protocol}, {port: target})}
    chance.add("v1", "Service", spec, name=name, namespace=first.namespace)
    host = f"{name}.{first.namespace}.svc.cluster.local"
    chance.hosts.append(
        Host(name=host, short=name, namespace=first.namespace, ports={port: protocol}, labels=first.labels)
    )


def _ports(chance: Chance, ports: dict[int, str], targets: dict[int, int]) -> list[Doc]:
    result = []
    for number, protocol in ports.items():
        item: Doc = {"name": f"{protocol}-{number}", "port": number}
        if chance.yes(0.2):
            item.update(
                name=chance.one([f"p-{number}", f"http-{number}"]), appProtocol=chance.one(_APPLICATION[protocol])
            )
        elif len(ports) == 1 and chance.yes(0.1):
            item["name"] = protocol
        result.append({**item, **({"targetPort": targets[number]} if targets else {})})
    return result


def _service(chance: Chance, app: str, namespace: str, ports: dict[int, str], *, near: bool) -> None:
    targets = {number: chance.one([number, 10000 + number]) for number in ports}
    labels = {"app": app}
    spec: Doc = {"selector": labels, "ports": _ports(chance, ports, targets)}
    spec.update(chance.maybe(0.1, trafficDistribution=chance.one(["PreferClose", "PreferSameZone", "PreferSameNode"])))
    spec.update(chance.maybe(0.05, type=chance.one(["NodePort", "LoadBalancer"])))
    spec.update(chance.maybe(0.05, publishNotReadyAddresses=True))
    spec.update(chance.maybe(0.05, internalTrafficPolicy="Local"))
    exports = chance.one([".", "*", "third", "~", ".,third", "mlmesh,other"])
    metadata: Doc = {"annotations": {"networking.istio.io/exportTo": exports}} if chance.yes(0.12) else {}
    chance.add("v1", "Service", spec, name=app, namespace=namespace, **metadata)
    host = f"{app}.{namespace}.svc.cluster.local"
    chance.hosts.append(Host(name=host, short=app, namespace=namespace, ports=dict(ports), labels=labels))
    for version in chance.some(["v1", "v2"], 1, 2):
        own = _placed(chance, {**labels, "version": version}, near=near)
        _deployment(chance, f"{app}-{version}", namespace, own, sorted(set(targets.values())))


def _placed(chance: Chance, labels: dict[str, str], *, near: bool) -> dict[str, str]:
    return {**labels, "istio-locality": chance.one(_PLACES)} if near and chance.yes(0.9) else labels


def _deployment(chance: Chance, name: str, namespace: str, labels: dict[str, str], ports: list[int]) -> None:
    container = {"name": "app", "command": ["serve"], "ports": [{"containerPort": port} for port in ports]}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    if chance.yes(0.5):
        account = f"{labels['app']}-account"
        template["spec"]["serviceAccountName"] = account  # type: ignore[index]
        if not any(d["kind"] == "ServiceAccount" and d["metadata"]["name"] == account for d in chance.documents):
            chance.add("v1", "ServiceAccount", None, name=account, namespace=namespace)
            del chance.documents[-1]["spec"]
    spec = {"selector": {"matchLabels": labels}, "template": template}
    chance.add("apps/v1", "Deployment", spec, name=name, namespace=namespace)


def _gateway(chance: Chance) -> None:
    # In a namespace of its own: what Istio lets a gateway see depends on which sidecar beside it asked before.
    metadata = {"labels": {"istio": "gateway"}, "annotations": {"inject.istio.io/templates": "gateway"}}
    template = {"metadata": metadata, "spec": {"containers": [{"name": "istio-proxy", "image": "auto"}]}}
    spec = {"selector": {"matchLabels": {"istio": "gateway"}}, "template": template}
    chance.add("apps/v1", "Deployment", spec, name="gateway", namespace=NAMESPACES[2])
    if chance.yes(0.3):
        ports = [{"name": "http", "port": 80, "targetPort": 8080}, {"name": "https", "port": 443, "targetPort": 8443}]
        chance.add(
            "v1", "Service", {"selector": {"istio": "gateway"}, "ports": ports}, name="gateway", namespace=NAMESPACES[2]
        )


def mesh_config(chance: Chance) -> None:
    """MeshConfig with a few settings, and the providers that Telemetry and AuthorizationPolicy may name."""
    # Not an alias: Envoy rejects an authorizer's cluster that is not there.
    host = chance.one([host for host in chance.hosts if host.labels and host.http_ports()])
    there = {"service": host.name, "port": host.http_ports()[0]}
    ask: Doc = {
        "pathPrefix": "/ask",
        **chance.maybe(0.5, timeout="1s", failOpen=True),
        **chance.maybe(0.4, includeRequestHeadersInCheck=["x-a", "x-b*"]),
        **chance.maybe(0.3, headersToUpstreamOnAllow=["x-ok*"], statusOnError="503"),
        **chance.maybe(0.3, includeRequestBodyInCheck={"maxRequestBytes": 99, "allowPartialMessage": True}),
    }
    settings: Doc = {
        "extensionProviders": [
            {"name": "check", "envoyExtAuthzGrpc": {**there, **chance.maybe(0.3, timeout="2s", clearRouteCache=True)}},
            {"name": "ask", "envoyExtAuthzHttp": {**there, **ask}},
            {"name": "spans", "opentelemetry": {**there, **chance.maybe(0.3, maxTagLength=99)}},
            {"name": "zip", "zipkin": there},
            {"name": "lines", "envoyFileAccessLog": {"path": "/dev/stdout"}},
            {
                "name": "json",
                "envoyFileAccessLog": {"path": "/dev/stdout", "logFormat": {"labels": {"s": "%RESPONSE_CODE%"}}},
            },
            {"name": "als", "envoyOtelAls": there},
        ],
        **chance.maybe(0.2, defaultProviders=_defaults(chance)),
        **chance.maybe(0.2, outboundTrafficPolicy={"mode": "REGISTRY_ONLY"}),
        **chance.maybe(
            0.2,
            defaultHttpRetryPolicy=chance.one(
                [{"attempts": 5, "retryOn": "reset"}, {"attempts": 0}, {"attempts": 1, "perTryTimeout": "1s"}]
            ),
        ),
        **chance.maybe(0.2, connectTimeout="3s"),
        **chance.maybe(0.2, enableAutoMtls=chance.yes(0.3)),
        **chance.maybe(0.2, accessLogFile="/dev/stdout"),
        **chance.maybe(0.1, accessLogEncoding="JSON"),
        **chance.maybe(0.1, accessLogFormat="%PROTOCOL%\n"),
        **chance.maybe(0.1, enableTracing=chance.yes(0.5)),
        **chance.maybe(0.1, h2UpgradePolicy="UPGRADE"),
        **chance.maybe(0.1, dnsRefreshRate="7s"),
        **chance.maybe(
            0.2,
            pathNormalization={
                "normalization": chance.one(["NONE", "BASE", "MERGE_SLASHES", "DECODE_AND_MERGE_SLASHES"])
            },
        ),
        **chance.maybe(0.2, defaultServiceExportTo=chance.one([["*"], ["."], ["~"], [".", "third"]])),
        **chance.maybe(0.2, defaultVirtualServiceExportTo=chance.one([["*"], ["."], ["other"]])),
        **chance.maybe(0.2, defaultDestinationRuleExportTo=chance.one([["*"], ["."], ["other", "third"]])),
        **chance.maybe(0.3, localityLbSetting=locality(chance)),
        **chance.maybe(0.2, tcpKeepalive={"time": "10s", "probes": 3}),
        **chance.maybe(0.1, defaultTrafficPolicy={"outlierDetection": {"consecutive5xxErrors": 6}}),
        **chance.maybe(0.1, defaultConfig={"concurrency": 2, "tracing": {"sampling": 20}}),
    }
    chance.add("v1", "ConfigMap", None, name="istio", namespace=ROOT)
    del chance.documents[-1]["spec"]
    chance.documents[-1]["data"] = {"mesh": yaml.safe_dump(settings)}


def _defaults(chance: Chance) -> Doc:
    return {
        **chance.maybe(0.6, tracing=[chance.one(["spans", "zip"])]),
        **chance.maybe(0.6, accessLogging=chance.some(["lines", "json", "als"], 1, 2)),
        **chance.maybe(0.4, metrics=chance.one([[], ["prometheus"]])),
    }
