"""Connections that are not HTTP, through real sidecars and gateways: mutual TLS, server names, undeclared ports."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.envoy_mesh import EnvoyMesh
from tests.support.mesh_documents import GATEWAY_POD, deployment, service
from tests.support.mesh_world import resource
from tests.support.pki import spiffe

pytestmark = pytest.mark.asyncio(loop_scope="module")

TCP, TLS, UNDECLARED, GATEWAY_TCP, GATEWAY_TLS = 15432, 16443, 17777, 15433, 16444


def backing(name: str) -> str:
    return f"""
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  selector: {{app: {name}}}
  ports:
    - {{name: tcp, port: {TCP}}}
    - {{name: tls, port: {TLS}}}
    - {{name: undeclared, port: {UNDECLARED}}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}}}
---
"""


WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("db", "db", "db")
    + backing("db")
    + deployment("shop", "shop", "shop")
    + backing("shop")
    + GATEWAY_POD
)
STRICT = resource("PeerAuthentication", "{mtls: {mode: STRICT}}", name="default")


def route(spec: str, name: str = "db") -> str:
    return resource("VirtualService", spec, name=name, group="networking.istio.io/v1")


class Echo:
    """Answers each line with its name, over TCP, TLS or HTTP/1.1, on the ports of one instance."""

    def __init__(self, name: str, certificate: ssl.SSLContext) -> None:
        self.name = name
        self.certificate = certificate

    async def serve(self, host: str, stack: contextlib.AsyncExitStack) -> None:
        for port, context in ((TCP, None), (TLS, self.certificate), (UNDECLARED, None)):
            server = await asyncio.start_server(self._answer, host, port, ssl=context)
            stack.callback(server.close)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                if b"HTTP/1.1" in line:
                    while (await reader.readline()).strip():
                        pass
                    body = self.name.encode()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
                else:
                    writer.write(self.name.encode() + b":" + line)
                await writer.drain()
        writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnvoyMesh]:
    folder = tmp_path_factory.mktemp("connections")
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(EnvoyMesh.start(folder, WORKLOADS, STRICT))
        for name in ("db", "shop"):
            leaf = mesh.authority.leaf(dns=[f"{name}.mlmesh.svc.cluster.local", f"{name}.example"])
            echo = Echo(name, server_context(folder / f"{name}.pem", leaf.cert, leaf.key))
            await echo.serve(mesh.proxy(f"{name}-0").application_address, stack)
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(running: EnvoyMesh) -> EnvoyMesh:
    await running.reset(STRICT)
    return running


def server_context(file: Path, certificate: bytes, key: bytes) -> ssl.SSLContext:
    file.write_bytes(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


async def say(
    mesh: EnvoyMesh,
    host: str,
    port: int,
    *,
    server_name: str = "",
    line: bytes = b"hello",
    context: ssl.SSLContext | None = None,
) -> str:
    """What answers a line; empty when the connection is closed instead. With a server name TLS is made to it."""
    if server_name and context is None:
        context = ssl.create_default_context(cadata=mesh.authority.pem.decode())
    async with asyncio.timeout(30):
        try:
            reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=server_name or None)
        except (ConnectionError, ssl.SSLError):
            return ""
        try:
            writer.write(line + b"\n")
            return (await reader.readline()).decode().strip()
        except (ConnectionError, ssl.SSLError):
            return ""
        finally:
            writer.close()


async def out(mesh: EnvoyMesh, port: int, **arguments: str) -> str:
    """What answers the client's application on a port of its sidecar."""
    return await say(mesh, mesh.proxy("client-0").outbound_address, port, **arguments)  # type: ignore[arg-type]


async def test_tcp_goes_through_two_sidecars_with_mutual_tls(mesh: EnvoyMesh) -> None:
    # Two services share the port: the older has it.
    assert await out(mesh, TCP) == "db:hello"
    stats = await mesh.stats("db-0", f"listener.*_{TCP}.ssl.handshake")
    assert sum(stats.values()) >= 1
    # Without a certificate of the mesh nobody gets in.
    assert await say(mesh, mesh.proxy("db-0").pod_address, TCP) == ""


async def test_connections_are_split_by_weight_and_by_port(mesh: EnvoyMesh) -> None:
    both = "[{destination: {host: db}, weight: 50}, {destination: {host: shop}, weight: 50}]"
    await mesh.apply(route(f"{{hosts: [db], tcp: [{{match: [{{port: {TCP}}}], route: {both}}}]}}"))
    found = Counter([await out(mesh, TCP) for _ in range(40)])
    assert set(found) == {"db:hello", "shop:hello"}
    assert min(found.values()) >= 6


