"""Step 5: where one request spent its time."""

from __future__ import annotations

import asyncio

import grpc

from mlmesh.local.v1 import local_pb2
from mlmesh_cli.connection import CONTROL_DEADLINE_S
from mlmesh_cli.demo.story import Story
from mlmesh_cli.inferring import infer_one
from mlmesh_cli.render.traces import trace_view
from mlmesh_cli.tracing import SERVICE, exporting

# Envoy sends spans every five seconds.
_ARRIVAL_S = 20.0
_PAUSE_S = 0.25
_STAGES = ("queue", "batch", "engine")


def missing_spans(spans: list[local_pb2.Span]) -> list[str]:
    """What a complete trace of one inference has and these spans lack."""
    services = {(span.service, span.kind) for span in spans}
    names = {span.name for span in spans}
    client = any(service == SERVICE for service, _ in services)
    sidecars = {
        "the client's sidecar": any("toolbox" in service and kind == "client" for service, kind in services),
        "the server's sidecar": any("inference" in service and kind == "server" for service, kind in services),
    }
    missing = [] if client else ["the client"]
    missing += [name for name, present in sidecars.items() if not present]
    return missing + [stage for stage in _STAGES if stage not in names]


async def one_request(story: Story) -> None:
    """Sends one traced request and draws its trace once all of it arrived."""
    stub = await story.connection.inference()
    async with exporting(await story.connection.otlp_endpoint()):
        answer = await infer_one(stub, story.queries[0], metadata=(), timeout_s=10, traced=True)
    trace = await _arrived(story, answer.trace_id)
    story.show(trace_view(trace))
    missing = missing_spans(list(trace.spans))
    detail = f"missing: {', '.join(missing)}" if missing else f"{len(trace.spans)} spans"
    story.check("one trace shows client, both sidecars, queue, batch and engine", not missing, detail)


async def _arrived(story: Story, trace_id: str) -> local_pb2.GetTraceResponse:
    control = await story.connection.control()
    trace = local_pb2.GetTraceResponse(trace_id=trace_id)
    deadline = asyncio.get_running_loop().time() + _ARRIVAL_S
    while asyncio.get_running_loop().time() < deadline:
        try:
            trace = await control.GetTrace(local_pb2.GetTraceRequest(trace_id=trace_id), timeout=CONTROL_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
        if trace.spans and not missing_spans(list(trace.spans)):
            break
        await asyncio.sleep(_PAUSE_S)
    return trace
