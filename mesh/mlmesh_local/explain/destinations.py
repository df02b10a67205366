"""Clusters: their endpoints, how one is chosen, what bounds connections, and what happens at the other end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.answers import http_as_grpc
from mlmesh_local.explain.durations import number, seconds, text
from mlmesh_local.explain.requests import USUAL, Request
from mlmesh_local.explain.scene import Scene
from mlmesh_local.explain.servers import Dialed, Served, client_context, serve
from mlmesh_local.explain.values import Destination, EndpointSeen, Outcome, Place, Sent
from mlmesh_local.model import ProxyNode
from mlmesh_local.translate.names import BLACK_HOLE

UNBOUNDED = 2**32 - 1
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_BREAKERS = {
    "max_connections": "connections",
    "max_pending_requests": "pending_requests",
    "max_requests": "requests",
    "max_retries": "retries",
}


def destination(
    scene: Scene, proxy: ProxyNode, name: str, request: Request, action: Json, *, weight: int, share: float
) -> Destination:
    """One cluster as a proxy knows it, and what becomes of the request there."""
    cluster = scene.clusters(proxy).get(name)
    _, port, subset, host = name.split("|") if name.count("|") == 3 else ("", "0", "", name)
    found = list(_endpoints(scene, proxy, cluster or {}))
    served = _served(scene, proxy, cluster, found, request, action=action)
    return Destination(
        cluster=name,
        host=host,
        port=int(port or 0),
        subset=subset,
        share=share,
        weight=weight,
        rule=_rule(scene, cluster or {}, subset),
        load_balancer=_balancer(cluster or {}, action),
        circuit_breakers=_breakers(cluster or {}),
        outlier_detection=_outlier(cluster or {}),
        connections=tuple(_connections(cluster or {})),
        endpoints=tuple(seen for seen, _ in found),
        tls=served.tls,
        checks=served.checks,
        outcome=served.outcome,
        sent=_sent(request),
    )


def _sent(request: Request) -> Sent:
    headers = {name: value for name, value in request.headers.items() if name not in USUAL}
    method = request.headers.get(":method", "")
    return Sent(method=method, path=request.path, authority=request.authority, headers=headers)


def _served(
    scene: Scene,
    proxy: ProxyNode,
    cluster: Json | None,
    found: list[tuple[EndpointSeen, Json]],
    request: Request,
    *,
    action: Json,
) -> Served:
    if cluster is None:
        why = "the route names a cluster that this proxy does not know"
        http = 500 if action.get("cluster_not_found_response_code") == "INTERNAL_SERVER_ERROR" else 503
        outcome = Outcome(kind="no_cluster", code=http_as_grpc(http), why=why, http=http)
        return Served(tls=None, checks=(), outcome=outcome)
    if not found and cluster.get("type") != "ORIGINAL_DST" and "cluster_type" not in cluster:
        why = "no endpoint is ready" if cluster["name"] != BLACK_HOLE else "the destination does not exist"
        return Served(tls=None, checks=(), outcome=Outcome(kind="no_endpoint", code="UNAVAILABLE", why=why, http=503))
    results: list[Served] = []
    workloads: set[str] = set()
    for seen, endpoint in found:
        address, _, port = seen.address.rpartition(":")
        server = scene.at(address)
        # Replicas are configured alike: one of each workload tells of all.
        key = server.id.rpartition("-")[0] if server else address
        if key in workloads:
            continue
        workloads.add(key)
        dialed = Dialed(client=proxy, context=client_context(cluster, endpoint), request=request)
        results.append(serve(scene, dialed, server, int(port) if port.isdigit() else 0))
    if not results:
        dialed = Dialed(client=proxy, context=client_context(cluster, {}), request=request)
        return serve(scene, dialed, None, 0)
    bad = next((result for result in results if result.outcome.kind != "routed"), None)
    if bad is None or all(result.outcome.kind == bad.outcome.kind for result in results):
        return bad or results[0]
    kinds = ", ".join(sorted({result.outcome.kind for result in results}))
    return Served(
        tls=bad.tls,
        checks=bad.checks,
        outcome=dataclasses.replace(bad.outcome, kind="mixed", why=f"endpoints differ ({kinds}): {bad.outcome.why}"),
    )


def _endpoints(scene: Scene, proxy: ProxyNode, cluster: Json) -> Iterator[tuple[EndpointSeen, Json]]:
    name = str(cluster.get("eds_cluster_config", {}).get("service_name") or cluster.get("name", ""))
    assignment = cluster.get("load_assignment") or scene.endpoints(proxy).get(name, {})
    for group in assignment.get("endpoints", ()):
        locality = group.get("locality", {})
        where = "/".join(str(locality[key]) for key in ("region", "zone", "sub_zone") if locality.get(key))
        for one in group.get("lb_endpoints", ()):
            if one.get("health_status") in ("UNHEALTHY", "DRAINING"):
                continue
            place = one.get("endpoint", {}).get("address", {})
            socket = place.get("socket_address", {})
            address = str(socket.get("address", ""))
            server = scene.at(address)
            yield (
                EndpointSeen(
                    address=f"{address}:{socket.get('port_value', 0)}" if socket else _other(place),
                    instance=server.id if server else "",
                    weight=number(one.get("load_balancing_weight"), 1),
                    priority=int(group.get("priority", 0)),
                    locality=where,
                ),
                one,
            )


def _other(address: Json) -> str:
    """An address that is no socket's: a pipe, or another listener of the same Envoy."""
    if "pipe" in address:
        return f"unix:{address['pipe'].get('path', '')}"
    return str(address.get("envoy_internal_address", {}).get("server_listener_name", ""))


