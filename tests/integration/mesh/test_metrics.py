"""Istio's standard metrics, made of what real Envoys report."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
import pytest_asyncio

from mlmesh_local.metrics.registry import Distribution, Sample, samples
from tests.support.envoy_mesh import CHAT, UNARY, EnvoyMesh
from tests.support.mesh_documents import STRICT, SUBSETS, deployment, service, split
from tests.support.mesh_world import resource

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Two workloads share a ServiceAccount: only their addresses tell them apart.
WORKLOADS = (
    deployment("client", "client", "client")
    + deployment("other", "other", "client")
    + service("client")
    + deployment("server-v1", "server", "server", version="v1")
    + deployment("server-v2", "server", "server", version="v2")
    + service("server")
    + deployment("db", "db", "db")
    + service("db").replace("{name: grpc, port: 9000, targetPort: grpc}", "{name: tcp, port: 7000, targetPort: grpc}")
)
BASE = STRICT + SUBSETS
REPORTED_S = 30.0
SIDES = ("source", "destination")


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
    before = count(mesh, "istio_requests_total")
    await mesh.call()
    await until(lambda: count(mesh, "istio_requests_total") == before + 2)
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
    before = {side: count(mesh, "istio_requests_total", reporter=side, source_workload="other") for side in SIDES}
    await mesh.spread(5, "other-0")
    for side in SIDES:
        await until(
            lambda side=side: (
                count(mesh, "istio_requests_total", reporter=side, source_workload="other") == before[side] + 5
            )
        )


async def test_open_streams_count_their_messages_while_they_run(mesh: EnvoyMesh) -> None:
    def messages() -> tuple[int, int]:
        sides = {"reporter": "destination", "source_workload": "client"}
        return (
            count(mesh, "istio_request_messages_total", **sides),
            count(mesh, "istio_response_messages_total", **sides),
        )

    # What earlier tests did has been reported: they wait for it.
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
    await mesh.ads.wait_acked(mesh.push(), timeout_s=30)
    await mesh.call()
    await until(lambda: count(mesh, "istio_requests_total", response_flags="UH") > 0)
    (sample,) = found(mesh, "istio_requests_total", response_flags="UH")
    labels = dict(sample.labels)
    assert (labels["destination_service_name"], labels["destination_workload"]) == ("server", "unknown")
    assert (labels["response_code"], labels["grpc_response_status"]) == ("200", "14")


async def test_connections_count_their_bytes_while_they_are_open(mesh: EnvoyMesh) -> None:
    def sides(metric: str, **labels: str) -> list[int]:
        to = {"destination_service_name": "db", "request_protocol": "tcp", **labels}
        return [count(mesh, metric, reporter=reporter, **to) for reporter in ("source", "destination")]

    async with mesh.channel(port=7000, host="db.mlmesh.svc.cluster.local") as channel:
        call = channel.unary_unary(UNARY)
        await call(b"x" * 5000, timeout=30)
        await until(lambda: min(sides("istio_tcp_connections_opened_total")) == 1)
        await until(lambda: min(sides("istio_tcp_received_bytes_total")) > 5000)
        assert sides("istio_tcp_connections_closed_total") == [0, 0]
    await until(lambda: sides("istio_tcp_connections_closed_total") == [1, 1])
    assert sides("istio_tcp_connections_opened_total") == [1, 1]
    secured = sides("istio_tcp_sent_bytes_total", connection_security_policy="mutual_tls", source_workload="client")
    assert secured[1] > 5000


async def test_labels_of_telemetry_are_made_of_headers(mesh: EnvoyMesh) -> None:
    await mesh.apply(
        resource(
            "Telemetry",
            "{metrics: [{overrides: [{match: {mode: SERVER}, tagOverrides: "
            "{model: {value: \"request.headers['x-model']\"}, source_app: {operation: REMOVE}}}]}]}",
            group="telemetry.istio.io/v1",
        )
    )
    async with asyncio.timeout(REPORTED_S):
        # Connections of the listener before go on for a while.
        while not (samples_found := found(mesh, "istio_requests_total", model="mnist")):
            await mesh.call(metadata={"x-model": "mnist"})
            await asyncio.sleep(0.1)
    sample = samples_found[0]
    assert "source_app" not in dict(sample.labels)
    assert dict(sample.labels)["reporter"] == "destination"


async def test_a_sidecar_that_is_killed_takes_no_counts_with_it(mesh: EnvoyMesh) -> None:
    sides = {"reporter": "source", "source_workload": "other"}
    before = count(mesh, "istio_requests_total", **sides)
    await mesh.spread(4, "other-0")
    await until(lambda: count(mesh, "istio_requests_total", **sides) == before + 4)
    await mesh.restart_envoy("other-0")
    await mesh.spread(3, "other-0")
    await until(lambda: count(mesh, "istio_requests_total", **sides) == before + 7)


PROVIDERS = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    extensionProviders:
    - {name: otlp, opentelemetry: {service: server.mlmesh.svc.cluster.local, port: 9000, grpc: {timeout: 1s}}}
    - {name: otlp-http, opentelemetry: {service: server.mlmesh.svc.cluster.local, port: 9000, http: {path: /v1/traces}}}
    - {name: zipkin, zipkin: {service: server.mlmesh.svc.cluster.local, port: 9000, maxTagLength: 64}}
    - {name: datadog, datadog: {service: server.mlmesh.svc.cluster.local, port: 9000}}
    - {name: skywalking, skywalking: {service: server.mlmesh.svc.cluster.local, port: 9000}}
    - {name: json, envoyFileAccessLog: {path: /dev/null, logFormat: {labels: {path: "%REQ_WITHOUT_QUERY(:PATH)%"}}}}
    - {name: otel-log, envoyOtelAls: {service: server.mlmesh.svc.cluster.local, port: 9000, logFormat: {text: a}}}
    - {name: http-log, envoyHttpAls: {service: server.mlmesh.svc.cluster.local, port: 9000}}
    - {name: tcp-log, envoyTcpAls: {service: server.mlmesh.svc.cluster.local, port: 9000}}
---
"""


@pytest.mark.parametrize("name", ["otlp", "otlp-http", "zipkin", "datadog", "skywalking"])
async def test_envoy_takes_every_provider_of_traces(mesh: EnvoyMesh, name: str) -> None:
    tags = "a: {literal: {value: b}}, c: {formatter: {value: '%REQ(:METHOD)%'}}, d: {environment: {name: HOME}}"
    spec = (
        f"{{tracing: [{{providers: [{{name: {name}}}], useRequestIdForTraceSampling: false, customTags: {{{tags}}}}}]}}"
    )
    await mesh.apply(PROVIDERS, resource("Telemetry", spec, group="telemetry.istio.io/v1"))
    assert (await mesh.call()).code is grpc.StatusCode.OK


async def test_envoy_takes_every_provider_of_logs_with_its_filter(mesh: EnvoyMesh) -> None:
    names = ", ".join(f"{{name: {name}}}" for name in ("envoy", "json", "otel-log", "http-log", "tcp-log"))
    spec = f"{{accessLogging: [{{providers: [{names}], filter: {{expression: 'response.code >= 400'}}}}]}}"
    await mesh.apply(PROVIDERS, resource("Telemetry", spec, group="telemetry.istio.io/v1"))
    assert (await mesh.call()).code is grpc.StatusCode.OK
    assert (await mesh.call(host="db.mlmesh.svc.cluster.local", port=7000)).code is grpc.StatusCode.OK
