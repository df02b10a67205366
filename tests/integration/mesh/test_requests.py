"""Requests through a real sidecar and a real gateway: what rules of VirtualServices answer, rewrite and tell apart."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass

import pytest

from tests.support.envoy_mesh import HOST, EnvoyMesh
from tests.support.mesh_documents import GATEWAY_POD, STRICT, SUBSETS, deployment, service
from tests.support.mesh_world import resource
from tests.support.tokens import Issuer

pytestmark = pytest.mark.asyncio(loop_scope="module")

HTTP, HTTPS = 18080, 18443
WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server-v1", "server", "server", version="v1")
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
    + GATEWAY_POD
)
GATEWAY = resource(
    "Gateway",
    f"""{{selector: {{istio: gateway}}, servers: [
      {{port: {{number: {HTTP}, name: http, protocol: HTTP}}, hosts: [shop.example], tls: {{httpsRedirect: true}}}},
      {{port: {{number: {HTTPS}, name: shop, protocol: HTTPS}}, hosts: [shop.example],
        tls: {{mode: SIMPLE, credentialName: ingress-cert}}}},
      {{port: {{number: {HTTPS}, name: admin, protocol: HTTPS}}, hosts: [admin.example],
        tls: {{mode: MUTUAL, credentialName: ingress-cert}}}}]}}""",
    name="way-in",
    group="networking.istio.io/v1",
)
BASE = STRICT + SUBSETS + GATEWAY


def virtual_service(spec: str, name: str = "server") -> str:
    return resource("VirtualService", spec, name=name, group="networking.istio.io/v1")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: str


async def ask(
    address: str,
    port: int,
    path: str,
    *,
    host: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """One request of HTTP/1.1."""
    lines = [f"{method} {path} HTTP/1.1", f"host: {host}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(address, port, ssl=tls, server_hostname=host if tls else None)
        writer.write("\r\n".join([*lines, "", ""]).encode())
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *rest = head.strip().split("\r\n")
        found = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        body = (await reader.readexactly(int(found.get("content-length", "0")))).decode()
        writer.close()
    return Answer(int(first.split()[1]), found, body)


async def out(mesh: EnvoyMesh, path: str, **arguments: object) -> Answer:
    """A request of the client's application to the server."""
    return await ask(mesh.proxy("client-0").outbound_address, 9000, path, host=HOST, **arguments)  # type: ignore[arg-type]


async def test_redirects_and_answers_of_the_proxy_itself(mesh: EnvoyMesh) -> None:
    await mesh.apply(
        virtual_service(
            "{hosts: [server], http: ["
            "{match: [{uri: {prefix: /old}}],"
            " redirect: {prefixRewrite: /new, authority: b.example, redirectCode: 308}},"
            "{match: [{uri: {exact: /port}}], redirect: {derivePort: FROM_REQUEST_PORT, scheme: https}},"
            "{match: [{uri: {regex: '/(a|b)+'}}], directResponse: {status: 418, body: {string: short}}},"
            "{match: [{uri: {prefix: /BYTES}, ignoreUriCase: true}], headers: {response: {set: {x-who: proxy}}},"
            " directResponse: {status: 200, body: {bytes: aGk=}}},"
            "{match: [{queryParams: {q: {exact: ''}}}], directResponse: {status: 201}},"
            "{match: [{queryParams: {q: {}}}], directResponse: {status: 202}},"
            "{match: [{withoutHeaders: {x-a: {exact: '1'}}, uri: {prefix: /w}}], directResponse: {status: 203}},"
            "{directResponse: {status: 404}}]}"
        )
    )
    moved = await out(mesh, "/old/x?y=1")
    assert (moved.status, moved.headers["location"]) == (308, "http://b.example/new/x?y=1")
    assert (await out(mesh, "/port")).headers["location"] == f"https://{HOST}:9000/port"
    assert (await out(mesh, "/abba")).body == "short"
    told = await out(mesh, "/bytes")
    assert (told.body, told.headers["x-who"]) == ("hi", "proxy")
    statuses = {
        "/?q=": 201,
        "/?q": 201,
        "/?q=1": 202,
        "/": 404,
        "/wide": 203,
    }
    assert {path: (await out(mesh, path)).status for path in statuses} == statuses
    assert (await out(mesh, "/wide", headers={"x-a": "1"})).status == 404


async def test_other_origins(mesh: EnvoyMesh) -> None:
    await mesh.apply(
        virtual_service(
            "{hosts: [server], http: [{corsPolicy: {allowOrigins: [{exact: 'https://a.example'}], allowMethods: [POST],"
            " allowHeaders: [x-a], maxAge: 24h, allowCredentials: true, unmatchedPreflights: IGNORE},"
            " route: [{destination: {host: server}}]}]}"
        )
    )
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    allowed = await out(mesh, "/", method="OPTIONS", headers=asked)
    names = ("allow-origin", "allow-methods", "allow-headers", "max-age", "allow-credentials")
    told = [allowed.headers[f"access-control-{name}"] for name in names]
    assert (allowed.status, told) == (200, ["https://a.example", "POST", "x-a", "86400", "true"])
    denied = await out(mesh, "/", method="OPTIONS", headers={**asked, "origin": "https://b.example"})
    assert (denied.status, "access-control-allow-origin" in denied.headers) == (200, False)


