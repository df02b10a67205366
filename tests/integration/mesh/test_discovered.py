"""Filters whose configuration comes over ECDS: changes act on open connections, and listeners stay as they are."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from mlmesh_local.envoy_types import EXTENSIONS, LISTENER, Json
from mlmesh_local.snapshot import pack
from mlmesh_local.translate import View, translate
from mlmesh_local.translate.discovered import discovered, extension
from mlmesh_local.xds import ConfigurationRejectedError
from tests.support.envoy_mesh import CHAT, EnvoyMesh, unary
from tests.support.mesh_documents import deployment, service

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server", "server", "server")
    + service("server")
)
FAULT = "envoy.extensions.filters.http.fault.v3.HTTPFault"
NAME = "test.fault"


def abort(status: int) -> Json:
    """Every request is answered so."""
    return {"abort": {"grpc_status": status, "percentage": {"numerator": 100}}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnvoyMesh]:
    async with EnvoyMesh.start(tmp_path_factory.mktemp("mesh"), WORKLOADS) as mesh:
        await push(mesh, "first", {})
        yield mesh


async def push(mesh: EnvoyMesh, version: str, fault: Json) -> None:
    """Give the client's sidecar a fault filter that takes its configuration over ECDS."""
    configuration = copy.deepcopy(translate(View(mesh.world), mesh.proxy("client-0")))
    listener = configuration[LISTENER][f"{mesh.proxy('client-0').outbound_address}_9000"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"].insert(0, discovered(NAME, FAULT))
    configuration[EXTENSIONS][NAME] = extension(NAME, FAULT, fault)
    mesh.ads.update("client-0", pack("client-0", configuration, version))
    await mesh.ads.wait_acked(version, timeout_s=30)


async def test_a_change_acts_at_once_on_open_connections_and_leaves_the_listener(running: EnvoyMesh) -> None:
    before = await running.configuration("client-0", "?resource=dynamic_listeners")
    async with running.channel() as channel:
        stream = channel.stream_stream(CHAT)(timeout=30)
        await stream.write(b"1")
        assert await stream.read() == b"server-0:1"
        for number in range(20):
            await push(running, f"closed-{number}", abort(7))
            refused = await unary(channel, b"", {}, 5)
            assert refused.code is grpc.StatusCode.PERMISSION_DENIED
            await push(running, f"open-{number}", {})
            assert (await unary(channel, b"", {}, 5)).code is grpc.StatusCode.OK
        await stream.write(b"2")
        assert await stream.read() == b"server-0:2"
        await stream.done_writing()
        assert await stream.code() is grpc.StatusCode.OK
    assert await running.configuration("client-0", "?resource=dynamic_listeners") == before


async def test_a_refused_extension_changes_nothing(running: EnvoyMesh) -> None:
    await push(running, "good", abort(8))
    with pytest.raises(ConfigurationRejectedError, match=r"(?i)http_?status"):
        await push(running, "bad", {"abort": {"http_status": 1, "percentage": {"numerator": 100}}})
    assert (await running.call()).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await push(running, "good again", {})
    assert (await running.call()).code is grpc.StatusCode.OK
