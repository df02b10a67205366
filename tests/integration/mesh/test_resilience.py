"""What sidecars do about servers that fail: retries, ejection, bounds. And about a control plane that goes away."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from tests.support.envoy_mesh import EnvoyMesh
from tests.support.mesh_documents import STRICT, deployment, service

pytestmark = pytest.mark.asyncio(loop_scope="module")

BASE = STRICT
WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server", "server", "server", replicas=3)
    + service("server")
)


def rule(policy: str) -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: server}}
spec:
  host: server
  trafficPolicy: {policy}
---
"""


def retries(text: str) -> str:
    return f"""
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{name: server}}
spec:
  hosts: [server]
  http: [{{retries: {text}, route: [{{destination: {{host: server}}}}]}}]
---
"""


async def test_default_retries_hide_a_failing_replica(mesh: EnvoyMesh) -> None:
    mesh.backends["server-0"].fail = grpc.StatusCode.UNAVAILABLE
    found = await mesh.spread(150)
    assert set(found) == {"server-1", "server-2"}
    assert mesh.backends["server-0"].calls > 20  # it was tried, and another answered


async def test_two_retries_are_the_default(mesh: EnvoyMesh) -> None:
    for backend in mesh.backends.values():
        backend.fail = grpc.StatusCode.UNAVAILABLE
    assert (await mesh.call()).code is grpc.StatusCode.UNAVAILABLE
    assert mesh.calls() == 3


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_other_codes_are_not_retried(mesh: EnvoyMesh, code: grpc.StatusCode) -> None:
    for backend in mesh.backends.values():
        backend.fail = code
    assert (await mesh.call()).code is code
    assert mesh.calls() == 1


async def test_what_is_retried_can_be_said(mesh: EnvoyMesh) -> None:
    for backend in mesh.backends.values():
        backend.fail = grpc.StatusCode.RESOURCE_EXHAUSTED
    await mesh.apply(retries("{attempts: 4, retryOn: resource-exhausted, backoff: 1ms}"))
    assert (await mesh.call()).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert mesh.calls() == 5


async def test_no_attempts_means_no_retries(mesh: EnvoyMesh) -> None:
    for backend in mesh.backends.values():
        backend.fail = grpc.StatusCode.UNAVAILABLE
    await mesh.apply(retries("{attempts: 0}"))
    assert (await mesh.call()).code is grpc.StatusCode.UNAVAILABLE
    assert mesh.calls() == 1


async def test_each_try_has_its_own_timeout(mesh: EnvoyMesh) -> None:
    for backend in mesh.backends.values():
        backend.delay_s = 20.0
    # The server's sidecar watches the same 400 ms (Envoy tells it); whichever notices first decides on the code.
    await mesh.apply(retries("{attempts: 2, perTryTimeout: 400ms, retryOn: 'gateway-error,reset,deadline-exceeded'}"))
    answer = await mesh.call()
    assert answer.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert 1.18 <= answer.seconds < 8
    assert mesh.calls() == 3


async def test_a_failing_endpoint_is_ejected_and_comes_back(mesh: EnvoyMesh) -> None:
    ejection = "consecutive5xxErrors: 3, interval: 200ms, baseEjectionTime: 2s, maxEjectionPercent: 50"
    await mesh.apply(rule(f"{{outlierDetection: {{{ejection}}}}}"), retries("{attempts: 0}"))
    broken = mesh.backends["server-1"]
    broken.fail = grpc.StatusCode.UNAVAILABLE
    async with asyncio.timeout(60):
        while True:
            broken.calls = 0
            while broken.calls < 3:
                begun = time.monotonic()
                await mesh.call()
            codes = {(await mesh.call()).code for _ in range(20)}
            if time.monotonic() - begun < 2:
                break  # else it may be back: a busy machine needs another time
    assert codes == {grpc.StatusCode.OK}
    assert broken.calls == 3
    broken.fail = None
    async with asyncio.timeout(30):
        while broken.calls == 3:
            await mesh.call()


async def test_requests_beyond_the_bound_fail_at_once(mesh: EnvoyMesh) -> None:
    await mesh.apply(rule("{connectionPool: {http: {http2MaxRequests: 2}}}"), retries("{attempts: 0}"))
    for backend in mesh.backends.values():
        backend.delay_s = 60.0
    pending = {asyncio.ensure_future(mesh.call(timeout_s=60)) for _ in range(8)}
    refused = []
    async with asyncio.timeout(30):
        while len(refused) < 6:  # while the others are still being answered
            ended, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            refused += [call.result().code for call in ended]
        while mesh.calls() < 2:  # noqa: ASYNC110  on their way
            await asyncio.sleep(0.01)
    assert refused == [grpc.StatusCode.UNAVAILABLE] * 6
    assert (len(pending), mesh.calls()) == (2, 2)
    for call in pending:
        call.cancel()
    await asyncio.wait(pending)


async def test_a_hash_of_a_header_sticks_to_one_endpoint(mesh: EnvoyMesh) -> None:
    await mesh.apply(rule("{loadBalancer: {consistentHash: {httpHeaderName: x-user}}}"))
    chosen = {}
    for user in map(str, range(12)):
        found = await mesh.spread(5, metadata={"x-user": user})
        assert len(found) == 1
        chosen[user] = next(iter(found))
    assert len(set(chosen.values())) > 1


async def test_an_endpoint_that_is_not_ready_gets_nothing(mesh: EnvoyMesh) -> None:
    mesh.not_ready.add("server-2")
    await mesh.ads.wait_acked(mesh.push(), timeout_s=30)
    assert set(await mesh.spread(60)) == {"server-0", "server-1"}
    mesh.not_ready.update({"server-0", "server-1"})
    await mesh.ads.wait_acked(mesh.push(), timeout_s=30)
    assert (await mesh.call()).code is grpc.StatusCode.UNAVAILABLE


async def test_traffic_goes_on_without_a_control_plane(mesh: EnvoyMesh) -> None:
    await mesh.apply(retries("{attempts: 1}"))
    await mesh.stop_control_plane()
    assert set(await mesh.spread(60)) == {"server-0", "server-1", "server-2"}
    listeners = await mesh.configuration("client-0", "?resource=dynamic_listeners")
    await mesh.start_control_plane()
    async with asyncio.TaskGroup() as group:
        for proxy in mesh.proxies:
            group.create_task(mesh.ads.wait_connected(proxy.id, timeout_s=20))
    # What Envoy already has is not sent again: nothing drains.
    assert await mesh.configuration("client-0", "?resource=dynamic_listeners") == listeners
    for backend in mesh.backends.values():
        backend.calls, backend.fail = 0, grpc.StatusCode.UNAVAILABLE
    await mesh.apply(retries("{attempts: 0}"))
    assert (await mesh.call()).code is grpc.StatusCode.UNAVAILABLE
    assert mesh.calls() == 1
