"""gRPC clients without a sidecar, by xds:///, against servers behind real Envoys with mutual TLS."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from mlmesh_local.proxyless.status import client_status
from tests.support.envoy_mesh import EnvoyMesh
from tests.support.mesh_documents import STRICT, SUBSETS, deployment, service, split
from tests.support.mesh_proofs import POLICY
from tests.support.xds_client import XdsClient

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKLOADS = (
    deployment("server-v1", "server", "server", version="v1")
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
)
BASE = STRICT + SUBSETS
HEADERS = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: server}
spec:
  hosts: [server]
  http:
    - match: [{headers: {x-user: {exact: ada}}}]
      route: [{destination: {host: server, subset: v2}}]
    - match: [{headers: {x-user: {prefix: broken}}}]
      fault: {abort: {grpcStatus: RESOURCE_EXHAUSTED, percentage: {value: 100}}}
      route: [{destination: {host: server}}]
    - match: [{headers: {x-user: {exact: mirrored}}}]
      route: [{destination: {host: server, subset: v1}}]
      mirror: {host: server, subset: v2}
    - match: [{headers: {x-user: {exact: slow}}}]
      timeout: 2s
      route: [{destination: {host: server, subset: v1}}]
    - route: [{destination: {host: server, subset: v1}}]
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnvoyMesh]:
    async with EnvoyMesh.start(tmp_path_factory.mktemp("mesh"), WORKLOADS, BASE) as mesh:
        yield mesh


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(running: EnvoyMesh, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[XdsClient]:
    client = await XdsClient.start(running, tmp_path_factory.mktemp("xds") / "one")
    yield client
    await client.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(running: EnvoyMesh) -> EnvoyMesh:
    await running.reset(BASE)
    return running


async def taken(client: XdsClient, answer: tuple[str, str], metadata: dict[str, str] | None = None) -> None:
    """Wait until a client acts on what it has acknowledged: gRPC's clients acknowledge first."""
    for _ in range(100):
        # So many in a row are not an accident of the rules before.
        if await client.calls(20, metadata=metadata) == [answer] * 20:
            return
    pytest.fail(f"the client never came to {answer}")


async def test_calls_are_split_and_the_split_changes_hot(mesh: EnvoyMesh, client: XdsClient) -> None:
    await mesh.apply(split(90, 10))
    first = await client.spread(400)
    assert 15 <= first["server-v2-0"] <= 75  # 40 within more than four standard deviations
    assert (await client.ask(stream="1"))["text"] in ("server-v1-0:1", "server-v2-0:1")
    for v1, v2, name in ((0, 100, "server-v2-0"), (100, 0, "server-v1-0")):
        await mesh.apply(split(v1, v2))
        await taken(client, ("OK", name))
        assert await client.spread(30) == {name: 30}
    # The stream stays where it began.
    assert (await client.ask(stream="2"))["text"].endswith(":2")


async def test_every_name_of_a_service_is_a_target(mesh: EnvoyMesh, client: XdsClient) -> None:
    await mesh.apply(split(0, 100))
    await taken(client, ("OK", "server-v2-0"))
    for target in ("server.mlmesh:9000", "server.mlmesh.svc:9000", "server.mlmesh.svc.cluster.local:9000"):
        assert await client.calls(target=target) == [("OK", "server-v2-0")]


async def test_rules_match_headers_and_inject_faults(mesh: EnvoyMesh, client: XdsClient) -> None:
    await mesh.apply(HEADERS)
    await taken(client, ("OK", "server-v2-0"), {"x-user": "ada"})
    assert await client.calls() == [("OK", "server-v1-0")]
    ((code, _),) = await client.calls(metadata={"x-user": "broken-1"})
    assert code == "RESOURCE_EXHAUSTED"


async def test_what_it_cannot_is_refused_rule_by_rule_and_said(mesh: EnvoyMesh, client: XdsClient) -> None:
    await mesh.apply(HEADERS)
    await taken(client, ("OK", "server-v2-0"), {"x-user": "ada"})
    for user, field in (("mirrored", "mirror"), ("slow", "timeout")):
        ((code, text),) = await client.calls(metadata={"x-user": user})
        assert code == "UNAVAILABLE"
        assert f": {field}: gRPC" in text
    ((code, text),) = await client.calls(target="nobody:9000")
    assert code == "UNAVAILABLE"
    assert "no service of the mesh has this host name and port" in text


async def test_a_client_may_do_without_what_it_cannot(
    mesh: EnvoyMesh, tmp_path_factory: pytest.TempPathFactory
) -> None:
    await mesh.apply(HEADERS)
    folder = tmp_path_factory.mktemp("xds") / "two"
    client = await XdsClient.start(mesh, folder, tolerated=frozenset({"mirror"}))
    try:
        assert await client.calls(metadata={"x-user": "mirrored"}) == [("OK", "server-v1-0")]
        assert (await client.calls(metadata={"x-user": "slow"}))[0][0] == "UNAVAILABLE"
    finally:
        await client.stop()


async def test_servers_know_who_calls(mesh: EnvoyMesh, client: XdsClient) -> None:
    await mesh.apply(POLICY % "client")
    assert (await client.calls())[0][0] == "OK"
    await mesh.apply(POLICY % "somebody")
    assert (await client.calls())[0][0] == "PERMISSION_DENIED"


async def test_failures_are_retried(mesh: EnvoyMesh, client: XdsClient) -> None:
    await mesh.apply(split(100, 0))
    await taken(client, ("OK", "server-v1-0"))
    mesh.backends["server-v1-0"].calls = 0
    backend = mesh.backends["server-v1-0"]
    backend.fail, backend.fail_times = grpc.StatusCode.UNAVAILABLE, 2
    assert await client.calls() == [("OK", "server-v1-0")]
    assert backend.calls == 3


async def test_an_unproven_identity_is_told_nothing(mesh: EnvoyMesh, client: XdsClient) -> None:
    assert (await client.calls())[0][0] == "OK"
    connected = {node.id for node, status in mesh.ads.guests() if status.connected}
    assert connected == {"proxyless~mlmesh~client~one"}


async def test_the_status_tells_what_a_client_is_refused(mesh: EnvoyMesh, client: XdsClient) -> None:
    await mesh.apply(HEADERS)
    await client.calls()
    ((node, status), *_) = mesh.ads.guests()
    known = client_status(node, [status], mesh.clients[node.id])
    assert "server:9000" in known.targets
    assert [text for text in known.refused if "mirror" in text]
    assert known.does_without == ()
