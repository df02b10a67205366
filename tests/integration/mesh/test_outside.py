"""What leaves the mesh: spans to a collector, calls to services that Kubernetes does not know."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from mlmesh_runtime.telemetry import FORCE_HEADER
from tests.support.envoy_mesh import Backend, EnvoyMesh
from tests.support.mesh_documents import STRICT, deployment, service

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server", "server", "server")
    + service("server")
)


class Collector:
    """An OTLP collector that keeps spans by trace id."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Any]] = {}
        self._more = asyncio.Event()

    async def export(self, request: Any, _context: Any) -> Any:
        for resource_spans in request.resource_spans:
            for scope in resource_spans.scope_spans:
                for span in scope.spans:
                    self.spans.setdefault(span.trace_id.hex(), []).append(span)
        self._more.set()
        return trace_service_pb2.ExportTraceServiceResponse()

    async def trace(self, spans: int, trace_id: str = "") -> list[Any]:
        """Wait for a trace (any, or one) of so many spans."""
        async with asyncio.timeout(10):
            while True:
                found = [self.spans.get(trace_id, [])] if trace_id else list(self.spans.values())
                for trace in found:
                    if len(trace) >= spans:
                        return trace
                self._more.clear()
                await self._more.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    kept = Collector()
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    handler = grpc.unary_unary_rpc_method_handler(
        kept.export,
        request_deserializer=trace_service_pb2.ExportTraceServiceRequest.FromString,
        response_serializer=trace_service_pb2.ExportTraceServiceResponse.SerializeToString,
    )
    name = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Export": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield kept, f"127.0.0.1:{port}"
    await server.stop(None)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, collector: tuple[Collector, str]) -> AsyncIterator[EnvoyMesh]:
    folder = tmp_path_factory.mktemp("mesh")
    async with EnvoyMesh.start(folder, WORKLOADS, STRICT, otlp_address=collector[1]) as mesh:
        yield mesh


EVERYTHING = """
apiVersion: telemetry.istio.io/v1
kind: Telemetry
metadata: {name: tracing}
spec: {tracing: [{randomSamplingPercentage: 100}]}
"""


async def test_a_callers_decision_to_sample_is_followed(mesh: EnvoyMesh, collector: tuple[Collector, str]) -> None:
    spans, _ = collector
    unsampled, forced = "a" * 32, "b" * 32
    await mesh.call(metadata={"traceparent": f"00-{unsampled}-{'1' * 16}-00"})
    await mesh.call(metadata={"traceparent": f"00-{forced}-{'2' * 16}-01", FORCE_HEADER: forced})
    trace = await spans.trace(2, forced)
    by_kind = {span.kind: span for span in trace}
    client, server = by_kind[3], by_kind[2]
    assert client.parent_span_id.hex() == "2" * 16
    assert server.parent_span_id == client.span_id
    assert unsampled not in spans.spans
    (received,) = [m for m in mesh.backends["server-0"].metadata if forced in m.get("traceparent", "")]
    assert received["traceparent"].split("-")[2] == server.span_id.hex()


async def test_sampling_changes_hot_and_listeners_stay(mesh: EnvoyMesh, collector: tuple[Collector, str]) -> None:
    spans, _ = collector
    before = await mesh.configuration("client-0", "?resource=dynamic_listeners")
    await mesh.apply(EVERYTHING)
    spans.spans.clear()
    await mesh.call()
    trace = await spans.trace(2)
    assert {span.kind for span in trace} == {2, 3}
    assert await mesh.configuration("client-0", "?resource=dynamic_listeners") == before


async def test_a_share_of_calls_is_sampled(mesh: EnvoyMesh, collector: tuple[Collector, str]) -> None:
    spans, _ = collector
    await mesh.apply(EVERYTHING.replace("100", "10"))
    spans.spans.clear()
    await mesh.spread(300)
    last = "c" * 32
    await mesh.call(metadata={"traceparent": f"00-{last}-{'2' * 16}-01", FORCE_HEADER: last})
    # Spans leave in the order in which they ended.
    await spans.trace(2, last)
    assert 5 <= len(spans.spans) - 1 <= 60


ENTRY = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: models}
spec:
  hosts: [models.example]
  location: MESH_EXTERNAL
  resolution: STATIC
  ports: [{number: 9000, name: grpc, protocol: GRPC, targetPort: TARGET}]
  endpoints: [{address: ADDRESS}]
"""


async def test_a_service_outside_is_called_by_its_host(mesh: EnvoyMesh) -> None:
    outside = Backend("outside")
    address = mesh.free_address()
    server = await outside.serve(f"{address}:9000")
    assert (await mesh.call(host="models.example")).code is grpc.StatusCode.UNAVAILABLE
    await mesh.apply(ENTRY.replace("TARGET", "9000").replace("ADDRESS", address))
    answer = await mesh.call(host="models.example")
    assert answer.text == "outside"
    (received,) = outside.metadata
    assert "x-forwarded-client-cert" not in received
    await server.stop(None)
