"""One call, from the application to the application: which rule decides, and what becomes of it.

    scene = Scene(world, now_s=time.time())
    explanation = explain(scene, Call(source="toolbox", host="inference", path="/pkg.Service/Method"))

Everything is read from the configuration that Envoy is given, and evaluated as Envoy does. Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.chains import TCP_PROXY, chain_of, network_filter
from mlmesh_local.explain.destinations import destination
from mlmesh_local.explain.filters import http_filters, kind_of, pass_filters
from mlmesh_local.explain.not_given import not_given, without_weight
from mlmesh_local.explain.policies import GRPC_CODES, faults, header_edits, http_as_grpc, retries, telemetry, timeout
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
from mlmesh_local.inspection import find_proxies
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.domains import is_ip
from mlmesh_local.resources.gateway_api.listeners import INTERNAL_NAME
from mlmesh_runtime.errors import InvalidInput, NotFound

FAULT_KIND = "HTTPFault"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is asked about.

    Attributes:
        source: workload or instance that calls; empty for a client outside, who comes in at a gateway.
        host: as the application writes it; short names are completed by the namespace of the caller.
        port: service port; 0 for the only one, or the one that speaks gRPC.
        path: "/package.Service/Method".
        headers: further ones, any case; ":method" and others may be given, too.
        gateway: name of a Gateway resource, or of a gateway's workload, at which the call arrives.
        identity: SPIFFE id in the certificate that a client outside shows at the gateway.
    """

    source: str = ""
    host: str = ""
    port: int = 0
    path: str = "/"
    headers: Mapping[str, str] = field(default_factory=dict)
    gateway: str = ""
    identity: str = ""
    source_ip: str = "127.0.0.1"


def explain(scene: Scene, call: Call) -> Explanation:
    """Explain a call. Raises NotFound, InvalidInput when it names what is not there."""
    _check(call)
    proxy = _gateway(scene, call) if call.gateway else _sidecar(scene, call)
    port = _port(scene, proxy, call)
    request = _request(scene, call, proxy, port)
    listener = listening_at(
        scene.listeners(proxy), "OUTBOUND", port, "" if call.gateway else proxy.outbound_address
    ) or listening_at(scene.listeners(proxy), "OUTBOUND", port)
    base = Explanation(
        call=_told(call, proxy, port, request),
        proxy=proxy.id,
        listener=str(listener["name"]) if listener else "",
        virtual_host="",
        outcome=Outcome(kind="no_listener", code="UNAVAILABLE", why=f"{proxy.id} does not listen for port {port}"),
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
    host = virtual_host(configuration, request.authority)
    if host is None:
        why = f'no virtual host is for "{request.authority}"'
        return dataclasses.replace(base, outcome=Outcome(kind="no_route", code="UNIMPLEMENTED", why=why))
    _, first = choose(host, request)
    # Filters run with the route of the request as it came; claims that they find may choose another.
    passed = pass_filters(
        http_filters(manager, scene.extensions(proxy)),
        (first or {}, host, configuration),
        request,
        scene.provenance,
        now_s=scene.now_s,
    )
    tried, route = choose(host, passed.request)
    gateway = next(iter(_gateway_names(scene, proxy)), "") if proxy.kind == "gateway" else "mesh"
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
            base, outcome=Outcome(kind="no_route", code="UNIMPLEMENTED", why="no rule of the host takes it")
        )
    hit = _Hit(proxy=proxy, manager=manager, configuration=configuration, host=host, route=route)
    return _routed(scene, hit, passed.request, base)


def _routed(scene: Scene, hit: _Hit, request: Request, base: Explanation) -> Explanation:
    if "direct_response" in hit.route or "redirect" in hit.route:
        return dataclasses.replace(base, outcome=_answered(hit.route))
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
        notes=tuple(without_weight(scene, hit.route)),
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
        yield destination(
            scene,
            hit.proxy,
            str(entry["name"]),
            sent,
            action,
            weight=_weight(entry),
            share=_weight(entry) / total,
        )


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


