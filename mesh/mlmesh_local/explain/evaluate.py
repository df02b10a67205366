"""One call, from the application to the application: which rule decides, and what becomes of it.

    scene = Scene(world, now_s=time.time())
    explanation = explain(scene, Call(source="toolbox", host="inference", path="/pkg.Service/Method"))

Everything is read from the configuration that Envoy is given, and evaluated as Envoy does. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.answers import answered, http_as_grpc, location
from mlmesh_local.explain.asking import (
    Call,
    called_gateway,
    called_port,
    calling_sidecar,
    check,
    gateway_names,
    near_miss,
    request_of,
    told,
)
from mlmesh_local.explain.chains import TCP_PROXY, chain_of, network_filter
from mlmesh_local.explain.destinations import destination
from mlmesh_local.explain.filters import http_filters, kind_of, pass_filters
from mlmesh_local.explain.not_given import not_given, without_weight
from mlmesh_local.explain.policies import GRPC_CODES, faults, header_edits, retries, telemetry, timeout
from mlmesh_local.explain.requests import Request, edited, rewritten
from mlmesh_local.explain.routing import Tried, choose, describe_match, most_specific, share, virtual_host
from mlmesh_local.explain.scene import Scene, listening_at, manager_of
from mlmesh_local.explain.streams import streams
from mlmesh_local.explain.values import (
    Check,
    Decided,
    Destination,
    Explanation,
    Faulty,
    Mirrored,
    Outcome,
    Rejected,
)
from mlmesh_local.model import ProxyNode

FAULT_KIND = "HTTPFault"


def explain(scene: Scene, call: Call) -> Explanation:
    """Explain a call. Raises NotFound, InvalidInput when it names what is not there."""
    check(call)
    proxy = called_gateway(scene, call) if call.gateway else calling_sidecar(scene, call)
    port = called_port(scene, proxy, call)
    request = request_of(scene, call, proxy, port)
    listener = listening_at(
        scene.listeners(proxy), "OUTBOUND", port, "" if call.gateway else proxy.outbound_address
    ) or listening_at(scene.listeners(proxy), "OUTBOUND", port)
    miss = near_miss(scene, proxy, call, port)
    why = "; ".join(text for text in (f"{proxy.id} does not listen for port {port}", miss) if text)
    base = Explanation(
        call=told(call, proxy, port, request),
        proxy=proxy.id,
        listener=str(listener["name"]) if listener else "",
        virtual_host="",
        outcome=Outcome(kind="no_listener", code="UNAVAILABLE", why=why),
        notes=(miss,) if miss else (),
    )
    if listener is None:
        return base
    chain = chain_of(listener, request)
    if chain is None:
        why = "no filter chain of the listener takes such a connection: it is closed"
        return dataclasses.replace(base, outcome=Outcome(kind="tls_failed", code="UNAVAILABLE", why=why))
    manager = manager_of(chain)
    if manager is None:
        return _bytes(scene, proxy, chain, request, base)
    return _http(scene, proxy, manager, request, base)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hit:
    """A route, and what it stands in."""

    proxy: ProxyNode
    manager: Json
    configuration: Json
    host: Json
    route: Json

    @property
    def action(self) -> Json:
        result: Json = self.route.get("route", {})
        return result

    @property
    def levels(self) -> tuple[Json, ...]:
        """The most specific first."""
        return (self.route, self.host, self.configuration)


def _http(scene: Scene, proxy: ProxyNode, manager: Json, request: Request, base: Explanation) -> Explanation:
    configuration = scene.route_configuration(proxy, manager)
    host = virtual_host(configuration, request.authority) or {}
    secured = _https_first(host, request)
    _, first = choose(host, request)
    # Filters run with the route of the request as it came; claims that they find may choose another. Without a route
    # they run, too, as the listener has them.
    passed = pass_filters(
        http_filters(manager, scene.extensions(proxy)),
        (first, host, configuration) if first is not None and secured is None else (),
        request,
        scene.provenance,
        now_s=scene.now_s,
    )
    if secured is not None or not host:
        why = f'no virtual host is for "{request.authority}"'
        nowhere = Outcome(kind="no_route", code="UNIMPLEMENTED", why=why, http=404)
        return dataclasses.replace(
            base,
            virtual_host=str(host.get("name", "")),
            checks=passed.checks,
            outcome=passed.ended or secured or nowhere,
        )
    tried, route = choose(host, passed.request)
    gateway = next(iter(gateway_names(scene, proxy)), "") if proxy.kind == "gateway" else "mesh"
    base = dataclasses.replace(
        base,
        virtual_host=str(host.get("name", "")),
        rejected=(
            *_rejected(scene, tried),
            *not_given(scene, proxy, host, gateway, port=int(base.call["port"])),
        ),
        checks=passed.checks,
        telemetry=tuple(telemetry(manager, route or {})),
    )
    if route is not None:
        decided = Decided(
            route=str(route.get("name", "")),
            place=scene.provenance.of_route(route),
            matches=describe_match(route.get("match", {})),
        )
        base = dataclasses.replace(base, route=decided)
    if passed.ended:
        return dataclasses.replace(base, outcome=passed.ended)
    if route is None:
        return dataclasses.replace(
            base, outcome=Outcome(kind="no_route", code="UNIMPLEMENTED", why="no rule of the host takes it", http=404)
        )
    hit = _Hit(proxy=proxy, manager=manager, configuration=configuration, host=host, route=route)
    return _routed(scene, hit, passed.request, base)


def _https_first(host: Json, request: Request) -> Outcome | None:
    """The redirect of a gateway's server that takes HTTPS only (httpsRedirect)."""
    if host.get("require_tls", "NONE") == "NONE" or request.headers.get(":scheme") == "https":
        return None
    place = location({"https_redirect": True}, {}, request)
    why = f"the gateway's server asks for HTTPS (httpsRedirect): it redirects to {place}"
    return Outcome(kind="redirected", code=http_as_grpc(301), why=why, http=301, location=place)


