"""Services and workloads of a random world, ServiceEntries, WorkloadEntries, Sidecars and MeshConfig."""

from __future__ import annotations

import yaml

from tests.differential.fuzzing.chance import NAMESPACES, ROOT, Chance, Doc, Host

NETWORKING = "networking.istio.io/v1"
_APPS = ("web", "api", "cart", "db")
_HTTP_PORTS = (80, 8000, 9000)


def base(chance: Chance) -> None:
    """Two to four services with one or two workloads each, a client in each of two namespaces, and a gateway."""
    # Bytes share a sidecar's address: their ports are of one service each.
    bytes_from = 7000
    for app in chance.some(_APPS, 2, 4):
        namespace = chance.one(NAMESPACES[:2])
        ports: dict[int, str] = {}
        for number in chance.some(_HTTP_PORTS, 1, 2):
            ports[number] = chance.one(["http", "http", "grpc", "http2"])
        for _ in range(chance.number(0, 2) if app == "db" else chance.number(0, 1)):
            bytes_from += 1
            ports[bytes_from] = chance.one(["tcp", "tcp", "tls", "https"])
        _service(chance, app, namespace, ports)
    for namespace in NAMESPACES[:2]:
        _deployment(
            chance, f"client-{namespace}", namespace, {"app": "client", "team": chance.one(["red", "blue"])}, []
        )
    _gateway(chance)
    if chance.yes(0.2):
        name = "outside"
        ports = {chance.one(_HTTP_PORTS): "http"}
        spec = {"type": "ExternalName", "externalName": "ext.example.org", "ports": _ports(ports, {})}
        namespace = chance.one(NAMESPACES[:2])
        chance.add("v1", "Service", spec, name=name, namespace=namespace)
        chance.hosts.append(
            Host(name=f"{name}.{namespace}.svc.cluster.local", short=name, namespace=namespace, ports=ports, labels={})
        )


def _ports(ports: dict[int, str], targets: dict[int, int]) -> list[Doc]:
    return [
        {"name": f"{protocol}-{number}", "port": number, **({"targetPort": targets[number]} if targets else {})}
        for number, protocol in ports.items()
    ]


def _service(chance: Chance, app: str, namespace: str, ports: dict[int, str]) -> None:
    targets = {number: chance.one([number, 10000 + number]) for number in ports}
    labels = {"app": app}
    chance.add(
        "v1",
        "Service",
        {"selector": labels, "ports": _ports(ports, targets)},
        name=app,
        namespace=namespace,
        **(
            {"annotations": {"networking.istio.io/exportTo": chance.one([".", "*", "third"])}}
            if chance.yes(0.05)
            else {}
        ),
    )
    chance.hosts.append(
        Host(
            name=f"{app}.{namespace}.svc.cluster.local",
            short=app,
            namespace=namespace,
            ports=dict(ports),
            labels=labels,
        )
    )
    for version in chance.some(["v1", "v2"], 1, 2):
        _deployment(
            chance, f"{app}-{version}", namespace, {**labels, "version": version}, sorted(set(targets.values()))
        )


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


def service_entry(chance: Chance) -> None:
    """A ServiceEntry: by DNS, of endpoints, or of WorkloadEntries or pods by labels."""
    number = len(chance.documents)
    taken = {host.name for host in chance.hosts}
    names = [n for n in (f"e{number}.example.com", "a.example.com", "b.example.com") if n not in taken]
    hosts = chance.some(names, 1, 2)
    ports = {chance.one((*_HTTP_PORTS, 8443)): chance.one(["http", "grpc", "http2"])}
    if chance.yes(0.3):
        # Only one host: bytes are told apart by port.
        hosts, ports = hosts[:1], {**ports, 6000 + number: chance.one(["tcp", "tls"])}
    written = [
        {
            "number": port,
            "name": f"{protocol}-{port}",
            "protocol": protocol.upper(),
            **chance.maybe(0.3, targetPort=9990),
        }
        for port, protocol in ports.items()
    ]
    spec: Doc = {
        "hosts": hosts,
        "ports": written,
        **chance.maybe(0.5, location=chance.one(["MESH_INTERNAL", "MESH_EXTERNAL"])),
    }
    namespace = chance.one(NAMESPACES[:2])
    labels: dict[str, str] = {}
    shape = chance.one(["dns", "dns", "static", "static", "selector"])
    if shape == "dns":
        spec["resolution"] = chance.one(["DNS", "DNS", "DNS_ROUND_ROBIN"])
        if chance.yes(0.4):
            spec["endpoints"] = [_endpoint(chance, f"d{i}.example.org") for i in range(chance.number(1, 2))]
        if spec["resolution"] == "DNS_ROUND_ROBIN":
            spec["endpoints"] = spec.get("endpoints", [])[:1]
    elif shape == "static":
        spec["resolution"] = "STATIC"
        spec["endpoints"] = [_endpoint(chance, f"10.1.{number % 200}.{i + 1}") for i in range(chance.number(1, 3))]
    else:
        spec["resolution"] = "STATIC"
        labels = chance.label() if chance.yes(0.4) else {"app": "vm"}
        spec["workloadSelector"] = {"labels": labels}
        if labels == {"app": "vm"}:
            for i in range(chance.number(1, 2)):
                entry = _endpoint(chance, f"10.2.{number % 200}.{i + 1}")
                entry["labels"] = {"app": "vm", **entry.get("labels", {})}
                chance.add(NETWORKING, "WorkloadEntry", entry, namespace=namespace)
    spec.update(chance.maybe(0.15, exportTo=chance.one([["."], ["*"], ["other"]])))
    spec.update(chance.maybe(0.15, subjectAltNames=["spiffe://cluster.local/ns/other/sa/x"]))
    chance.add(NETWORKING, "ServiceEntry", spec, namespace=namespace)
    chance.hosts += [Host(name=h, short="", namespace=namespace, ports=dict(ports), labels={}) for h in hosts]


