"""What a sidecar runs: listeners for its application's calls, and for calls to its application."""

from __future__ import annotations

import functools

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import MESH_GATEWAY
from mlmesh_local.resources.protocols import Protocol, is_http
from mlmesh_local.translate import names
from mlmesh_local.translate.authorization import authorization, authorization_extensions
from mlmesh_local.translate.clusters import inbound_clusters, outbound_clusters, outbound_endpoints
from mlmesh_local.translate.jwt import jwt_extensions
from mlmesh_local.translate.layer4 import layer4_services
from mlmesh_local.translate.listeners import inbound_listener, outbound_listener
from mlmesh_local.translate.matches import ANYTHING
from mlmesh_local.translate.observation import route_tracing
from mlmesh_local.translate.routes import Frame
from mlmesh_local.translate.view import View
from mlmesh_local.translate.virtual_hosts import outbound_virtual_hosts, route_configuration


def clusters(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """CDS."""
    outbound = view.part(("outbound clusters",), functools.partial(outbound_clusters, view, proxy))
    return outbound | inbound_clusters(view, proxy)


def endpoints(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """EDS."""
    return view.part(("outbound endpoints",), functools.partial(outbound_endpoints, view, proxy))


def extensions(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """ECDS: configurations of filters by name, for listeners that take them from there."""
    return {**authorization_extensions(view, proxy), **jwt_extensions(view, proxy)}


def listeners(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """LDS."""
    found = [outbound_listener(view, proxy, port) for port in _outbound_ports(view, proxy)]
    found += [
        inbound_listener(view, proxy, port, protocol, view.mtls_mode(proxy.namespace, proxy.labels, port))
        for port, protocol in inbound_ports(view, proxy).items()
    ]
    return {listener["name"]: listener for listener in found}


def routes(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """RDS."""
    tracing = route_tracing(view, proxy, "outbound")
    found = [
        view.part(("routes", port), functools.partial(_outbound_routes, view, proxy, port, tracing), tracing)
        for port in _outbound_ports(view, proxy)
        if layer4_services(view, proxy, port)[1]
    ]
    checks = authorization(view, proxy)
    tracing = route_tracing(view, proxy, "inbound")
    for port, protocol in inbound_ports(view, proxy).items():
        if not is_http(protocol) and protocol != "unknown":
            continue
        configuration = _inbound_routes(view, proxy, port, tracing)
        if protocol not in ("grpc", "grpc-web"):
            # Istio's default for what does not stream.
            (host,) = configuration["virtual_hosts"]
            host["routes"][0]["route"]["retry_policy"] = {"retry_on": "reset-before-request", "num_retries": 2}
        if checks:
            configuration["typed_per_filter_config"] = checks
        found.append(configuration)
    return {configuration["name"]: configuration for configuration in found}


def inbound_ports(view: View, proxy: ProxyNode) -> dict[int, Protocol]:
    """Container ports on which the sidecar takes calls, with their protocols."""
    return {inbound.port: inbound.protocol for inbound in view.inbound(proxy)}


def _outbound_ports(view: View, proxy: ProxyNode) -> tuple[int, ...]:
    return view.outbound_ports(proxy)


def _outbound_routes(view: View, proxy: ProxyNode, port: int, tracing: Json | None) -> Json:
    frame = Frame(view=view, proxy=proxy, gateway=MESH_GATEWAY, listener_port=port, tracing=tracing)
    return route_configuration(str(port), outbound_virtual_hosts(frame))


def _inbound_routes(view: View, proxy: ProxyNode, port: int, tracing: Json | None) -> Json:
    name = names.inbound_cluster(port)
    host, number = _own_service(view, proxy, port)
    route: Json = {
        "name": "default",
        "match": dict(ANYTHING),
        "decorator": {"operation": f"{host}:{number}/*"},
        "route": {
            "cluster": name,
            "timeout": "0s",
            "max_stream_duration": {"max_stream_duration": "0s", "grpc_timeout_header_max": "0s"},
        },
    }
    if tracing:
        route["tracing"] = tracing
    return {
        "name": name,
        "virtual_hosts": [{"name": f"inbound|http|{number}", "domains": ["*"], "routes": [route]}],
        "validate_clusters": False,
    }


def _own_service(view: View, proxy: ProxyNode, port: int) -> tuple[str, int]:
    """Host and port of the service behind which a container port is; those of the proxy where there is none."""
    for inbound in view.inbound(proxy):
        if inbound.port == port:
            return inbound.host, inbound.service_port
    return proxy.id, port
