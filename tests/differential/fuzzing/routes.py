"""Random VirtualServices: of the mesh, of gateways, with delegates, and of connections."""

from __future__ import annotations

import fnmatch
from typing import Any

from tests.differential.fuzzing.chance import NAMESPACES, NETWORKING, Chance, Doc, Host
from tests.differential.fuzzing.gateways import HOSTS
from tests.differential.fuzzing.http import rule


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
    if chance.yes(0.15):
        names.append(
            chance.one(
                [
                    "*.example.com",
                    "*.other.svc.cluster.local",
                    "*.mlmesh.svc.cluster.local",
                    "unknown.example.net",
                    "*.local",
                    "nobody",
                ]
            )
        )
    if at_gateway:
        some = chance.some(HOSTS[: 5 if in_mesh else 6], 1, 2)
        names = some if not in_mesh or chance.yes(0.5) else [*some, *names]
    spec: Doc = {"hosts": _apart(names)}
    if gateways:
        gateways = [*gateways, *(["mesh"] if in_mesh else [])]
        spec["gateways"] = gateways
    delegates = _delegates(chance, namespace)
    targets = [host for host in chance.hosts if host.byte_ports()]
    if chance.yes(0.85) or not targets:
        spec["http"] = [rule(chance, namespace, gateways, delegates) for _ in range(chance.number(1, 4))]
    if targets and ("http" not in spec or chance.yes(0.3)):
        _layer4(chance, spec, namespace, targets)
    if not spec.keys() & {"http", "tls", "tcp"}:
        spec["http"] = [rule(chance, namespace, gateways, delegates)]
    spec.update(chance.maybe(0.15, exportTo=chance.one([["."], ["*"], ["other"], [".", "third"], ["mlmesh", "other"]])))
    chance.add(NETWORKING, "VirtualService", spec, namespace=namespace)


def _delegates(chance: Chance, namespace: str) -> list[Doc]:
    found: list[Doc] = []
    for _ in range(chance.number(1, 2) if chance.yes(0.2) else 0):
        where = chance.one([namespace, *NAMESPACES[:2]])
        spec: Doc = {"http": [rule(chance, where, [], [], delegate=True) for _ in range(chance.number(1, 3))]}
        spec.update(chance.maybe(0.1, exportTo=["."]))
        document = chance.add(NETWORKING, "VirtualService", spec, namespace=where)
        short = where == namespace and chance.yes(0.5)
        found.append({"name": document["metadata"]["name"], **({} if short else {"namespace": where})})
    return found


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
    route = _shares(chance, host, port, written, targets, namespace)
    if host.ports[port] == "tcp":
        match: Doc = {
            **chance.maybe(0.5, port=port),
            **chance.maybe(0.3, sourceLabels={"app": "client"}),
            **chance.maybe(0.2, sourceNamespace=chance.one(NAMESPACES[:2])),
            **chance.maybe(0.2, gateways=["mesh"]),
        }
        spec["tcp"] = [{**({"match": [match]} if match else {}), "route": route}]
        if match and chance.yes(0.3):
            spec["tcp"].append({"route": _shares(chance, host, port, written, targets, namespace)})
    elif not any(name == "*" for name in spec["hosts"]):
        sni = [name for name in spec["hosts"] if "." in name][:2] or ["s.example.com"]
        if sni == ["s.example.com"]:
            spec["hosts"] = _apart([*spec["hosts"], *sni])
        if any(set(sni) & set(other) and sni != other for other in chance.server_names):
            # Envoy rejects chains of one address that overlap: Istio then makes what no proxy takes.
            return
        chance.server_names.append(sni)
        match = {
            "sniHosts": sni,
            **chance.maybe(0.5, port=port),
            **chance.maybe(0.2, sourceLabels={"app": "client"}),
            **chance.maybe(0.2, sourceNamespace=chance.one(NAMESPACES[:2])),
        }
        spec["tls"] = [{"match": [match], "route": route}]


def _shares(chance: Chance, host: Host, port: int, written: str, targets: list[Host], namespace: str) -> list[Any]:
    route: list[Any] = [{"destination": {"host": written, "port": {"number": port}}}]
    if host.subsets and chance.yes(0.6):
        route[0]["destination"]["subset"] = chance.one(host.subsets)
    if chance.yes(0.3):
        other = chance.one(targets)
        there = {"host": chance.host_as_written(other, namespace), "port": {"number": other.byte_ports()[0]}}
        route.append({"destination": there})
        for item, weight in zip(route, chance.one([(30, 70), (100, 0), (1, 1)]), strict=True):
            item["weight"] = weight
    return route
