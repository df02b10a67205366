"""Routes of the Gateway API through real Envoys: at a gateway that is made for its Gateway, and in the mesh (GAMMA)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from http.client import HTTPConnection

import grpc
import pytest
import yaml

from mlmesh_local.resources.gateway_api.status import proxy_addresses, resource_statuses
from tests.support.envoy_mesh import Answer, EnvoyMesh
from tests.support.mesh_documents import STRICT, deployment, service
from tests.support.pki import Authority

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("blue", "blue", "blue")
    + service("blue")
    + deployment("green", "green", "green")
    + service("green")
    + """
apiVersion: v1
kind: Service
metadata: {name: server}
spec: {selector: {app: blue}, ports: [{name: grpc, port: 9000, targetPort: grpc}]}
---
apiVersion: v1
kind: Service
metadata: {name: locked, namespace: vault}
spec: {selector: {app: blue}, ports: [{name: grpc, port: 9000, targetPort: 9000}]}
---
"""
)
GATEWAY = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge}
spec:
  gatewayClassName: istio
  listeners:
    - {name: web, port: 8080, protocol: HTTP, hostname: "*.example.com"}
---
"""
BASE = STRICT + GATEWAY


def route(kind: str, parent: str, rules: str, hosts: str = "[api.example.com]", name: str = "it") -> str:
    return f"""
apiVersion: gateway.networking.k8s.io/v1
kind: {kind}
metadata: {{name: {name}}}
spec: {{parentRefs: [{parent}], hostnames: {hosts}, rules: [{rules}]}}
---
"""


def backend(name: str, weight: int = 1, more: str = "") -> str:
    return f"{{name: {name}, port: 9000, weight: {weight}{more}}}"


SERVER = '{group: "", kind: Service, name: server}'


async def at_the_gateway(mesh: EnvoyMesh, metadata: dict[str, str] | None = None, host: str = "api.example.com") -> str:
    """A gRPC call from outside: the backend's name, or the code that came back."""
    answer = await mesh.direct("edge-istio-0", None, port=8080, host=host, metadata=metadata)
    return answer.text if answer.code is grpc.StatusCode.OK else answer.code.name