def _rule(scene: Scene, cluster: Json, subset: str) -> Place | None:
    place = scene.provenance.of_config(cluster.get("metadata", {}), "spec")
    if place is None or not subset:
        return place
    resource = scene.provenance.resource(place.kind, place.name)
    subsets = resource.plain.get("spec", {}).get("subsets", []) if resource else []
    index = next((i for i, one in enumerate(subsets) if one.get("name") == subset), None)
    return place if index is None else scene.provenance.place(place.kind, place.name, "spec", "subsets", index)


def _balancer(cluster: Json, action: Json) -> str:
    policy = str(cluster.get("lb_policy", "ROUND_ROBIN"))
    if "load_balancing_policy" in cluster:
        policies = cluster["load_balancing_policy"].get("policies", ())
        kinds = [str(one.get("typed_extension_config", {}).get("name", "")).rpartition(".")[2] for one in policies]
        policy = ", ".join(kinds)
    keys = [_hash_key(one) for one in action.get("hash_policy", ())]
    return f"{policy} of {', '.join(keys)}" if keys else policy


def _hash_key(policy: Json) -> str:
    if "header" in policy:
        return f"header {policy['header'].get('header_name', '')}"
    if "cookie" in policy:
        return f"cookie {policy['cookie'].get('name', '')}"
    if "query_parameter" in policy:
        return f"query parameter {policy['query_parameter'].get('name', '')}"
    return "the client's address"


def _breakers(cluster: Json) -> Mapping[str, int]:
    thresholds = cluster.get("circuit_breakers", {}).get("thresholds", ())
    first: Json = thresholds[0] if thresholds else {}
    bounds = {name: number(first.get(key), 1024) for key, name in _BREAKERS.items()}
    return {name: bound for name, bound in bounds.items() if bound != UNBOUNDED}


def _outlier(cluster: Json) -> str:
    rule = cluster.get("outlier_detection")
    if rule is None:
        return ""
    parts: list[str] = []
    for key, label in (("consecutive_5xx", "errors"), ("consecutive_gateway_failure", "gateway errors")):
        enforced = number(rule.get(f"enforcing_{key}"), 100 if key == "consecutive_5xx" else 0)
        if enforced:
            parts.append(f"{number(rule.get(key), 5)} {label} in a row")
    interval = seconds(rule.get("interval")) or 10.0
    base = seconds(rule.get("base_ejection_time")) or 30.0
    most = number(rule.get("max_ejection_percent"), 10)
    condition = " or ".join(parts) or "nothing"
    return f"{condition} eject for {text(base)} and longer, at most {most} %, looked at every {text(interval)}"


def _connections(cluster: Json) -> Iterator[str]:
    options = cluster.get("typed_extension_protocol_options", {}).get(_HTTP_OPTIONS, {})
    explicit = options.get("explicit_http_config", {})
    if "http2_protocol_options" in explicit:
        yield "HTTP/2"
        alive = explicit["http2_protocol_options"].get("connection_keepalive")
        if alive:
            yield f"pinged every {text(seconds(alive.get('interval')) or 0.0)}"
        streams = number(explicit["http2_protocol_options"].get("max_concurrent_streams"))
        if streams:
            yield f"at most {streams} calls on one connection"
    elif explicit:
        yield "HTTP/1.1"
    yield f"connecting may take {text(seconds(cluster.get('connect_timeout')) or 5.0)}"
    common = options.get("common_http_protocol_options", {})
    idle, longest = seconds(common.get("idle_timeout")), seconds(common.get("max_connection_duration"))
    if idle:
        yield f"closed after {text(idle)} without a call"
    if longest:
        yield f"renewed after {text(longest)}"
    most = number(common.get("max_requests_per_connection"))
    if most:
        yield f"renewed after {most} calls"