def _endpoint(chance: Chance, address: str) -> Doc:
    labels = {
        **chance.maybe(0.5, version=chance.one(["v1", "v2"])),
        **({"security.istio.io/tlsMode": "istio"} if chance.yes(0.3) else {}),
    }
    return {
        "address": address,
        **({"labels": labels} if labels else {}),
        **chance.maybe(0.2, weight=chance.number(1, 5)),
        **chance.maybe(0.3, locality=chance.one(["us/east/1", "us/west", "eu"])),
        **chance.maybe(0.2, serviceAccount="vm"),
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
    if (of_all or chance.yes(0.4)) and namespace != ROOT:
        spec["workloadSelector"] = {"labels": chance.one([{"app": "client"}, chance.label()])}
    elif of_all:
        return
    scopes = ["./*", "*/*", "other/*", "mlmesh/*", f"{ROOT}/*", "~/*", "*/*.example.com"]
    scopes += [f"{chance.one(['.', '*', host.namespace])}/{host.name}" for host in chance.hosts]
    egress: Doc = {"hosts": chance.some(scopes[:5] + scopes[6:], 1, 3) if chance.yes(0.95) else ["~/*"]}
    spec["egress"] = [egress]
    if chance.yes(0.3):
        host = chance.http_host()
        port = chance.one(host.http_ports())
        if chance.yes(0.5):
            protocol = host.ports[port]
            own = {"port": {"number": port, "name": protocol, "protocol": protocol.upper()}, "hosts": ["*/*"]}
            spec["egress"] = [own, egress]
    spec.update(chance.maybe(0.3, outboundTrafficPolicy={"mode": chance.one(["REGISTRY_ONLY", "ALLOW_ANY"])}))
    chance.add(NETWORKING, "Sidecar", spec, namespace=namespace)


def mesh_config(chance: Chance) -> None:
    """MeshConfig with a few settings, and the providers that Telemetry and AuthorizationPolicy may name."""
    # Not an alias: Envoy rejects an authorizer's cluster that is not there.
    host = chance.one([host for host in chance.hosts if host.labels and host.http_ports()])
    port = host.http_ports()[0]
    settings: Doc = {
        "extensionProviders": [
            {"name": "check", "envoyExtAuthzGrpc": {"service": host.name, "port": port}},
            {"name": "ask", "envoyExtAuthzHttp": {"service": host.name, "port": port, "pathPrefix": "/ask"}},
            {"name": "spans", "opentelemetry": {"service": host.name, "port": port}},
            {"name": "lines", "envoyFileAccessLog": {"path": "/dev/stdout"}},
        ],
        **chance.maybe(0.2, outboundTrafficPolicy={"mode": "REGISTRY_ONLY"}),
        **chance.maybe(0.2, defaultHttpRetryPolicy={"attempts": 5, "retryOn": "reset"}),
        **chance.maybe(0.2, connectTimeout="3s"),
        **chance.maybe(0.2, enableAutoMtls=chance.yes(0.3)),
        **chance.maybe(0.2, accessLogFile="/dev/stdout"),
        **chance.maybe(0.2, pathNormalization={"normalization": chance.one(["NONE", "MERGE_SLASHES"])}),
        **chance.maybe(0.2, defaultServiceExportTo=[chance.one(["*", "."])]),
        **chance.maybe(0.2, defaultVirtualServiceExportTo=[chance.one(["*", "."])]),
        **chance.maybe(0.2, defaultDestinationRuleExportTo=[chance.one(["*", "."])]),
        **chance.maybe(0.2, localityLbSetting={"enabled": chance.yes(0.5)}),
        **chance.maybe(0.2, tcpKeepalive={"time": "10s", "probes": 3}),
    }
    chance.add("v1", "ConfigMap", None, name="istio", namespace=ROOT)
    del chance.documents[-1]["spec"]
    chance.documents[-1]["data"] = {"mesh": yaml.safe_dump(settings)}
