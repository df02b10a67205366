"""Traffic through real sidecars: where calls go, and that changes reach them at once and break nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from mlmesh_local.xds import ConfigurationRejectedError

from tests.support.envoy_mesh import CHAT, STRICT, SUBSETS, EnvoyMesh, deployment, service, split

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server-v1", "server", "server", version="v1", replicas=2)
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
)
BASE = STRICT + SUBSETS


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnvoyMesh]:
    async with EnvoyMesh.start(tmp_path_factory.mktemp("mesh"), WORKLOADS, BASE) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(running: EnvoyMesh) -> EnvoyMesh:
    await running.reset(BASE)
    return running


async def test_without_rules_every_endpoint_is_used(mesh: EnvoyMesh) -> None:
    assert set(await mesh.spread(60)) == {"server-v1-0", "server-v1-1", "server-v2-0"}


async def test_weights_split_and_change_hot(mesh: EnvoyMesh) -> None:
    assert await mesh.apply(split(90, 10)) < 1.0
    first = await mesh.spread(1000)
    assert 60 <= first["server-v2-0"] <= 145  # 90/10 within more than four standard deviations
    assert sum(count for name, count in first.items() if name.startswith("server-v1")) == 1000 - first["server-v2-0"]

    assert await mesh.apply(split(0, 100)) < 1.0
    assert await mesh.spread(100) == {"server-v2-0": 100}