def _answered(route: Json) -> Outcome:
    if "redirect" in route:
        return Outcome(kind="redirected", code="UNKNOWN", why="the route redirects; gRPC clients do not follow that")
    answer = route["direct_response"]
    text = str(answer.get("body", {}).get("inline_string", ""))
    why = f"the proxy answers HTTP {answer.get('status', 0)} itself" + (f": {text}" if text else "")
    return Outcome(kind="answered", code=http_as_grpc(int(answer.get("status", 0))), why=why)


def _outcome(found: tuple[Destination, ...], fault: Faulty | None) -> Outcome:
    if fault and fault.abort_share >= 1:
        return Outcome(kind="aborted", code=fault.abort_code, why="a fault on purpose ends every such call")
    kinds = {one.outcome.kind for one in found}
    if not found:
        return Outcome(kind="no_cluster", code="UNAVAILABLE", why="every destination has the weight 0")
    if len(kinds) == 1:
        return found[0].outcome
    parts = ", ".join(f"{one.share:.0%} {one.outcome.kind}" for one in found)
    bad = next(one for one in found if one.outcome.kind != "routed")
    return Outcome(kind="mixed", code=bad.outcome.code, why=f"destinations differ: {parts}; {bad.outcome.why}")


def _rejected(scene: Scene, tried: list[Tried]) -> Iterator[Rejected]:
    for one in tried:
        if one.mismatch:
            yield Rejected(
                route=str(one.route.get("name", "")),
                place=scene.provenance.of_route(one.route),
                matches=describe_match(one.route.get("match", {})),
                why=one.mismatch,
            )


def _bytes(scene: Scene, proxy: ProxyNode, chain: Json, request: Request, base: Explanation) -> Explanation:
    raw = network_filter(chain, TCP_PROXY)
    if raw is None:
        return dataclasses.replace(base, outcome=Outcome(kind="unknown", code="UNKNOWN", why="the chain has no proxy"))
    entries = raw.get("weighted_clusters", {}).get("clusters") or [{"name": raw.get("cluster", ""), "weight": 1}]
    total = sum(_weight(one) for one in entries) or 1
    found = tuple(
        destination(scene, proxy, str(one["name"]), request, {}, weight=_weight(one), share=_weight(one) / total)
        for one in entries
    )
    note = "the port carries bytes, not requests: methods and headers are not seen, and nothing is retried"
    return dataclasses.replace(
        base,
        route=Decided(route=str(chain.get("name", "")), place=scene.provenance.of_route(chain), matches="connections"),
        destinations=found,
        outcome=_outcome(found, None),
        notes=(note,),
    )


# Who, where, what


def _check(call: Call) -> None:
    if not call.host:
        raise InvalidInput("name the host that is called, such as inference:9000", field="to")
    if not call.path.startswith("/"):
        raise InvalidInput(f'a method is "/package.Service/Method", not "{call.path}"', field="method")
    if not is_ip(call.source_ip):
        raise InvalidInput(f'"{call.source_ip}" is no IP address, such as 10.1.2.3', field="source_ip")
    if call.identity and not call.identity.startswith("spiffe://"):
        raise InvalidInput(
            f'an identity is spiffe://DOMAIN/ns/NAMESPACE/sa/NAME, not "{call.identity}"', field="identity"
        )


def _sidecar(scene: Scene, call: Call) -> ProxyNode:
    if not call.source:
        raise InvalidInput("name the workload that calls, or the gateway at which the call arrives", field="from")
    proxy = find_proxies(scene.world, call.source)[0]
    if proxy.kind == "gateway":
        raise InvalidInput(f"{call.source} is a gateway: name it as the gateway of the call", field="from")
    return proxy


def _gateway(scene: Scene, call: Call) -> ProxyNode:
    wanted = call.gateway
    for proxy in scene.world.proxies:
        if proxy.kind == "gateway" and wanted in _gateway_names(scene, proxy, short=True):
            return proxy
    proxies = [proxy for proxy in scene.world.proxies if proxy.kind == "gateway"]
    names = sorted({_as_written(name) for proxy in proxies for name in _gateway_names(scene, proxy)})
    raise NotFound(
        f'no gateway is called "{wanted}"; there are {", ".join(names) or "none"}', reason="RESOURCE_NOT_FOUND"
    )


