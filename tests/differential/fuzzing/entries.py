"""Random ServiceEntries, WorkloadEntries and Sidecars."""

from __future__ import annotations

from tests.differential.fuzzing.chance import NAMESPACES, NETWORKING, ROOT, Chance, Doc, Host

_HTTP_PORTS = (80, 8000, 9000)
_PROTOCOLS = ("http", "http", "grpc", "http2", "grpc-web")
_PLACES = ("us/east/1", "us/east/2", "us/west", "eu", "asia/south/1")


def service_entry(chance: Chance) -> None:
    """A ServiceEntry: by DNS, of endpoints, or of WorkloadEntries or pods by labels."""
    number = len(chance.documents)
    taken = {host.name for host in chance.hosts}
    names = [
        n
        for n in (f"e{number}.example.com", "a.example.com", "b.example.com", f"vm{number}.mlmesh.internal")
        if n not in taken
    ]
    shape = chance.one(["dns", "dns", "static", "static", "selector", "selector", "none", "dynamic"])
    hosts = chance.some(names, 1, 2)
    if shape == "none":
        hosts = [f"n{number}.original-dst.example.com"]
    elif shape == "dynamic":
        hosts = [f"*.d{number}.example.org"]
    protocols = _PROTOCOLS if shape != "dynamic" else _PROTOCOLS[:4]
    ports = {port: chance.one(protocols) for port in chance.some((*_HTTP_PORTS, 8443), 1, 2)}
    if chance.yes(0.3) and shape not in ("none", "dynamic"):
        # Only one host: bytes are told apart by port.
        hosts, ports = hosts[:1], {**ports, 6000 + number: chance.one(["tcp", "tls", "https"])}
    written = [
        {
            "number": port,
            "name": f"{protocol}-{port}",
            "protocol": protocol.upper(),
            **(chance.maybe(0.3, targetPort=9990) if shape != "none" else {}),
        }
        for port, protocol in ports.items()
    ]
    spec: Doc = {
        "hosts": hosts,
        "ports": written,
        **chance.maybe(0.5, location=chance.one(["MESH_INTERNAL", "MESH_EXTERNAL"])),
    }
    namespace = chance.one(NAMESPACES[:2])
    _endpoints(chance, spec, shape, namespace, number, [item["name"] for item in written])
    spec.update(chance.maybe(0.2, exportTo=chance.one([["."], ["*"], ["other"], [".", "third"]])))
    spec.update(chance.maybe(0.15, subjectAltNames=["spiffe://cluster.local/ns/other/sa/x"]))
    if len(hosts) == 1 and spec["resolution"] in ("STATIC", "NONE") and not hosts[0].startswith("*"):
        spec.update(
            chance.maybe(0.1, addresses=chance.one([[f"240.9.{number % 200}.1"], [f"10.77.{number % 200}.0/24"]]))
        )
    metadata: Doc = {}
    if chance.yes(0.2):
        metadata = {"labels": {"version": "v1", "app": "entry"}}
    chance.add(NETWORKING, "ServiceEntry", spec, namespace=namespace, **metadata)
    chance.hosts += [
        Host(name=h, short="", namespace=namespace, ports=dict(ports), labels={})
        for h in hosts
        if not h.startswith("*")
    ]


def _endpoints(chance: Chance, spec: Doc, shape: str, namespace: str, number: int, names: list[str]) -> None:
    if shape == "none":
        spec["resolution"] = "NONE"
    elif shape == "dynamic":
        spec["resolution"] = "DYNAMIC_DNS"
        spec["location"] = "MESH_EXTERNAL"
    elif shape == "dns":
        spec["resolution"] = chance.one(["DNS", "DNS", "DNS_ROUND_ROBIN"])
        if chance.yes(0.5):
            spec["endpoints"] = [_endpoint(chance, f"d{i}.example.org", names) for i in range(chance.number(1, 3))]
        if spec["resolution"] == "DNS_ROUND_ROBIN":
            spec["endpoints"] = spec.get("endpoints", [])[:1]
    elif shape == "static":
        spec["resolution"] = "STATIC"
        spec["endpoints"] = [
            _endpoint(chance, f"10.1.{number % 200}.{i + 1}", names) for i in range(chance.number(1, 4))
        ]
    else:
        spec["resolution"] = chance.one(["STATIC", "STATIC", "STATIC", "DNS"])
        labels = chance.label() if chance.yes(0.4) else {"app": "vm"}
        spec["workloadSelector"] = {"labels": labels}
        if labels == {"app": "vm"} or chance.yes(0.3):
            for i in range(chance.number(1, 3)):
                address = f"10.2.{number % 200}.{i + 1}" if spec["resolution"] == "STATIC" else f"v{i}.example.org"
                entry = _endpoint(chance, address, names)
                entry["labels"] = {**entry.get("labels", {}), **labels}
                chance.add(NETWORKING, "WorkloadEntry", entry, namespace=namespace)


