"""Sending inference requests, one by one or over one stream, and reading what comes back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from mlmesh_cli.errors import CliError
from mlmesh_cli.tensors import Array, outputs
from mlmesh_cli.tracing import request_span
from mlmesh_client import AioClient, InferenceError, Result
from mlmesh_runtime.telemetry import inject
from open_inference import grpc_service_pb2 as oip

if TYPE_CHECKING:
    from open_inference.grpc_service_pb2_grpc import GRPCInferenceServiceAsyncStub


Metadata = tuple[tuple[str, str], ...]
# Every this-many-th request of a command is traced, beginning with the first.
_TRACE_EVERY = 100
STREAM_DEADLINE_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A request to send: its message, and the class expected where one is known (-1: unknown)."""

    request: oip.ModelInferRequest
    name: str
    expected: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back.

    Attributes:
        name: of the query.
        version: that answered; empty when the call failed.
        predicted: class of the largest output (-1 when there is none), `confidence` 0 to 1.
        expected: class expected, -1 when unknown.
        latency_s: from sending to the answer, seconds.
        error: "CODE: message", empty when it went well.
        trace_id: of the trace that recorded it, empty when none did.
        tensors: outputs by name.
    """

    name: str
    version: str = ""
    predicted: int = -1
    confidence: float = 0.0
    expected: int = -1
    latency_s: float = 0.0
    error: str = ""
    trace_id: str = ""
    tensors: dict[str, Array]

    def as_dict(self) -> dict[str, Any]:
        """For JSON output."""
        result = {field: getattr(self, field) for field in ("name", "version", "predicted", "confidence", "expected")}
        result |= {"latency_s": round(self.latency_s, 6), "error": self.error, "trace_id": self.trace_id}
        return result | {"outputs": {name: _jsonable(array) for name, array in self.tensors.items()}}


def _jsonable(array: Array) -> Any:
    if array.dtype == object:
        return [element.decode(errors="replace") for element in array.ravel()]
    return array.tolist()


def classify(tensors: dict[str, Array]) -> tuple[int, float]:
    """The class with the largest score of the first row of scores, and its probability; (-1, 0.0) when there is none.

    Scores that are not probabilities are taken as logits (softmax).
    """
    for array in tensors.values():
        if array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind == "f":
            row = array[0].astype(np.float64)
            best = int(row.argmax())
            if row.min() < 0 or not np.isclose(row.sum(), 1.0, atol=1e-3):
                row = np.exp(row - row.max())
                row /= row.sum()
            return best, float(row[best])
    return -1, 0.0


def read_answer(query: Query, response: oip.ModelInferResponse, latency_s: float, trace_id: str = "") -> Answer:
    """An answer from a response message."""
    return _answer(query, response.model_version, outputs(response), latency_s, trace_id)


def _answer(query: Query, version: str, tensors: dict[str, Array], latency_s: float, trace_id: str) -> Answer:
    predicted, confidence = classify(tensors)
    return Answer(
        name=query.name,
        version=version,
        predicted=predicted,
        confidence=confidence,
        expected=query.expected,
        latency_s=latency_s,
        trace_id=trace_id,
        tensors=tensors,
    )


async def infer_one(
    stub: GRPCInferenceServiceAsyncStub, query: Query, *, metadata: Metadata, timeout_s: float, traced: bool
) -> Answer:
    """Sends one unary request. A failed call becomes an answer with `error`."""
    begin = time.perf_counter()

    async def call() -> Answer:
        response = await stub.ModelInfer(query.request, metadata=metadata, timeout=timeout_s)
        return read_answer(query, response, time.perf_counter() - begin)

    def failed(error: grpc.aio.AioRpcError) -> Answer:
        text = f"{error.code().name}: {error.details()}"
        took = time.perf_counter() - begin
        return Answer(name=query.name, expected=query.expected, latency_s=took, error=text, tensors={})

    if not traced:
        try:
            return await call()
        except grpc.aio.AioRpcError as error:
            return failed(error)
    with request_span("mlmesh infer") as span:
        try:
            answer = await call()
        except grpc.aio.AioRpcError as error:
            answer = failed(error)
            span.error = answer.error
    return replace(answer, trace_id=span.trace_id)


async def infer_unary(
    stub: GRPCInferenceServiceAsyncStub,
    queries: Sequence[Query],
    *,
    metadata: Metadata = (),
    timeout_s: float = 10.0,
    concurrency: int = 1,
    each: Callable[[Answer], None] = lambda _answer: None,
) -> list[Answer]:
    """Sends every query as a call of its own, at most `concurrency` at once. Answers are in the queries' order."""
    answers: list[Answer | None] = [None] * len(queries)
    todo = iter(enumerate(queries))

    async def worker() -> None:
        for index, query in todo:
            answer = await infer_one(
                stub, query, metadata=metadata, timeout_s=timeout_s, traced=index % _TRACE_EVERY == 0
            )
            answers[index] = answer
            each(answer)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(queries))):
            group.create_task(worker())
    return [answer for answer in answers if answer is not None]


async def infer_stream(
    client: AioClient,
    queries: Sequence[Query],
    *,
    metadata: Metadata = (),
    in_flight: int = 8,
    each: Callable[[Answer], None] = lambda _answer: None,
) -> list[Answer]:
    """Sends every query over one stream, at most `in_flight` unanswered. Answers come in the order of the queries.

    The stream outlives connections: it goes on elsewhere when its server goes away or the mesh wants it to move.

    Raises:
        CliError: the stream could not go on.
    """
    sent: list[float] = []
    answers: list[Answer] = []
    model, version = queries[0].request.model_name, queries[0].request.model_version
    with request_span("mlmesh infer --stream") as span:
        traced = (*metadata, *inject().items())
        async with client.stream(model, version=version, in_flight=in_flight, metadata=traced) as stream:

            async def send() -> None:
                # A stream that fails says so to whoever waits for results.
                with contextlib.suppress(InferenceError):
                    for query in queries:
                        # A query may be sent more than once, and every message gets an id of its own.
                        message = oip.ModelInferRequest()
                        message.CopyFrom(query.request)
                        await stream.send_message(message, timeout=STREAM_DEADLINE_S)
                        sent.append(time.perf_counter())
                    stream.done_sending()

            async with asyncio.TaskGroup() as group:
                group.create_task(send())
                try:
                    async for result in stream:
                        took = time.perf_counter() - sent[len(answers)]
                        answer = _stream_answer(queries[len(answers)], result, took, span.trace_id)
                        answers.append(answer)
                        each(answer)
                except InferenceError as error:
                    raise CliError(
                        f"the stream ended after {len(answers)} of {len(queries)} answers with "
                        f"{error.code}: {error.message}",
                        "try again; `mlmesh status` shows what restarted",
                        reason="STREAM_CUT",
                    ) from None
    return answers


def _stream_answer(query: Query, result: Result, took: float, trace_id: str) -> Answer:
    if result.error is not None:
        error = f"{result.error.code}: {result.error.message}"
        return Answer(
            name=query.name, expected=query.expected, latency_s=took, error=error, trace_id=trace_id, tensors={}
        )
    return _answer(query, result.model_version, dict(result.outputs), took, trace_id)
