"""Rules of VirtualServices that this proxy was not given: those of other clients, gateways and ports, and unreachable
ones. Envoy has never heard of them, so that only the resources tell why.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.scene import Scene
from mlmesh_local.explain.values import Place, Rejected
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import full_gateway, selects
from mlmesh_local.resources.model import HttpMatch, VirtualService


def not_given(scene: Scene, proxy: ProxyNode, host: Json, gateway: str, *, port: int) -> Iterator[Rejected]:
    """Rules of the VirtualServices behind a virtual host whose routes the proxy does not have."""
    given = _given(host)
    names = dict.fromkeys(name for name, _, _ in given)
    for service in scene.view.resources.specs(VirtualService):
        name = f"{service.meta.namespace}/{service.meta.name}"
        if name not in names:
            continue
        for index, rule in enumerate(service.http):
            for number, match in enumerate(rule.matches or (None,)):
                if (name, index, number) in given or (name, index, -1) in given:
                    continue
                why = _why(match, proxy, gateway, service.meta.namespace, port)
                path: tuple[str | int, ...] = ("spec", "http", index)
                if match is not None:
                    path = (*path, "match", number)
                place: Place = scene.provenance.place("VirtualService", name, *path)
                yield Rejected(route=rule.name, place=place, matches="", why=why)


def without_weight(scene: Scene, route: Json) -> Iterator[str]:
    """Destinations of a route's rule that have the weight 0: Envoy has never heard of them."""
    place = scene.provenance.of_route(route)
    index = route.get("metadata", {}).get("filter_metadata", {}).get("mlmesh", {}).get("rule")
    if place is None or index is None:
        return
    for service in scene.view.resources.specs(VirtualService):
        if f"{service.meta.namespace}/{service.meta.name}" == place.name and int(index) < len(service.http):
            rule = service.http[int(index)]
            if len(rule.destinations) > 1:
                idle = [one.destination for one in rule.destinations if not one.weight]
                yield from (f"{one.subset or one.host} has the weight 0 in this rule: it gets nothing" for one in idle)


def _given(host: Json) -> set[tuple[str, int, int]]:
    found: set[tuple[str, int, int]] = set()
    for route in host.get("routes", ()):
        metadata = route.get("metadata", {}).get("filter_metadata", {})
        parts = str(metadata.get("istio", {}).get("config", "")).split("/")
        own = metadata.get("mlmesh", {})
        if len(parts) == 8 and "rule" in own:
            match = own.get("match")
            found.add((f"{parts[5]}/{parts[7]}", int(own["rule"]), -1 if match is None else int(match)))
    return found


def _why(match: HttpMatch | None, proxy: ProxyNode, gateway: str, namespace: str, port: int) -> str:
    if match is not None:
        if match.port and match.port != port:
            return f"it is for port {match.port}"
        if match.gateways:
            named = {full_gateway(name, namespace) for name in match.gateways}
            if gateway not in named:
                return f"it is for the gateways {', '.join(sorted(named))}"
        elif not selects(match.source_labels, proxy.labels):
            wanted = ", ".join(f"{key}={value}" for key, value in match.source_labels.items())
            return f"it is for clients with the labels {wanted}"
        elif match.source_namespace not in ("", proxy.namespace):
            return f"it is for clients of the namespace {match.source_namespace}"
    return "it is not reached: an earlier rule takes everything"
