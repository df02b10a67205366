"""What a sidecar runs: listeners for its application's calls, and for calls to its application."""

from __future__ import annotations

from mlmesh_local.envoy_types import Json
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.catalog import MESH_GATEWAY, CatalogService, best_match, selects
from mlmesh_local.resources.model import VirtualService
from mlmesh_local.translate import names
from mlmesh_local.translate.authorization import authorization, authorization_extensions
from mlmesh_local.translate.clusters import inbound_cluster, outbound_clusters, outbound_endpoints
from mlmesh_local.translate.jwt import jwt_extensions
from mlmesh_local.translate.listeners import inbound_listener, outbound_listener
from mlmesh_local.translate.matches import ANYTHING, unique
from mlmesh_local.translate.observation import observation, route_tracing
from mlmesh_local.translate.routes import Frame, default_route, rule_routes
from mlmesh_local.translate.view import View, excluded_ports


def clusters(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """CDS."""
    result = outbound_clusters(view, proxy)
    for port, protocol in inbound_ports(view, proxy).items():
        cluster = inbound_cluster(proxy, port, http2=protocol != "http")
        result[cluster["name"]] = cluster
    return result


def endpoints(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """EDS."""
    return outbound_endpoints(view, proxy)


def extensions(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """ECDS: configurations of filters by name, for listeners that take them from there."""
    return {**authorization_extensions(view, proxy), **jwt_extensions(view, proxy)}


def listeners(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """LDS."""
    found = [outbound_listener(view, proxy, port) for port in _outbound_ports(view, proxy)]
    found += [
        inbound_listener(view, proxy, port, view.mtls_mode(proxy.namespace, proxy.labels, port))
        for port in inbound_ports(view, proxy)
    ]
    return {listener["name"]: listener for listener in found}


def routes(view: View, proxy: ProxyNode) -> dict[str, Json]:
    """RDS."""
    seen = observation(view, proxy)
    tracing = route_tracing(seen, configured=bool(view.world.otlp_address))
    found = [_outbound_routes(view, proxy, port, tracing) for port in _outbound_ports(view, proxy)]
    checks = authorization(view, proxy)
    for port, protocol in inbound_ports(view, proxy).items():
        configuration = _inbound_routes(view, proxy, port, tracing)
        if protocol != "grpc":
            # Istio's default for what does not stream.
            (host,) = configuration["virtual_hosts"]
            host["routes"][0]["route"]["retry_policy"] = {"retry_on": "reset-before-request", "num_retries": 2}
        if checks:
            configuration["typed_per_filter_config"] = checks
        found.append(configuration)
    return {configuration["name"]: configuration for configuration in found}


def inbound_ports(view: View, proxy: ProxyNode) -> dict[int, str]:
    """Container ports on which the sidecar takes calls, with their protocols: "grpc", "http2" or "http"."""
    excluded = excluded_ports(view.resources, proxy)
    ports: dict[int, str] = {}
    for service in view.services.values():
        if service.is_entry or not service.selector or service.namespace != proxy.namespace:
            continue
        if not selects(service.selector, proxy.labels):
            continue
        for port in service.ports:
            number = port.target if isinstance(port.target, int) else proxy.container_ports.get(port.target, 0)
            if number and number not in excluded:
                ports.setdefault(number, port.protocol)
    return dict(sorted(ports.items()))


def _outbound_ports(view: View, proxy: ProxyNode) -> list[int]:
    services = view.services_seen_by(proxy.namespace)
    return sorted({port.number for service in services for port in service.ports})


def _outbound_routes(view: View, proxy: ProxyNode, port: int, tracing: Json | None) -> Json:
    frame = Frame(view=view, proxy=proxy, gateway=MESH_GATEWAY, listener_port=port, tracing=tracing)
    bound = view.virtual_services(MESH_GATEWAY, proxy.namespace)
    by_host: dict[str, VirtualService] = {}
    for service, hosts in bound:
        for host in hosts:
            by_host.setdefault(host, service)
    virtual_hosts: list[Json] = []
    taken = {"*"}
    for target in view.services_seen_by(proxy.namespace):
        if target.port(port) is None:
            continue
        pattern = best_match(by_host, target.host)
        # A VirtualService none of whose rules can apply here leaves the service as it is, as in Istio.
        own = rule_routes(frame, by_host[pattern]) if pattern else []
        # A short name may be a host of its own; Envoy takes a domain once.
        domains = [domain for domain in _domains(view, target, port, proxy) if domain not in taken]
        taken.update(domains)
        virtual_hosts.append(
            {
                "name": f"{target.host}:{port}",
                "domains": domains,
                "routes": own or [default_route(frame, target.host, port)],
                "include_request_attempt_count": True,
            }
        )
    virtual_hosts.append(_block_all(port))
    return {"name": str(port), "virtual_hosts": virtual_hosts, "validate_clusters": False}


def _domains(view: View, service: CatalogService, port: int, proxy: ProxyNode) -> list[str]:
    """The full host and the short names that a pod's DNS search list would complete, each with and without port."""
    hosts = [service.host, f"{service.host}."]
    suffix = f".svc.{view.world.domain}"
    if service.host.endswith(suffix):
        short = service.host.removesuffix(suffix)
        name, _, namespace = short.partition(".")
        if namespace == proxy.namespace:
            hosts.append(name)
        hosts += [f"{name}.{namespace}.svc", short]
    return unique(domain for host in hosts for domain in (host, f"{host}:{port}"))


def _block_all(port: int) -> Json:
    """Without capture nothing can be passed through: an authority that nobody serves is refused, and says so."""
    text = f"no service of the mesh has this host name on port {port}; `mlmesh routes` lists those that exist"
    answer = {"status": 502, "body": {"inline_string": text}}
    return {
        "name": "block_all",
        "domains": ["*"],
        "routes": [{"name": "block_all", "match": dict(ANYTHING), "direct_response": answer}],
    }


def _inbound_routes(view: View, proxy: ProxyNode, port: int, tracing: Json | None) -> Json:
    name = names.inbound_cluster(port)
    host = _own_host(view, proxy, port)
    route: Json = {
        "name": "default",
        "match": dict(ANYTHING),
        "decorator": {"operation": f"{host}:{port}/*"},
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
        "virtual_hosts": [{"name": f"inbound|http|{port}", "domains": ["*"], "routes": [route]}],
        "validate_clusters": False,
    }


def _own_host(view: View, proxy: ProxyNode, port: int) -> str:
    for service in view.services.values():
        if service.selector and service.namespace == proxy.namespace and selects(service.selector, proxy.labels):
            return service.host
    return f"{proxy.id}:{port}"
