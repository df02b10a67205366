"""Gateways: what selects no workload, ports that no Service has, servers that conflict."""

from __future__ import annotations

from typing import Any

from mlmesh_local.resources.analysis.cluster import Cluster, Item, listed, mapped, matches, selector_text


def analyze_gateways(cluster: Cluster) -> None:
    """Look at all of them."""
    gateways = cluster.items("Gateway")
    for item in gateways:
        _ports(cluster, item)
        _certificates(cluster, item, gateways)
        _conflicts(cluster, item, gateways)


def _selector(item: Item) -> dict[str, str]:
    return dict(mapped(item.spec.get("selector")))


def _servers(item: Item) -> list[dict[str, Any]]:
    return [dict(mapped(server)) for server in listed(item.spec.get("servers"))]


def _port(server: dict[str, Any]) -> int:
    return int(mapped(server.get("port")).get("number", 0))


def _ports(cluster: Cluster, item: Item) -> None:
    selector = _selector(item)
    pods = cluster.selected(selector)
    if not pods:
        text = f'no workload has the labels "{selector_text(selector)}"'
        cluster.report("IST0101", item, text, "spec", "selector")
        return
    known: set[int] = set()
    for service in cluster.items("Service"):
        wanted = mapped(service.spec.get("selector"))
        if any(pod.namespace == service.namespace and matches(wanted, pod.labels) for pod in pods):
            for port in listed(service.spec.get("ports")):
                if port.get("protocol", "TCP") == "TCP":
                    target = port.get("targetPort")
                    # A port without a number to target is its own target; with one, Istio takes either.
                    known.add(port.get("port", 0))
                    if isinstance(target, int):
                        known.add(target)
    for index, server in enumerate(_servers(item)):
        if server.get("port") and _port(server) not in known:
            text = f"no Service in front of the workload has the port {_port(server)}"
            cluster.report("IST0162", item, text, "spec", "servers", index, "port")


def _certificates(cluster: Cluster, item: Item, gateways: list[Item]) -> None:
    own = _selector(item)
    for other in gateways:
        if other is item or not matches(own, _selector(other)):
            continue
        if any(
            _same_certificate(mapped(server.get("tls")), mapped(rival.get("tls")))
            for server in _servers(item)
            for rival in _servers(other)
            if server.get("tls") and rival.get("tls")
        ):
            text = f"{other.full_name} shows the same certificate: clients that reuse connections may get 404"
            cluster.report("IST0138", item, text, offline=True)


def _same_certificate(one: Any, other: Any) -> bool:
    names = one.get("credentialName"), other.get("credentialName")
    if all(names):
        return bool(names[0] == names[1])
    if any(names):
        return False
    keys = ("serverCertificate", "privateKey")
    return all(one.get(key) and one.get(key) == other.get(key) for key in keys)


def _conflicts(cluster: Cluster, item: Item, gateways: list[Item]) -> None:
    selector = _selector(item)
    own_text = selector_text(selector)
    near = [other for other in gateways if other is not item and _meet(cluster, selector, own_text, other)]
    for index, server in enumerate(_servers(item)):
        hosts = listed(server.get("hosts"))
        rivals = {
            other.full_name
            for other in near
            for rival in _servers(other)
            if _port(rival) == _port(server)
            and server.get("bind", "") == rival.get("bind", "")
            and set(hosts) & set(listed(rival.get("hosts")))
        }
        if rivals:
            text = f"port {_port(server)} and hosts {', '.join(hosts)} are also those of {', '.join(sorted(rivals))}"
            cluster.report("IST0145", item, text, "spec", "servers", index)


def _meet(cluster: Cluster, selector: dict[str, str], text: str, other: Item) -> bool:
    """Whether two Gateways are served by one workload."""
    theirs = _selector(other)
    their_text = selector_text(theirs)
    if text == their_text:
        return True
    if text not in their_text and their_text not in text:
        return False
    return any(matches(theirs, pod.labels) for pod in cluster.selected(selector))