def _gateway_names(scene: Scene, proxy: ProxyNode, *, short: bool = False) -> list[str]:
    """Gateway resources that a proxy serves; `short` with their names alone, and its own."""
    names: list[str] = []
    for gateway in scene.view.gateways(proxy):
        names.append(f"{gateway.meta.namespace}/{gateway.meta.name}")
        if short:
            names.append(gateway.meta.name)
    if short:
        workload = proxy.id.rpartition("-")[0]
        names += [_as_written(name) for name in names]
        names += [proxy.id, workload, f"{proxy.namespace}/{workload}"]
    return names


def _as_written(gateway: str) -> str:
    """The name of the Kubernetes Gateway that a Gateway was made of; any other stays."""
    return gateway.partition(f"~{INTERNAL_NAME}")[0]


def _port(scene: Scene, proxy: ProxyNode, call: Call) -> int:
    if call.port:
        return call.port
    if call.gateway:
        ports = sorted({int(one["address"]["socket_address"]["port_value"]) for one in scene.listeners(proxy)})
        if len(ports) == 1:
            return ports[0]
        raise InvalidInput(f"the gateway listens on {', '.join(map(str, ports)) or 'no port'}: name one", field="to")
    service = scene.view.services.get(_full(scene, proxy, call.host))
    if service is None:
        known = ", ".join(scene.view.services) or "none"
        raise NotFound(f'no service is called "{call.host}"; there are {known}', reason="RESOURCE_NOT_FOUND")
    ports = [port.number for port in service.ports]
    grpc = [port.number for port in service.ports if port.protocol == "grpc"]
    for candidates in (ports, grpc):
        if len(candidates) == 1:
            return candidates[0]
    raise InvalidInput(f"{service.host} has the ports {', '.join(map(str, ports))}: name one, HOST:PORT", field="to")


def _full(scene: Scene, proxy: ProxyNode, host: str) -> str:
    """A service's full name from what a pod's DNS would complete."""
    suffix = f"svc.{scene.world.domain}"
    candidates = (host, f"{host}.{proxy.namespace}.{suffix}", f"{host}.{suffix}", f"{host}.{scene.world.domain}")
    return next((name for name in candidates if name in scene.view.services), host)


def _request(scene: Scene, call: Call, proxy: ProxyNode, port: int) -> Request:
    headers = {
        ":method": "POST",
        ":scheme": "https" if call.gateway else "http",
        ":path": call.path,
        ":authority": call.host if call.gateway else f"{call.host}:{port}",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    for name, value in call.headers.items():
        key = name.lower()
        key = ":authority" if key == "host" else key
        headers[key] = value
    identity = call.identity
    if call.gateway and call.source and not identity:
        identity = scene.identity(find_proxies(scene.world, call.source)[0])
    secure = bool(call.gateway) and _is_secure(scene, proxy, port)
    return Request(
        headers=headers,
        peer=identity if secure else "",
        tls=secure,
        sni=call.host if secure else "",
        alpn=("h2",) if secure else (),
        source=call.source_ip,
        destination=proxy.pod_address if call.gateway else proxy.outbound_address,
        port=port,
    )


def _is_secure(scene: Scene, proxy: ProxyNode, port: int) -> bool:
    listener = listening_at(scene.listeners(proxy), "OUTBOUND", port)
    return any("transport_socket" in chain for chain in (listener or {}).get("filter_chains", ()))


def _told(call: Call, proxy: ProxyNode, port: int, request: Request) -> dict[str, object]:
    extra = {name: value for name, value in request.headers.items() if name not in _USUAL}
    return {
        "from": call.source,
        "at_gateway": call.gateway,
        "to": call.host,
        "port": port,
        "method": request.path,
        "headers": extra,
        "namespace": proxy.namespace,
    }


_USUAL = frozenset({":method", ":scheme", ":path", ":authority", "content-type", "te"})

__all__ = ["GRPC_CODES", "Call", "Check", "explain"]
