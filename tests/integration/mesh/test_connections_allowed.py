"""Who may connect to a port that does not speak HTTP: identities, policies and authorizers for connections."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.authorizer import Authorizer
from tests.support.envoy_mesh import EnvoyMesh
from tests.support.mesh_documents import deployment, service
from tests.support.mesh_world import resource

pytestmark = pytest.mark.asyncio(loop_scope="module")

TCP, OTHER_TCP, AUTHZ = 15432, 15433, 9191
DB = f"""
apiVersion: v1
kind: Service
metadata: {{name: db}}
spec:
  selector: {{app: db}}
  ports: [{{name: tcp, port: {TCP}}}, {{name: tcp-other, port: {OTHER_TCP}}}]
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: db}}
---
"""
WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("other", "other", "other")
    + service("other")
    + deployment("db", "db", "db")
    + DB
)
STRICT = resource("PeerAuthentication", "{mtls: {mode: STRICT}}", name="default")
SELECTOR = "selector: {matchLabels: {app: db}}"


def policy(spec: str, name: str = "db") -> str:
    return resource("AuthorizationPolicy", f"{{{SELECTOR}, {spec}}}", name=name)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while line := await reader.readline():
            writer.write(b"db:" + line)
            await writer.drain()
    writer.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnvoyMesh]:
    async with contextlib.AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(
            EnvoyMesh.start(tmp_path_factory.mktemp("connections"), WORKLOADS, STRICT)
        )
        for port in (TCP, OTHER_TCP):
            server = await asyncio.start_server(answer, mesh.proxy("db-0").application_address, port)
            stack.callback(server.close)
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(running: EnvoyMesh) -> EnvoyMesh:
    await running.reset(STRICT)
    return running


async def connects(host: str, port: int = TCP) -> bool:
    """Whether somebody answers."""
    async with asyncio.timeout(30):
        try:
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"hello\n")
            return await reader.readline() == b"db:hello\n"
        except ConnectionError:
            return False
        finally:
            with contextlib.suppress(UnboundLocalError):
                writer.close()


async def may(mesh: EnvoyMesh, port: int = TCP) -> dict[str, bool]:
    """Who gets through: by their sidecars, and past them in plaintext."""
    found = {name: await connects(mesh.proxy(f"{name}-0").outbound_address, port) for name in ("client", "other")}
    return {**found, "stranger": await connects(mesh.proxy("db-0").pod_address, port)}


async def test_one_port_takes_plaintext_and_mutual_tls_where_it_shall(mesh: EnvoyMesh) -> None:
    assert await may(mesh) == {"client": True, "other": True, "stranger": False}
    await mesh.apply(STRICT.replace("STRICT", "PERMISSIVE"))
    assert await may(mesh) == {"client": True, "other": True, "stranger": True}
    handshakes = await mesh.stats("db-0", f"listener.*_{TCP}.ssl.handshake")
    # Who is in the mesh still uses mutual TLS.
    assert sum(handshakes.values()) >= 4
    ports = f"portLevelMtls: {{{TCP}: {{mode: DISABLE}}}}"
    await mesh.apply(resource("PeerAuthentication", f"{{{SELECTOR}, mtls: {{mode: STRICT}}, {ports}}}", name="db"))
    assert await may(mesh) == {"client": True, "other": True, "stranger": True}
    assert await may(mesh, OTHER_TCP) == {"client": True, "other": True, "stranger": False}
    assert sum((await mesh.stats("db-0", f"listener.*_{TCP}.ssl.handshake")).values()) == sum(handshakes.values())


async def test_policies_check_identities_and_ports_of_connections(mesh: EnvoyMesh) -> None:
    await mesh.apply(policy("rules: [{from: [{source: {principals: ['*/sa/client']}}]}]"))
    assert await may(mesh) == {"client": True, "other": False, "stranger": False}
    await mesh.apply(policy(f"action: DENY, rules: [{{to: [{{operation: {{ports: ['{TCP}']}}}}]}}]", name="deny"))
    assert await may(mesh) == {"client": False, "other": False, "stranger": False}
    assert await may(mesh, OTHER_TCP) == {"client": True, "other": False, "stranger": False}


async def test_rules_of_http_never_allow_a_connection_and_deny_every_one(mesh: EnvoyMesh) -> None:
    await mesh.apply(policy("rules: [{to: [{operation: {methods: [GET]}}]}]"))
    assert await may(mesh) == {"client": False, "other": False, "stranger": False}
    deny = (
        "action: DENY, rules: [{from: [{source: {principals: ['*/sa/other']}}], to: [{operation: {methods: [GET]}}]}]"
    )
    await mesh.apply(policy(deny))
    assert await may(mesh) == {"client": True, "other": False, "stranger": False}


async def test_an_external_authorizer_is_asked_about_connections(mesh: EnvoyMesh) -> None:
    address = mesh.free_address()
    entry = f"""{{hosts: [authz.local], location: MESH_EXTERNAL, resolution: STATIC,
      endpoints: [{{address: {address}}}], ports: [{{number: {AUTHZ}, name: grpc, protocol: GRPC}}]}}"""
    settings = f"""
apiVersion: v1
kind: ConfigMap
metadata: {{name: istio, namespace: istio-system}}
data:
  mesh: |
    extensionProviders: [{{name: ask, envoyExtAuthzGrpc: {{service: authz.local, port: {AUTHZ}}}}}]
---
"""
    authorizer = Authorizer()
    async with authorizer.serve_grpc(f"{address}:{AUTHZ}"):
        await mesh.apply(
            settings,
            resource("ServiceEntry", entry, name="authz", group="networking.istio.io/v1"),
            policy("action: CUSTOM, provider: {name: ask}, rules: [{}]"),
        )
        assert await may(mesh) == {"client": True, "other": True, "stranger": False}
        authorizer.connections = False
        assert await may(mesh) == {"client": False, "other": False, "stranger": False}
        assert len(authorizer.asked) == 4
    await mesh.apply(policy("action: CUSTOM, provider: {name: nobody}, rules: [{}]"))
    assert await may(mesh) == {"client": False, "other": False, "stranger": False}


async def test_a_changed_policy_acts_on_new_connections_at_once_and_leaves_other_ports(mesh: EnvoyMesh) -> None:
    """An open connection is drained, as Envoy drains what changed (45 s, Istio's default)."""
    sidecar = mesh.proxy("client-0").outbound_address
    reader, writer = await asyncio.open_connection(sidecar, OTHER_TCP)
    writer.write(b"one\n")
    assert await reader.readline() == b"db:one\n"
    await mesh.apply(policy("action: DENY, rules: [{}]"))
    assert await may(mesh, OTHER_TCP) == {"client": False, "other": False, "stranger": False}
    draining = await mesh.stats("db-0", "listener_manager.total_filter_chains_draining")
    assert sum(draining.values()) >= 1
    writer.write(b"two\n")
    assert await reader.readline() == b"db:two\n"
    writer.close()
