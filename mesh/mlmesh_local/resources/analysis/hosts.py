"""DestinationRules and ServiceEntries, and the names of Services' ports."""

from __future__ import annotations

from mlmesh_local.resources.analysis.cluster import ALL, Cluster, Item, listed, mapped, scopes

_VERIFIED = ("SIMPLE", "MUTUAL")
_PROTOCOLS = (
    "tcp",
    "udp",
    "grpc",
    "grpc-web",
    "http",
    "http_proxy",
    "http2",
    "https",
    "tls",
    "mongo",
    "redis",
    "mysql",
)
_STANDARD = ("kubernetes.io/h2c", "kubernetes.io/ws", "kubernetes.io/wss")
_WELL_KNOWN = (25, 53, 3306, 27017)
"""Ports that are TCP whatever their name: SMTP, DNS, MySQL, MongoDB."""


def analyze_hosts(cluster: Cluster) -> None:
    """Look at all of them."""
    for item in cluster.items("DestinationRule"):
        _verification(cluster, item)
        _subsets(cluster, item)
    for item in cluster.items("ServiceEntry"):
        _addresses(cluster, item)
    _protocols(cluster)
    for item in cluster.items("Service"):
        _port_names(cluster, item)


def _verification(cluster: Cluster, item: Item) -> None:
    policy = mapped(item.spec.get("trafficPolicy"))
    scoped = item.spec.get("workloadSelector") is not None
    tls = mapped(policy.get("tls"))
    text = "the server's certificate is not checked: the mode needs caCertificates"
    if tls.get("mode") in _VERIFIED and not tls.get("caCertificates") and not (tls.get("credentialName") and scoped):
        cluster.report("IST0128", item, text, "spec", "trafficPolicy", "tls", offline=True)
    for index, port in enumerate(listed(policy.get("portLevelSettings"))):
        tls = mapped(mapped(port).get("tls"))
        if (
            tls.get("mode") in _VERIFIED
            and not tls.get("caCertificates")
            and not (tls.get("credentialName") and scoped)
        ):
            place = ("spec", "trafficPolicy", "portLevelSettings", index, "tls")
            cluster.report("IST0129", item, text, *place, offline=True)


def _subsets(cluster: Cluster, item: Item) -> None:
    host = item.spec.get("host", "")
    known = cluster.destination(host, item)
    if known is None:
        cluster.report("IST0174", item, f'"{host}" is the host of no Service and no ServiceEntry', "spec", "host")
        return
    for index, subset in enumerate(listed(item.spec.get("subsets"))):
        labels = {**known.workload_labels, **mapped(subset.get("labels"))}
        if not cluster.selected(labels):
            text = f'no workload has the labels of the subset "{subset.get("name", "")}"'
            cluster.report("IST0173", item, text, "spec", "subsets", index)


def _addresses(cluster: Cluster, item: Item) -> None:
    if item.spec.get("addresses"):
        return
    for index, port in enumerate(listed(item.spec.get("ports"))):
        if str(port.get("protocol", "")).upper() in {"", "TCP"}:
            text = "a port of protocol TCP needs addresses: connections have no host name"
            cluster.report("IST0134", item, text, "spec", "ports", index, offline=True)


def _protocols(cluster: Cluster) -> None:
    known: dict[tuple[str, str, int], list[tuple[str, Item]]] = {}
    for item in cluster.items("ServiceEntry"):
        for scope in scopes(item.spec.get("exportTo"), item.namespace):
            for host in listed(item.spec.get("hosts")):
                for port in listed(item.spec.get("ports")):
                    entry = (str(port.get("protocol", "")).upper(), item)
                    known.setdefault((scope, host, port.get("number", 0)), []).append(entry)
    reported: set[str] = set()
    for (scope, host, number), own in known.items():
        entries = own if scope == ALL else [*own, *known.get((ALL, host, number), [])]
        protocols = sorted({protocol for protocol, _ in entries})
        if len(protocols) < 2:
            continue
        names = ", ".join(sorted({item.full_name for _, item in entries}))
        for _, item in entries:
            if item.full_name not in reported:
                reported.add(item.full_name)
                text = f'"{host}" port {number} has the protocols {", ".join(protocols)} in {names}'
                cluster.report("IST0177", item, text, "spec", "ports", offline=True)


def _port_names(cluster: Cluster, item: Item) -> None:
    labels = item.meta.labels
    if "istio" in labels or labels.get("release") == "istio" or "gateway.istio.io/managed" in labels:
        return
    external = item.spec.get("type") == "ExternalName"
    for index, port in enumerate(listed(item.spec.get("ports"))):
        name = port.get("name", "")
        if _is_known(port) and not (external and name == "tcp"):
            continue
        if external:
            text = f'the port name "{name}" does not say the protocol of an external service'
            cluster.report("IST0150", item, text, "spec", "ports", index)
        else:
            text = f'the port name "{name}" says no protocol: begin it with grpc, http2, http, tcp or another one'
            cluster.report("IST0118", item, text, "spec", "ports", index)


def _is_known(port: dict[str, object]) -> bool:
    if port.get("protocol") == "UDP":
        return True
    name = str(port.get("appProtocol") if port.get("appProtocol") is not None else port.get("name", ""))
    if port.get("appProtocol") in _STANDARD or name.lower().startswith("grpc-web"):
        return True
    return name.split("-", maxsplit=1)[0].lower() in _PROTOCOLS or port.get("port") in _WELL_KNOWN
