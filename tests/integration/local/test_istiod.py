"""A mesh whose Envoys Istio's own control plane configures: calls, changes, and that control plane's end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psutil
import pytest

from mlmesh_local import process
from mlmesh_local.options import Options
from tests.integration.local.conftest import HERE, RunningMesh, answer, start, stop
from tests.support import tools

ROUTES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: mlmesh}
spec:
  hosts: [echo.mlmesh.svc.cluster.local]
  gateways: [mesh, mlmesh]
  http:
    - name: split
      headers: {response: {set: {x-by: istio}}}
      route:
        - {destination: {host: echo.mlmesh.svc.cluster.local, subset: v2, port: {number: 9000}}}
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """A mesh with echo v1 and v2, a toolbox and a gateway."""
    options = Options(
        state_dir=tmp_path_factory.mktemp("driven") / "state",
        manifests=(HERE / "manifests.yaml",),
        istio=(HERE / "istio.yaml",),
        gateway_address="127.0.0.1:0",
        control_plane="istiod",
        istiod=str(tools.require("pilot-discovery")),
    )
    running = RunningMesh(options, start(options))
    try:
        yield running
    finally:
        stop(options)
        assert process.leftovers(running.state.path) == []


def istiod(mesh: RunningMesh) -> psutil.Process:
    """The control plane's process."""
    (found,) = [item for item in process.leftovers(mesh.state.path) if "pilot-discovery" in item.name()]
    return found


async def test_calls_go_where_the_resources_say(driven: RunningMesh) -> None:
    async with driven.echo() as stub:
        versions = {(await answer(stub))["pod"].rsplit("-", 1)[0] for _ in range(10)}
    assert versions == {"echo-v1"}


async def test_a_change_is_active_when_it_is_acknowledged_also_after_the_control_plane_died(
    driven: RunningMesh,
) -> None:
    before = istiod(driven)
    before.kill()
    async with driven.echo() as stub:
        await answer(stub)
    applied = await driven.apply(ROUTES)
    assert applied.acked_sidecars == applied.connected_sidecars == 5
    async with driven.echo() as stub, asyncio.timeout(10):
        assert {(await answer(stub))["pod"].rsplit("-", 1)[0] for _ in range(5)} == {"echo-v2"}
    assert istiod(driven).pid != before.pid
