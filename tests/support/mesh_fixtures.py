"""One mesh of real Envoys for all tests of a module, as it was in the beginning for each of them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.envoy_mesh import EnvoyMesh


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnvoyMesh]:
    """Runs the module's WORKLOADS, configured by its BASE."""
    module = request.module
    async with EnvoyMesh.start(tmp_path_factory.mktemp("mesh"), module.WORKLOADS, module.BASE) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(request: pytest.FixtureRequest, running: EnvoyMesh) -> EnvoyMesh:
    """The module's mesh, with its BASE alone."""
    await running.reset(request.module.BASE)
    return running
