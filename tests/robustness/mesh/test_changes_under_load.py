"""Changes while calls go through: none fails, none is let through after its acknowledgement. Real Envoys.

`python -m benchmarks mesh-robustness` does the same a thousand times.
"""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import pytest

from mlmesh_local.envoy_types import ROUTES
from mlmesh_local.snapshot import Snapshot, pack_one
from mlmesh_local.xds import ConfigurationRejectedError
from tests.support.envoy_mesh import EnvoyMesh, load
from tests.support.mesh_documents import STRICT, SUBSETS, deployment, service, split
from tests.support.mesh_load import under_load
from tests.support.mesh_proofs import change_routes, switch_policy

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server-v1", "server", "server", version="v1")
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
)
BASE = STRICT + SUBSETS


async def test_routes_and_certificates_change_under_load_and_nothing_fails(mesh: EnvoyMesh) -> None:
    proof = await change_routes(mesh, changes=150, rotations=8)
    assert proof.failures == []
    assert proof.unary > 150
    assert proof.messages > 150


async def test_no_call_passes_after_a_policy_was_acknowledged(mesh: EnvoyMesh) -> None:
    proof = await switch_policy(mesh, rounds=40)
    assert proof.wrong == []
    assert proof.calls >= 40 * 2


async def test_the_control_plane_ends_and_comes_back_under_load(mesh: EnvoyMesh) -> None:
    await mesh.apply(split(100, 0))
    async with under_load(mesh) as outcomes:
        for weight in (30, 70):
            await mesh.stop_control_plane()
            await outcomes.more(20)
            await mesh.start_control_plane()
            for proxy in mesh.proxies:
                await mesh.ads.wait_connected(proxy.id, timeout_s=15)
            await mesh.apply(split(weight, 100 - weight))
            await outcomes.more(20)
    assert outcomes.codes() == {grpc.StatusCode.OK}


async def test_a_return_sends_what_changed_meanwhile_and_no_more(mesh: EnvoyMesh) -> None:
    """Envoy says what it has (initial_resource_versions): equal bytes have equal versions, whoever made them."""
    await mesh.apply(split(50, 50))
    before = await mesh.stats("client-0", "update_success|update_rejected")
    await mesh.stop_control_plane()
    await mesh.start_control_plane()
    await mesh.ads.wait_connected("client-0", timeout_s=15)
    after = await mesh.stats("client-0", "update_success|update_rejected")
    changed = {name for name in after if after[name] != before.get(name, 0) and "rejected" not in name}
    assert not [name for name in changed if "lds" in name or "rds" in name], changed
    assert all(count == 0 for name, count in after.items() if "rejected" in name)


async def test_snapshots_that_flap_end_at_the_last(mesh: EnvoyMesh) -> None:
    """Nobody waits for acknowledgements: each replaces the one before while that is under way."""
    async with under_load(mesh) as outcomes:
        for number in range(60):
            mesh.resources = mesh.resources.apply(load(split(number % 2 * 100, 100 - number % 2 * 100))).resources
            version = mesh.push()
            await asyncio.sleep(0)
        await mesh.ads.wait_acked(version, timeout_s=10)
        await outcomes.settled()
        assert set(await mesh.spread(40)) == {"server-v1-0"}
    assert outcomes.codes() == {grpc.StatusCode.OK}


async def test_an_envoy_that_refuses_does_not_hold_up_the_others(mesh: EnvoyMesh) -> None:
    await mesh.apply(split(100, 0))
    good = mesh.builder.build(mesh.world)
    bad = broken(good["client-0"])
    async with under_load(mesh) as outcomes:
        for _ in range(5):
            mesh.ads.update("client-0", bad)
            with pytest.raises(ConfigurationRejectedError):
                await mesh.ads.wait_acked(bad.version, timeout_s=30)
            assert mesh.ads.status("server-v1-0").acked_version == mesh.world.version
            mesh.ads.update("client-0", good["client-0"])
            await mesh.ads.wait_acked(good["client-0"].version, timeout_s=30)
        await outcomes.settled()
    assert outcomes.codes() == {grpc.StatusCode.OK}


def broken(snapshot: Snapshot) -> Snapshot:
    """A snapshot with routes that Envoy refuses: two virtual hosts of one domain."""
    host = {"name": "a", "domains": ["twice"], "routes": []}
    routes = pack_one(ROUTES, "9000", {"name": "9000", "virtual_hosts": [host, {**host, "name": "b"}]})
    resources = {**snapshot.resources, ROUTES: {**snapshot.resources[ROUTES], "9000": routes}}
    return dataclasses.replace(snapshot, version="broken", resources=resources)