def _routed(scene: Scene, hit: _Hit, request: Request, base: Explanation) -> Explanation:
    if "direct_response" in hit.route or "redirect" in hit.route:
        return dataclasses.replace(
            base, outcome=answered(hit.route, request), headers=tuple(header_edits(hit.levels, {}))
        )
    action = hit.action
    found = tuple(_destinations(scene, hit, request))
    fault = faults(_fault_config(scene, hit))
    timed = timeout(action, request)
    return dataclasses.replace(
        base,
        destinations=found,
        mirrors=tuple(_mirrors(scene, action, hit.proxy)),
        retries=retries(action, hit.host),
        timeout=timed,
        faults=fault,
        headers=tuple(header_edits(hit.levels, action)),
        streams=tuple(streams(hit.manager, action, timed, found)),
        notes=(*base.notes, *without_weight(scene, hit.route)),
        outcome=_outcome(found, fault),
    )


def _destinations(scene: Scene, hit: _Hit, request: Request) -> Iterator[Destination]:
    action = hit.action
    if "weighted_clusters" in action:
        entries = [one for one in action["weighted_clusters"].get("clusters", ()) if _weight(one)]
    else:
        name = action.get("cluster") or request.headers.get(str(action.get("cluster_header", "")).lower(), "")
        entries = [{"name": name, "weight": 1}]
    total = sum(_weight(one) for one in entries)
    for entry in entries:
        sent = edited(request, (entry, *hit.levels))
        sent = rewritten(sent, hit.route.get("match", {}), action, entry)
        found = destination(
            scene,
            hit.proxy,
            str(entry["name"]),
            sent,
            action,
            weight=_weight(entry),
            share=_weight(entry) / total,
        )
        yield dataclasses.replace(found, headers=tuple(header_edits((entry,), entry)))


def _weight(entry: Json) -> int:
    weight = entry.get("weight", 0)
    return int(weight.get("value", 0) if isinstance(weight, dict) else weight)


def _mirrors(scene: Scene, action: Json, proxy: ProxyNode) -> Iterator[Mirrored]:
    for mirror in action.get("request_mirror_policies", ()):
        fraction = mirror.get("runtime_fraction", {}).get("default_value")
        name = str(mirror.get("cluster", ""))
        cluster = scene.clusters(proxy).get(name, {})
        yield Mirrored(
            cluster=name,
            share=1.0 if fraction is None else share(fraction),
            rule=scene.provenance.of_config(cluster.get("metadata", {}), "spec"),
        )


def _fault_config(scene: Scene, hit: _Hit) -> Json | None:
    for name, config in http_filters(hit.manager, scene.extensions(hit.proxy)):
        if kind_of(config) == FAULT_KIND:
            return most_specific(name, *hit.levels) or config
    return None


def _outcome(found: tuple[Destination, ...], fault: Faulty | None) -> Outcome:
    if fault and fault.abort_share >= 1:
        why = "a fault on purpose ends every such call"
        return Outcome(kind="aborted", code=fault.abort_code, why=why, http=fault.abort_http)
    kinds = {one.outcome.kind for one in found}
    if not found:
        return Outcome(kind="no_cluster", code="UNAVAILABLE", why="every destination has the weight 0")
    if len(kinds) == 1:
        return found[0].outcome
    parts = ", ".join(f"{one.share:.0%} {one.outcome.kind}" for one in found)
    bad = next(one for one in found if one.outcome.kind != "routed")
    return dataclasses.replace(bad.outcome, kind="mixed", why=f"destinations differ: {parts}; {bad.outcome.why}")


def _rejected(scene: Scene, tried: list[Tried]) -> Iterator[Rejected]:
    for one in tried:
        if one.mismatch:
            yield Rejected(
                route=str(one.route.get("name", "")),
                place=scene.provenance.of_route(one.route),
                matches=describe_match(one.route.get("match", {})),
                why=one.mismatch,
            )


def _closed(one: Destination) -> Destination:
    """Of bytes: a call that is refused gets no status, its connection is closed."""
    return dataclasses.replace(one, outcome=dataclasses.replace(one.outcome, http=0))


def _bytes(scene: Scene, proxy: ProxyNode, chain: Json, request: Request, base: Explanation) -> Explanation:
    raw = network_filter(chain, TCP_PROXY)
    if raw is None:
        return dataclasses.replace(base, outcome=Outcome(kind="unknown", code="UNKNOWN", why="the chain has no proxy"))
    entries = raw.get("weighted_clusters", {}).get("clusters") or [{"name": raw.get("cluster", ""), "weight": 1}]
    total = sum(_weight(one) for one in entries) or 1
    found = tuple(
        _closed(
            destination(scene, proxy, str(one["name"]), request, {}, weight=_weight(one), share=_weight(one) / total)
        )
        for one in entries
    )
    note = "the port carries bytes, not requests: methods and headers are not seen, and nothing is retried"
    return dataclasses.replace(
        base,
        route=Decided(route=str(chain.get("name", "")), place=scene.provenance.of_route(chain), matches="connections"),
        destinations=found,
        outcome=_outcome(found, None),
        notes=(*base.notes, note),
    )


__all__ = ["GRPC_CODES", "Call", "Check", "explain"]