async def test_tls_is_told_apart_by_server_name(mesh: EnvoyMesh) -> None:
    for name in ("db", "shop"):
        host = f"{name}.mlmesh.svc.cluster.local"
        assert await out(mesh, TLS, server_name=host) == f"{name}:hello"
    await mesh.apply(
        route(
            "{hosts: [db.mlmesh.svc.cluster.local], tls: [{match: [{sniHosts: [db.mlmesh.svc.cluster.local]}],"
            " route: [{destination: {host: shop}}]}]}"
        )
    )
    # Now the other answers, whose certificate is not for that name.
    assert await out(mesh, TLS, server_name="db.mlmesh.svc.cluster.local") == ""


async def test_an_undeclared_port_takes_http_and_anything_else(mesh: EnvoyMesh) -> None:
    assert await out(mesh, UNDECLARED) == "db:hello"
    for name in ("db", "shop"):
        host = f"{name}.mlmesh.svc.cluster.local"
        request = b"GET / HTTP/1.1\r\nhost: %s\r\n\r" % host.encode()
        assert (await out(mesh, UNDECLARED, line=request)).startswith("HTTP/1.1 200")  # type: ignore[arg-type]
        requests = await mesh.stats(f"{name}-0", f"http.inbound_.*{UNDECLARED}.*downstream_rq_2xx")
        assert sum(requests.values()) >= 1


GATEWAY = resource(
    "Gateway",
    f"""{{selector: {{istio: gateway}}, servers: [
      {{port: {{number: {GATEWAY_TCP}, name: tcp, protocol: TCP}}, hosts: ['*']}},
      {{port: {{number: {GATEWAY_TLS}, name: tls, protocol: TLS}}, hosts: ['*.example'],
        tls: {{mode: PASSTHROUGH}}}}]}}""",
    name="way-in",
    group="networking.istio.io/v1",
)


async def test_a_gateway_forwards_connections_and_passes_tls_through_by_server_name(mesh: EnvoyMesh) -> None:
    def names(name: str) -> str:
        return (
            f"{{match: [{{port: {GATEWAY_TLS}, sniHosts: [{name}.example]}}],"
            f" route: [{{destination: {{host: {name}, port: {{number: {TLS}}}}}}}]}}"
        )

    tcp = f"[{{match: [{{port: {GATEWAY_TCP}}}], route: [{{destination: {{host: shop, port: {{number: {TCP}}}}}}}]}}]"
    await mesh.apply(
        GATEWAY,
        route(f"{{hosts: ['*.example'], gateways: [way-in], tls: [{names('db')}, {names('shop')}]}}", name="tls"),
        route(f"{{hosts: ['*'], gateways: [way-in], tcp: {tcp}}}", name="tcp"),
    )
    address = mesh.proxy("gateway-0").pod_address
    assert await say(mesh, address, GATEWAY_TCP) == "shop:hello"
    for name in ("db", "shop"):
        assert await say(mesh, address, GATEWAY_TLS, server_name=f"{name}.example") == f"{name}:hello"
    assert await say(mesh, address, GATEWAY_TLS, server_name="other.example") == ""


async def test_a_gateway_passes_mutual_tls_of_sidecars_on(mesh: EnvoyMesh, tmp_path: Path) -> None:
    server = f"{{port: {{number: {GATEWAY_TLS}, name: tls, protocol: TLS}}, hosts: ['*.local'],"
    server += " tls: {mode: AUTO_PASSTHROUGH}}"
    await mesh.apply(
        resource(
            "Gateway",
            f"{{selector: {{istio: gateway}}, servers: [{server}]}}",
            name="cross",
            group="networking.istio.io/v1",
        )
    )
    leaf = mesh.authority.leaf(spiffe("client"))
    (tmp_path / "client.pem").write_bytes(leaf.cert + leaf.key)
    context = ssl.create_default_context(cadata=mesh.authority.pem.decode())
    context.check_hostname = False
    context.load_cert_chain(tmp_path / "client.pem")
    context.set_alpn_protocols(["istio"])
    address = mesh.proxy("gateway-0").pod_address
    for name, answer in {"shop": "shop:hello", "nobody": ""}.items():
        target = f"outbound_.{TCP}_._.{name}.mlmesh.svc.cluster.local"
        assert await say(mesh, address, GATEWAY_TLS, server_name=target, context=context) == answer
