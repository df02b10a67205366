"""What is asked about a call: who calls, where it arrives, and the request that this makes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

from mlmesh_local.explain.requests import USUAL, Request
from mlmesh_local.explain.scene import Scene, listening_at
from mlmesh_local.inspection import find_proxies
from mlmesh_local.model import ProxyNode
from mlmesh_local.resources.domains import is_ip
from mlmesh_local.resources.gateway_api.listeners import INTERNAL_NAME
from mlmesh_runtime.errors import InvalidInput, NotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is asked about.

    Attributes:
        source: workload or instance that calls; empty for a client outside, who comes in at a gateway.
        host: as the application writes it; short names are completed by the namespace of the caller.
        port: service port; 0 for the only one, or the one that speaks gRPC.
        path: "/package.Service/Method".
        http: method of a call that is no gRPC call, such as GET; the path is then any.
        headers: further ones, any case; ":method" and others may be given, too.
        gateway: name of a Gateway resource, or of a gateway's workload, at which the call arrives.
        identity: SPIFFE id in the certificate that a client outside shows at the gateway.
    """

    source: str = ""
    host: str = ""
    port: int = 0
    path: str = "/"
    http: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    gateway: str = ""
    identity: str = ""
    source_ip: str = "127.0.0.1"


def check(call: Call) -> None:
    """Raises InvalidInput for what no call can be."""
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


def calling_sidecar(scene: Scene, call: Call) -> ProxyNode:
    """The sidecar of who calls. Raises InvalidInput, NotFound."""
    if not call.source:
        raise InvalidInput("name the workload that calls, or the gateway at which the call arrives", field="from")
    proxy = find_proxies(scene.world, call.source)[0]
    if proxy.kind == "gateway":
        raise InvalidInput(f"{call.source} is a gateway: name it as the gateway of the call", field="from")
    return proxy


def called_gateway(scene: Scene, call: Call) -> ProxyNode:
    """The gateway at which the call arrives. Raises NotFound that names those there are."""
    wanted = call.gateway
    for proxy in scene.world.proxies:
        if proxy.kind == "gateway" and wanted in gateway_names(scene, proxy, short=True):
            return proxy
    proxies = [proxy for proxy in scene.world.proxies if proxy.kind == "gateway"]
    names = sorted({_as_written(name) for proxy in proxies for name in gateway_names(scene, proxy)})
    raise NotFound(
        f'no gateway is called "{wanted}"; there are {", ".join(names) or "none"}', reason="RESOURCE_NOT_FOUND"
    )


def gateway_names(scene: Scene, proxy: ProxyNode, *, short: bool = False) -> list[str]:
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


def called_port(scene: Scene, proxy: ProxyNode, call: Call) -> int:
    """The port that is meant. Raises InvalidInput, NotFound."""
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


def near_miss(scene: Scene, proxy: ProxyNode, call: Call, port: int) -> str:
    """What may be wrong about the host or the port of a call inside the mesh, empty where both exist."""
    if call.gateway or is_ip(call.host):
        return ""
    host = _full(scene, proxy, call.host)
    service = scene.view.services.get(host)
    if service is None:
        if any(fnmatch(host, name) for name in scene.view.services):
            return ""
        written = {name.partition(".")[0]: name for name in scene.view.services} | {n: n for n in scene.view.services}
        near = difflib.get_close_matches(call.host, written, n=1, cutoff=0.5)
        hint = f'; did you mean "{written[near[0]]}"?' if near else ""
        return f'no service is called "{call.host}" for clients of the namespace {proxy.namespace}{hint}'
    ports = [one.number for one in service.ports]
    return "" if port in ports else f"{service.host} has the ports {', '.join(map(str, ports))}"


def request_of(scene: Scene, call: Call, proxy: ProxyNode, port: int) -> Request:
    """The request as the proxy gets it."""
    secure = bool(call.gateway) and _is_secure(scene, proxy, port)
    headers = {
        ":method": call.http or "POST",
        ":scheme": "https" if secure else "http",
        ":path": call.path,
        ":authority": call.host if call.gateway else f"{call.host}:{port}",
        **({} if call.http else {"content-type": "application/grpc", "te": "trailers"}),
    }
    for name, value in call.headers.items():
        key = name.lower()
        key = ":authority" if key == "host" else key
        headers[key] = value
    identity = call.identity
    if call.gateway and call.source and not identity:
        identity = scene.identity(find_proxies(scene.world, call.source)[0])
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


def told(call: Call, proxy: ProxyNode, port: int, request: Request) -> dict[str, object]:
    """The call as an explanation repeats it."""
    extra = {name: value for name, value in request.headers.items() if name not in USUAL}
    return {
        "from": call.source,
        "at_gateway": call.gateway,
        "to": call.host,
        "port": port,
        "method": request.path,
        "http": call.http,
        "scheme": request.headers.get(":scheme", ""),
        "headers": extra,
        "namespace": proxy.namespace,
    }