async def http(mesh: EnvoyMesh, path: str, method: str = "GET") -> tuple[int, dict[str, str]]:
    """An HTTP call from outside: status and headers."""

    def ask() -> tuple[int, dict[str, str]]:
        connection = HTTPConnection(mesh.proxy("edge-istio-0").pod_address, 8080, timeout=30)
        try:
            connection.request(method, path, headers={"Host": "api.example.com"})
            response = connection.getresponse()
            response.read()
            return response.status, {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()

    return await asyncio.to_thread(ask)


async def test_a_gateway_gets_a_proxy_of_its_own_and_says_so(mesh: EnvoyMesh) -> None:
    await mesh.apply(route("GRPCRoute", "{name: edge}", f"{{backendRefs: [{backend('blue')}]}}"))
    assert await at_the_gateway(mesh) == "blue-0"
    assert await at_the_gateway(mesh, host="other.example.org") == "UNIMPLEMENTED"
    status = resource_statuses(mesh.resources, proxy_addresses(mesh.world.endpoints))
    gateway = status["KubernetesGateway", "mlmesh", "edge"]
    assert [(one["type"], one["status"]) for one in gateway["conditions"]] == [
        ("Accepted", "True"),
        ("Programmed", "True"),
        ("ResolvedRefs", "True"),
    ]
    assert gateway["listeners"][0]["attachedRoutes"] == 1
    assert gateway["addresses"][0]["value"] == mesh.proxy("edge-istio-0").pod_address


async def test_weights_and_headers_of_a_grpc_route(mesh: EnvoyMesh) -> None:
    rules = f"""
      {{matches: [{{headers: [{{name: x-color, value: green}}]}}], backendRefs: [{backend("green")}]}},
      {{matches: [{{method: {{service: other.Service}}}}], backendRefs: [{backend("green")}]}},
      {{backendRefs: [{backend("blue", 9)}, {backend("green", 1)}]}}"""
    await mesh.apply(route("GRPCRoute", "{name: edge}", rules))
    assert await at_the_gateway(mesh, {"x-color": "green"}) == "green-0"
    found = [await at_the_gateway(mesh) for _ in range(150)]
    assert set(found) == {"blue-0", "green-0"}
    assert 1 <= found.count("green-0") <= 45  # one in ten, within more than four standard deviations


async def test_a_service_as_parent_routes_its_callers(mesh: EnvoyMesh) -> None:
    assert await mesh.spread(20) == {"blue-0": 20}
    rules = f"""
      {{matches: [{{method: {{service: test.Echo, method: Unary}}, headers: [{{name: x-color, value: green}}]}}],
        backendRefs: [{backend("green")}]}},
      {{filters: [{{type: RequestMirror, requestMirror: {{backendRef: {{name: green, port: 9000}}}}}}],
        backendRefs: [{backend("blue")}]}}"""
    await mesh.apply(route("GRPCRoute", SERVER, rules, hosts="[]"))
    assert (await mesh.call(metadata={"x-color": "green"})).text == "green-0"
    before = mesh.backends["green-0"].calls
    assert (await mesh.call()).text == "blue-0"
    await mesh.backends["green-0"].called(before + 1)


async def test_what_may_not_be_used_is_answered_as_istio_does(mesh: EnvoyMesh) -> None:
    rules = f"{{backendRefs: [{backend('locked', more=', namespace: vault')}]}}"
    await mesh.apply(route("HTTPRoute", "{name: edge}", rules))
    assert (await http(mesh, "/"))[0] == 500
    assert await at_the_gateway(mesh) == "UNKNOWN"
    found = resource_statuses(mesh.resources)["HTTPRoute", "mlmesh", "it"]["parents"][0]["conditions"]
    assert found[1]["reason"] == "RefNotPermitted"

    await mesh.apply(route("HTTPRoute", "{name: edge}", "{backendRefs: [{name: nobody, port: 9000}]}"))
    assert (await http(mesh, "/"))[0] == 500


async def test_redirects_and_prefixes(mesh: EnvoyMesh) -> None:
    rules = """
      {matches: [{path: {value: /old}}], filters: [{type: RequestRedirect, requestRedirect:
        {scheme: https, statusCode: 301, path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}}]},
      {matches: [{path: {value: /nothing}}]}"""
    await mesh.apply(route("HTTPRoute", "{name: edge}", rules))
    status, headers = await http(mesh, "/old/x")
    assert (status, headers["location"]) == (301, "https://api.example.com/new/x")
    # A prefix is of path segments, not of characters.
    assert (await http(mesh, "/older"))[0] == 404
    assert (await http(mesh, "/nothing"))[0] == 500


OUTSIDE = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: outside}}
spec: {{hosts: [api.example.com], resolution: STATIC, endpoints: [{{address: {address}}}],
  ports: [{{number: 8443, name: grpc, protocol: GRPC}}]}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: BackendTLSPolicy
metadata: {{name: outside}}
spec:
  targetRefs: [{{group: networking.istio.io, kind: ServiceEntry, name: outside, sectionName: grpc}}]
  validation: {{hostname: api.example.com, caCertificateRefs: [{{group: "", kind: ConfigMap, name: {roots}}}]}}
---
"""
MORE = """
apiVersion: gateway.networking.k8s.io/v1
kind: ListenerSet
metadata: {name: more}
spec:
  parentRef: {name: edge}
  listeners:
    - {name: tls, port: 8443, protocol: HTTPS, hostname: api.example.com, tls: {certificateRefs: [{name: cert}]}}
---
"""
CHECKED = GATEWAY.replace(
    "gatewayClassName: istio",
    """gatewayClassName: istio
  allowedListeners: {namespaces: {from: Same}}
  tls: {frontend: {default: {validation: {caCertificateRefs: [{group: "", kind: ConfigMap, name: %s}]}}}}""",
)
OPEN = GATEWAY.replace(
    "gatewayClassName: istio", "gatewayClassName: istio\n  allowedListeners: {namespaces: {from: Same}}"
)


def roots(name: str, authority: Authority) -> str:
    document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}
    return f"{yaml.safe_dump({**document, 'data': {'ca.crt': authority.pem.decode()}})}\n---\n"


async def answered(call: Callable[[], Awaitable[Answer]], wanted: str) -> None:
    """Wait for an answer, or for a code: secrets come after what asks for them."""
    found = ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(30):
            while found != wanted:
                answer = await call()
                found = answer.text if answer.code is grpc.StatusCode.OK else answer.code.name
                await asyncio.sleep(0.05)
    assert found == wanted


async def test_a_listener_set_and_who_may_call_it(mesh: EnvoyMesh) -> None:
    stranger = Authority()
    bundles = roots("ours", mesh.authority) + roots("theirs", stranger)
    parent = "{kind: ListenerSet, name: more}"
    await mesh.apply(OPEN + MORE + bundles, route("GRPCRoute", parent, f"{{backendRefs: [{backend('green')}]}}"))
    leaf = mesh.authority.leaf("spiffe://cluster.local/ns/mlmesh/sa/somebody")

    async def call() -> Answer:
        return await mesh.direct("edge-istio-0", leaf, port=8443, host="api.example.com")

    await answered(call, "green-0")
    status = resource_statuses(mesh.resources)["ListenerSet", "mlmesh", "more"]
    assert status["listeners"][0]["attachedRoutes"] == 1
    await mesh.apply(CHECKED % "theirs")
    await answered(call, "UNAVAILABLE")
    await mesh.apply(CHECKED % "ours")
    await answered(call, "green-0")


async def test_tls_to_a_backend_that_is_checked(mesh: EnvoyMesh) -> None:
    bundles = roots("ours", mesh.authority) + roots("theirs", Authority())
    parent = "{kind: ListenerSet, name: more}"
    await mesh.apply(OPEN + MORE + bundles, route("GRPCRoute", parent, f"{{backendRefs: [{backend('green')}]}}"))
    address = mesh.proxy("edge-istio-0").pod_address

    async def call() -> Answer:
        return await mesh.call(host="api.example.com", port=8443)

    await mesh.apply(OUTSIDE.format(address=address, roots="theirs"))
    await answered(call, "UNAVAILABLE")
    await mesh.apply(OUTSIDE.format(address=address, roots="ours"))
    await answered(call, "green-0")