def workload_entry(chance: Chance) -> None:
    """A WorkloadEntry that Services select, beside pods."""
    host = chance.one([host for host in chance.hosts if host.labels])
    entry = _endpoint(chance, f"10.3.0.{len(chance.documents) % 250 + 1}", [f"{p}-{n}" for n, p in host.ports.items()])
    entry["labels"] = {**entry.get("labels", {}), **host.labels}
    chance.add(NETWORKING, "WorkloadEntry", entry, namespace=host.namespace if chance.yes(0.9) else "third")


def _endpoint(chance: Chance, address: str, names: list[str]) -> Doc:
    labels = {
        **chance.maybe(0.5, version=chance.one(["v1", "v2"])),
        **({"security.istio.io/tlsMode": chance.one(["istio", "istio", "disabled"])} if chance.yes(0.4) else {}),
        **({"istio-locality": "eu.north"} if chance.yes(0.1) else {}),
    }
    return {
        "address": address,
        **({"labels": labels} if labels else {}),
        **chance.maybe(0.3, weight=chance.number(0, 5)),
        **chance.maybe(0.4, locality=chance.one(_PLACES)),
        **chance.maybe(0.2, serviceAccount="vm"),
        **chance.maybe(0.25, ports=dict.fromkeys(chance.some(names, 1, 2), 7777)),
        **chance.maybe(0.05, network="n1"),
    }


def sidecar(chance: Chance) -> None:
    """A Sidecar of a namespace, of workloads or of all."""
    namespace = chance.one([*NAMESPACES[:2], NAMESPACES[0], ROOT])
    of_all = [
        d
        for d in chance.documents
        if d["kind"] == "Sidecar" and d["metadata"]["namespace"] == namespace and "workloadSelector" not in d["spec"]
    ]
    spec: Doc = {}
    if (of_all or chance.yes(0.5)) and namespace != ROOT:
        spec["workloadSelector"] = {"labels": chance.one([{"app": "client"}, chance.label()])}
    elif of_all:
        return
    if chance.yes(0.9):
        spec["egress"] = _egress(chance)
    if "workloadSelector" in spec and chance.yes(0.5) and spec["workloadSelector"]["labels"] != {"app": "client"}:
        spec["ingress"] = _ingress(chance)
        spec.update(
            chance.maybe(
                0.4, inboundConnectionPool={"tcp": {"maxConnections": 7}, "http": {"http1MaxPendingRequests": 3}}
            )
        )
    if "egress" not in spec and "ingress" not in spec:
        spec["egress"] = _egress(chance)
    spec.update(chance.maybe(0.3, outboundTrafficPolicy=_outside(chance)))
    chance.add(NETWORKING, "Sidecar", spec, namespace=namespace)


def _outside(chance: Chance) -> Doc:
    host = chance.http_host()
    proxy = {"host": host.name, "port": {"number": host.http_ports()[0]}}
    return chance.one([{"mode": "REGISTRY_ONLY"}, {"mode": "ALLOW_ANY"}, {"mode": "ALLOW_ANY", "egressProxy": proxy}])


def _egress(chance: Chance) -> list[Doc]:
    scopes = ["./*", "*/*", "other/*", "mlmesh/*", f"{ROOT}/*", "~/*", "*/*.example.com", "*/*.svc.cluster.local"]
    scopes += [f"{chance.one(['.', '*', host.namespace])}/{host.name}" for host in chance.hosts]
    last: Doc = {"hosts": chance.some(scopes[:5] + scopes[6:], 1, 3) if chance.yes(0.95) else ["~/*"]}
    if chance.yes(0.65):
        return [last]
    host = chance.http_host()
    port = chance.one(host.http_ports())
    protocol = host.ports[port]
    own: Doc = {
        "port": {"number": port, "name": protocol, "protocol": protocol.upper()},
        "hosts": chance.one([["*/*"], [f"*/{host.name}"], ["./*"]]),
        **chance.maybe(0.2, captureMode=chance.one(["DEFAULT", "IPTABLES"])),
    }
    return [own, last]


def _ingress(chance: Chance) -> list[Doc]:
    host = chance.one([host for host in chance.hosts if host.labels])
    result = []
    for number in chance.some([n + extra for n in host.ports for extra in (0, 10000)], 1, 2):
        protocol = chance.one(["HTTP", "GRPC", "TCP", "HTTP2"])
        item: Doc = {
            "port": {"number": number, "name": protocol.lower(), "protocol": protocol},
            **chance.maybe(0.8, defaultEndpoint=chance.one(["127.0.0.1:9999", f"127.0.0.1:{number}", "0.0.0.0:8888"])),
            **chance.maybe(
                0.25, connectionPool={"tcp": {"maxConnections": 5}, "http": {"maxRequestsPerConnection": 2}}
            ),
        }
        result.append(item)
    return result
