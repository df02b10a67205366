"""One request: look the model up, check, queue, answer. Unary RPCs and streams share it.

`prepare` is the one place where a request becomes a Work. `start` queues it and gives a future, for who wants to await;
`mlmesh_inference.oip.direct` answers without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.oip import replies, requests, wire
from mlmesh_inference.running import FutureSink, Work
from mlmesh_inference.tensors import Array
from mlmesh_inference.tracing import request_trace
from mlmesh_runtime.calls import CURRENT
from mlmesh_runtime.errors import MeshError, NotReady, Unauthenticated, Unsupported
from mlmesh_runtime.identity import current_identity
from open_inference import grpc_service_pb2 as pb

_Error = TypeVar("_Error", bound=Exception)

DECOUPLED: Final = "ModelInfer RPC doesn't support models with decoupled transaction policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request in order, and the work that it is.

    Attributes:
        id: as the caller gave it. request: how the answer is to look.
    """

    id: str
    model: ReadyModel
    request: requests.Request
    work: Work

    def reply(self, arrays: Sequence[Array], *, final: bool | None = None) -> pb.ModelInferResponse:
        """The answer; `final` as replies.write has it."""
        return replies.write(self.id, self.request, self.model, arrays, final=final)


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


def parse(encoded: bytes) -> pb.ModelInferRequest:
    """A request by protobuf. Raises InvalidInput for one that would cost far more memory than it has bytes, DecodeError
    for what is none."""
    wire.check(encoded)
    return pb.ModelInferRequest.FromString(encoded)


def prepare(
    catalog: Catalog,
    message: pb.ModelInferRequest,
    *,
    regions: requests.Regions | None = None,
    always_raw: bool = False,
) -> Prepared:
    """Check a request of the RPC being handled. Raises any MeshError. `regions`, `always_raw`: as of requests.read."""
    call = CURRENT.get()
    deadline = 0 if call is None or call.deadline is None else int(call.deadline * 1e9)
    model = catalog.resolve(message.model_name, message.model_version)
    request = requests.read(message, model, regions, always_raw=always_raw)
    try:
        tenant = current_identity()
    except Unauthenticated:
        tenant = ""
    work = work_of(request, deadline_ns=deadline, tenant=tenant, trace=request_trace())
    return Prepared(id=message.id, model=model, request=request, work=work)


def start(
    catalog: Catalog,
    message: pb.ModelInferRequest,
    *,
    regions: requests.Regions | None = None,
    always_raw: bool = False,
) -> Started:
    """Check a request and queue it, without waiting. Raises any MeshError: Unsupported for a decoupled model."""
    prepared = prepare(catalog, message, regions=regions, always_raw=always_raw)
    if prepared.model.runner.decoupled:
        raise Unsupported(DECOUPLED)
    sink = FutureSink()
    prepared.model.runner.submit(prepared.work, sink)
    return Started(id=prepared.id, model=prepared.model, request=prepared.request, outcome=sink.future)


def work_of(request: requests.Request, *, deadline_ns: int, tenant: str, trace: object | None) -> Work:
    """What a runner is given of a request; `deadline_ns` is the call's own, 0 for none."""
    options = request.options
    return Work(
        inputs=request.inputs,
        outputs=request.outputs,
        rows=request.rows,
        deadline_ns=deadline_ns,
        timeout_us=options.timeout_us,
        priority=options.priority,
        tenant=tenant,
        sequence=options.sequence,
        parameters=options.own,
        trace=trace,
    )


def failure(request_id: str, model_name: str, error: MeshError) -> pb.ModelStreamInferResponse:
    """What a stream says of a request that failed, in its place."""
    response = pb.ModelStreamInferResponse(error_message=error.message)
    response.infer_response.id = request_id
    response.infer_response.model_name = model_name
    response.infer_response.parameters[replies.FINAL].bool_param = True
    return response


def unplaced(error: _Error) -> _Error:
    """An error to be told later. Where a MeshError was raised is of no interest, but would keep the request alive."""
    if isinstance(error, MeshError):
        error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def shutting_down() -> NotReady:
    """What the protocol's clients are told when the server goes away."""
    return NotReady("GRPC server is shutting down and has stopped accepting new requests.", reason="DRAINING")
