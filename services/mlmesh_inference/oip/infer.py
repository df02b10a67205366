"""One request: look the model up, check, queue, answer. Unary RPCs and streams share it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import monotonic_ns

from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.oip import replies, requests
from mlmesh_inference.running import FutureSink, Work
from mlmesh_inference.tensors import Array
from mlmesh_inference.tracing import request_trace
from mlmesh_runtime.calls import CURRENT
from mlmesh_runtime.errors import NotReady
from open_inference import grpc_service_pb2 as pb


@dataclass(slots=True, kw_only=True)
class Started:
    """A request that waits for its engine."""

    id: str
    model: ReadyModel
    request: requests.Request
    outcome: asyncio.Future[list[Array]]

    async def finish(self) -> pb.ModelInferResponse:
        """Wait for the engine and write the answer. Raises what the batcher says; a cancelled caller withdraws it."""
        return replies.write(self.id, self.request, self.model, await self.outcome)


def start(catalog: Catalog, message: pb.ModelInferRequest) -> Started:
    """Check a request and queue it, without waiting. Raises any MeshError."""
    model = catalog.resolve(message.model_name, message.model_version)
    request = requests.read(message, model)
    sink = FutureSink()
    work = Work(
        inputs=request.inputs,
        outputs=request.outputs,
        rows=request.rows,
        deadline_ns=_deadline_ns(request.timeout_us),
        trace=request_trace(),
    )
    model.runner.submit(work, sink)
    return Started(id=message.id, model=model, request=request, outcome=sink.future)


def shutting_down() -> NotReady:
    """What the protocol's clients are told when the server goes away."""
    return NotReady("GRPC server is shutting down and has stopped accepting new requests.", reason="DRAINING")


def _deadline_ns(timeout_us: int) -> int:
    """The earlier of the RPC's deadline and the request's own timeout; 0 for neither."""
    call = CURRENT.get()
    deadline = 0 if call is None or call.deadline is None else int(call.deadline * 1e9)
    if timeout_us:
        own = monotonic_ns() + timeout_us * 1000
        deadline = min(deadline, own) if deadline else own
    return deadline
