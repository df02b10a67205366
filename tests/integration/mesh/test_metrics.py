"""Istio's standard metrics, made of what real Envoys report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio

from mlmesh_local.metrics.registry import Distribution, Sample, samples
from tests.support.envoy_mesh import CHAT, EnvoyMesh
from tests.support.mesh_documents import STRICT, SUBSETS, deployment, service, split

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Two workloads share a ServiceAccount: only their addresses tell them apart.
WORKLOADS = (
    deployment("client", "client", "client")
    + deployment("other", "other", "client")
    + service("client")
    + deployment("server-v1", "server", "server", version="v1")
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
)
BASE = STRICT + SUBSETS
REPORTED_S = 10.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnvoyMesh]:
    async with EnvoyMesh.start(tmp_path_factory.mktemp("mesh"), WORKLOADS, BASE, metrics=True) as mesh:
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(running: EnvoyMesh) -> EnvoyMesh:
    await running.reset(BASE)
    return running


def found(mesh: EnvoyMesh, metric: str, **labels: str) -> list[Sample]:
    assert mesh.metrics is not None
    wanted = labels.items()
    return [s for s in samples(mesh.metrics.series) if s.metric == metric and wanted <= dict(s.labels).items()]


def count(mesh: EnvoyMesh, metric: str, **labels: str) -> int:
    values = [s.value for s in found(mesh, metric, **labels)]
    return sum(sum(v.counts) if isinstance(v, Distribution) else v for v in values)


async def until(condition: Callable[[], bool]) -> None:
    """Entries arrive within a fraction of a second."""
    async with asyncio.timeout(REPORTED_S):
        while not condition():  # noqa: ASYNC110  another process reports when it likes
            await asyncio.sleep(0.02)


async def test_requests_are_counted_on_both_sides_by_workload_version_and_status(mesh: EnvoyMesh) -> None:
    await mesh.apply(split(50, 50))
    spread = await mesh.spread(40)
    mesh.backends["server-v1-0"].fail = grpc.StatusCode.RESOURCE_EXHAUSTED
    await mesh.apply(split(100, 0))
    await mesh.spread(3)
    await until(lambda: count(mesh, "istio_requests_total") >= 86)
    for reporter in ("source", "destination"):
        sides = {"reporter": reporter, "source_workload": "client", "request_protocol": "grpc"}
        ok = {**sides, "grpc_response_status": "0", "response_code": "200"}
        for version in ("v1", "v2"):
            to = {"destination_workload": f"server-{version}", "destination_version": version}
            assert count(mesh, "istio_requests_total", **ok, **to) == spread[f"server-{version}-0"]
        assert count(mesh, "istio_requests_total", **sides, grpc_response_status="8") == 3
    assert count(mesh, "istio_requests_total") == 86


async def test_labels_are_istios(mesh: EnvoyMesh) -> None:
    await mesh.call()
    await until(lambda: count(mesh, "istio_requests_total", reporter="destination") > 0)
    (sample, *_) = found(mesh, "istio_requests_total", reporter="destination", source_workload="client")
    assert dict(sample.labels) == {
        "reporter": "destination",
        "source_workload": "client",
        "source_workload_namespace": "mlmesh",
        "source_principal": "spiffe://cluster.local/ns/mlmesh/sa/client",
        "source_app": "client",
        "source_version": "unknown",
        "source_canonical_service": "client",
        "source_canonical_revision": "latest",
        "source_cluster": "Kubernetes",
        "destination_workload": "server-v1",
        "destination_workload_namespace": "mlmesh",
        "destination_principal": "spiffe://cluster.local/ns/mlmesh/sa/server",
        "destination_app": "server",
        "destination_version": "v1",
        "destination_service": "server.mlmesh.svc.cluster.local",
        "destination_service_name": "server",
        "destination_service_namespace": "mlmesh",
        "destination_canonical_service": "server",
        "destination_canonical_revision": "v1",
        "destination_cluster": "Kubernetes",
        "request_protocol": "grpc",
        "response_code": "200",
        "grpc_response_status": "0",
        "response_flags": "-",
        "connection_security_policy": "mutual_tls",
    }
    mine = found(mesh, "istio_requests_total", reporter="source", destination_workload="server-v1")[0]
    differs = {name: value for name, value in mine.labels if dict(sample.labels)[name] != value}
    assert differs == {"reporter": "source", "connection_security_policy": "unknown"}


async def test_workloads_of_one_account_are_told_apart(mesh: EnvoyMesh) -> None:
    before = count(mesh, "istio_requests_total", reporter="destination", source_workload="other")
    await mesh.spread(5, "other-0")
    await until(
        lambda: count(mesh, "istio_requests_total", reporter="destination", source_workload="other") == before + 5
    )


async def test_open_streams_count_their_messages_while_they_run(mesh: EnvoyMesh) -> None:
    def messages() -> tuple[int, int]:
        sides = {"reporter": "destination", "source_workload": "client"}
        return (
            count(mesh, "istio_request_messages_total", **sides),
            count(mesh, "istio_response_messages_total", **sides),
        )

    await asyncio.sleep(0.6)  # what earlier tests did has been reported
    before, requests = messages(), count(mesh, "istio_requests_total")
    async with mesh.channel() as channel:
        stream: Any = channel.stream_stream(CHAT)(timeout=60)
        for _ in range(7):
            await stream.write(b"x")
            await stream.read()
        await until(lambda: messages() == (before[0] + 7, before[1] + 7))
        assert count(mesh, "istio_requests_total") == requests
        await stream.write(b"last")
        await stream.read()
        await stream.done_writing()
        await stream.read()
    await until(lambda: count(mesh, "istio_requests_total") == requests + 2)
    assert messages() == (before[0] + 8, before[1] + 8)


async def test_calls_that_reach_nobody_are_told_by_their_flags(mesh: EnvoyMesh) -> None:
    mesh.not_ready.update({"server-v1-0", "server-v2-0"})
    await mesh.ads.wait_acked(mesh.push(), timeout_s=5)
    await mesh.call()
    await until(lambda: count(mesh, "istio_requests_total", response_flags="UH") > 0)
    (sample,) = found(mesh, "istio_requests_total", response_flags="UH")
    labels = dict(sample.labels)
    assert (labels["destination_service_name"], labels["destination_workload"]) == ("server", "unknown")
    assert (labels["response_code"], labels["grpc_response_status"]) == ("200", "14")