async def test_paths_and_authorities_are_rewritten(mesh: EnvoyMesh) -> None:
    await mesh.apply(
        virtual_service(
            "{hosts: [server], http: ["
            "{match: [{uri: {prefix: /alias.Echo/}}], rewrite: {uri: /test.Echo/, authority: other.example},"
            " route: [{destination: {host: server, subset: v1}}]},"
            "{match: [{uri: {prefix: /v2/}}],"
            " rewrite: {uriRegexRewrite: {match: '^/v2/([^/]+)/(.*)$', rewrite: '/test.\\1/\\2'}},"
            " route: [{destination: {host: server, subset: v2}}]}]}"
        )
    )
    async with mesh.channel() as channel:
        assert await channel.unary_unary("/alias.Echo/Unary")(b"", timeout=30) == b"server-v1-0"
        assert await channel.unary_unary("/v2/Echo/Unary")(b"", timeout=30) == b"server-v2-0"


async def test_a_root_delegates_to_what_others_write(mesh: EnvoyMesh) -> None:
    await mesh.apply(
        virtual_service(
            "{hosts: [server], http: [{match: [{headers: {x-team: {exact: red}}}], delegate: {name: red}, timeout: 3s},"
            " {delegate: {name: nobody}}, {route: [{destination: {host: server, subset: v1}}]}]}"
        ),
        virtual_service(
            "{http: [{match: [{headers: {x-team: {exact: blue}}}], directResponse: {status: 500}},"
            " {match: [{uri: {prefix: /test.Echo/}}], route: [{destination: {host: server, subset: v2}}]}]}",
            name="red",
        ),
    )
    assert (await mesh.call(metadata={"x-team": "red"})).text == "server-v2-0"
    assert (await mesh.call(metadata={"x-team": "blue"})).text == "server-v1-0"


async def test_a_gateway_tells_servers_apart_by_name_and_sends_plain_requests_to_tls(mesh: EnvoyMesh) -> None:
    def answers(host: str, status: int) -> str:
        spec = f"{{hosts: [{host}], gateways: [way-in], http: [{{directResponse: {{status: {status}}}}}]}}"
        return virtual_service(spec, name=host.partition(".")[0])

    await mesh.apply(answers("shop.example", 221), answers("admin.example", 222))
    address = mesh.proxy("gateway-0").pod_address
    plain = await ask(address, HTTP, "/x", host="shop.example")
    assert (plain.status, plain.headers["location"]) == (301, "https://shop.example/x")

    client = ssl.create_default_context(cadata=mesh.authority.pem.decode())
    client.check_hostname = False
    assert (await ask(address, HTTPS, "/", host="shop.example", tls=client)).status == 221
    # Servers of one port share nothing: the other's hosts are not there behind its name.
    with pytest.raises((ConnectionError, ssl.SSLError, asyncio.IncompleteReadError)):
        await ask(address, HTTPS, "/", host="admin.example", tls=client)
    with pytest.raises((ConnectionError, ssl.SSLError)):
        await ask(address, HTTPS, "/", host="nobody.example", tls=client)


async def test_a_gateway_routes_by_claims_of_a_token(mesh: EnvoyMesh) -> None:
    issuer = Issuer()
    rules = f"{{issuer: '{issuer.name}', jwks: '{issuer.jwks}'}}"
    await mesh.apply(
        resource("RequestAuthentication", f"{{selector: {{matchLabels: {{istio: gateway}}}}, jwtRules: [{rules}]}}"),
        virtual_service(
            "{hosts: [shop.example], gateways: [way-in], http: ["
            "{match: [{headers: {'@request.auth.claims.groups': {exact: beta}}}], directResponse: {status: 231}},"
            "{match: [{headers: {'@request.auth.claims[plan][name]': {prefix: gold}}}], directResponse: {status: 232}},"
            "{match: [{withoutHeaders: {'@request.auth.claims.sub': {regex: '.+'}}}], directResponse: {status: 233}},"
            "{directResponse: {status: 234}}]}"
        ),
    )
    client = ssl.create_default_context(cadata=mesh.authority.pem.decode())
    client.check_hostname = False
    address = mesh.proxy("gateway-0").pod_address

    async def status(**claims: object) -> int:
        headers = {"authorization": f"Bearer {issuer.token(**claims)}"} if claims else {}
        return (await ask(address, HTTPS, "/", host="shop.example", tls=client, headers=headers)).status

    assert await status(groups=["alpha", "beta"]) == 231
    assert await status(plan={"name": "gold-1"}) == 232
    assert await status() == 233
    assert await status(groups=["alpha"]) == 234
