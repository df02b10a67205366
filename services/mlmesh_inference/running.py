"""What runs a model's requests: the port between the protocol's side and everything that answers.

A `Work` is a request that is in order. A `Runner` takes it: the batcher of one engine, a sequencer that keeps the state
of sequences around one, a graph of other models. Its answer goes to a `Sink`, so that the hot path needs no future a
request; who wants to await uses a `FutureSink`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlmesh_inference.tensors import Array

Parameter = bool | int | float | str
"""Value of a request's own parameter, as the protocol's InferParameter carries it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceControl:
    """Which sequence a request belongs to, and whether it begins or ends it.

    Attributes:
        id: correlation id, a number other than 0 or a text that is not empty.
        start, end: the protocol's sequence_start and sequence_end.
    """

    id: int | str
    start: bool = False
    end: bool = False


# Not frozen: it is made once a request, and a frozen dataclass takes twice the time.
@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """A checked request.

    Attributes:
        inputs: arrays by name, of the signature's dtypes and shapes, not always aligned or writable.
        outputs: names wanted, in that order.
        rows: size of the batch dimension, 1 for a model without one.
        deadline_ns: of the monotonic clock, 0 for none: when the caller stops waiting.
        timeout_us: longest wait in the queue that the request itself asks for (the protocol's `timeout`), 0 for none;
            whether it counts is the queue policy's to say, so it is not part of `deadline_ns`.
        priority: 1 is the most urgent, 0 the model's default level.
        tenant: identity of the caller (a SPIFFE id), "" when unknown; what fairness is between.
        sequence: of a stateful model. parameters: the request's own, those that the protocol reserves left out.
        trace: what the tracer wants to know, None when the request is not sampled.
        shape_key: `shape_key(inputs, outputs)`, where somebody knows it already.
    """

    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    rows: int = 1
    deadline_ns: int = 0
    timeout_us: int = 0
    priority: int = 0
    tenant: str = ""
    sequence: SequenceControl | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    trace: object | None = None
    shape_key: Hashable | None = None


def shape_key(inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Hashable:
    """What requests of one batch agree in: names, every dimension but the first, and the outputs wanted."""
    return tuple((name, array.shape[1:]) for name, array in inputs.items()), outputs


class Sink(Protocol):
    """Where the answer to one request goes. Called on the event loop, once, and must be quick and never raise."""

    def done(self) -> bool:
        """Whether nobody waits any more: cancelled, or answered already."""

    def answer(self, arrays: Sequence[Array]) -> None:
        """One array an output, in the order of Work.outputs; may be rows of a larger batch's."""

    def fail(self, error: Exception) -> None:
        """The request failed: a MeshError, or InferenceError."""


class FutureSink:
    """A sink that can be awaited. Cancel the future to withdraw the request."""

    __slots__ = ("future",)

    def __init__(self) -> None:
        self.future: asyncio.Future[list[Array]] = asyncio.get_running_loop().create_future()

    def done(self) -> bool:
        """See Sink."""
        return self.future.done()

    def answer(self, arrays: Sequence[Array]) -> None:
        """See Sink."""
        if not self.future.done():
            self.future.set_result(list(arrays))

    def fail(self, error: Exception) -> None:
        """See Sink."""
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One of several answers of a decoupled model.

    Attributes:
        outputs: names, and arrays: values in that order; an answer need not carry all outputs.
    """

    outputs: tuple[str, ...]
    arrays: Sequence[Array]


class Runner(Protocol):
    """Runs the requests of one model version. Everything is called on the event loop."""

    @property
    def decoupled(self) -> bool:
        """Whether a request has any number of answers: `respond` is then the only way to ask."""

    @property
    def depth(self) -> int:
        """Requests waiting."""

    @property
    def capacity(self) -> int:
        """Requests that may wait."""

    def submit(self, work: Work, sink: Sink) -> None:
        """Take a request; its one answer goes to the sink, later.

        Raises what refuses it at once: NotReady while draining, TimedOut when its time has passed, Overloaded,
        InvalidInput, Unsupported for a decoupled model.
        """

    def respond(self, work: Work) -> AsyncIterator[Answer]:
        """Take a request and give its answers as they come: one for an ordinary model, any number for a decoupled one.

        The reader's pace is the model's. Closing the iterator withdraws the request. Raises like `submit`.
        """

    async def drain(self) -> None:
        """Take no more, finish what was taken, give everything back."""

    def abort(self) -> None:
        """Fail what waits, take no more; what runs ends by itself."""


async def run(runner: Runner, work: Work) -> list[Array]:
    """One request, awaited: one array an output. Cancelling withdraws it. Raises what `submit` and the sink say."""
    sink = FutureSink()
    runner.submit(work, sink)
    return await sink.future
