"""Models that answer any number of times, and models that are run again and again until they say stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.running import Answer, Runner, SequenceControl, Sink, Work, run
from mlmesh_inference.scheduling.batcher import InferenceError
from mlmesh_inference.sequence_plan import SequencePlan
from mlmesh_inference.tensors import Array, Signature
from mlmesh_runtime.errors import InvalidInput, MeshError, NotReady, Overloaded, Unsupported

ITERATIONS_MAX: Final = 1000
"""Runs of a model for one request where the configuration sets no bound."""


def no_unary() -> Unsupported:
    """What a request to a decoupled model is told that can have one answer only; the text is Triton's."""
    return Unsupported("ModelInfer RPC doesn't support models with decoupled transaction policy")


class AnswerStream:
    """A sink whose answers are read as an iterator; for runners whose answers are so few that none needs to wait.

    Args:
        outputs: names of the arrays where one answer is all there is.
    """

    def __init__(self, outputs: tuple[str, ...]) -> None:
        self._outputs = outputs
        self._queue: asyncio.Queue[Answer | Exception | None] = asyncio.Queue()
        self._sent = False
        self._over = False

    def done(self) -> bool:
        """See Sink."""
        return self._over

    def send(self, answer: Answer) -> None:
        """One of several answers."""
        self._sent = True
        self._queue.put_nowait(answer)

    def answer(self, arrays: Sequence[Array]) -> None:
        """The end, and the one answer where none was sent before."""
        if not self._sent:
            self._queue.put_nowait(Answer(outputs=self._outputs, arrays=arrays))
        self._queue.put_nowait(None)

    def fail(self, error: Exception) -> None:
        """See Sink."""
        self._queue.put_nowait(error)

    def __aiter__(self) -> AsyncIterator[Answer]:
        return self

    async def __anext__(self) -> Answer:
        if self._over:
            raise StopAsyncIteration
        item = await self._queue.get()
        if isinstance(item, Answer):
            return item
        self._over = True
        if item is None:
            raise StopAsyncIteration
        raise item

    async def aclose(self) -> None:
        """Withdraw the request."""
        self._over = True


class Decoupled:
    """A runner of one answer, for a model that is declared to have any number; see running.Runner."""

    decoupled = True

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    @property
    def depth(self) -> int:
        """Requests waiting."""
        return self._runner.depth

    @property
    def capacity(self) -> int:
        """Requests that may wait."""
        return self._runner.capacity

    def submit(self, work: Work, sink: Sink) -> None:  # noqa: ARG002  the port's
        """Refused: see running.Runner."""
        raise no_unary()

    def respond(self, work: Work) -> AsyncIterator[Answer]:
        """The one answer."""
        stream = AnswerStream(work.outputs)
        self._runner.submit(work, stream)
        return stream

    async def drain(self) -> None:
        """See running.Runner."""
        await self._runner.drain()

    def abort(self) -> None:
        """See running.Runner."""
        self._runner.abort()


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationPlan:
    """How a model is iterated: what it gets from itself, the output that says stop, the most runs.

    Attributes:
        signature: what callers see.
    """

    sequence: SequencePlan
    stop: str
    iterations_max: int
    signature: Signature

    @classmethod
    def of(
        cls, sequence: SequencePlan, signature: Signature, *, stop: str, iterations_max: int, outputs: Sequence[str]
    ) -> IterationPlan:
        """Check against the model's own signature. Raises EngineError."""
        if not stop:
            raise EngineError("an iterative_sequence needs parameter mlmesh.stop: the output that ends it")
        spec = next((spec for spec in signature.outputs if spec.name == stop), None)
        if spec is None or spec.datatype.itemsize == 0:
            raise EngineError(f"mlmesh.stop: the model has no output '{stop}' of numbers")
        public = sequence.signature
        if stop not in outputs:
            public = replace(public, outputs=tuple(spec for spec in public.outputs if spec.name != stop))
        return cls(sequence=sequence, stop=stop, iterations_max=iterations_max, signature=public)

    def wanted(self, outputs: tuple[str, ...]) -> tuple[str, ...]:
        """Outputs to ask the model for: the caller's, states, and the one that says stop."""
        wanted = self.sequence.wanted(outputs)
        return wanted if self.stop in wanted else (*wanted, self.stop)


class Iterative:
    """Runs a model on a request until its stop output is not zero: text that grows by a token, a solver that converges.

    Each run is a request to the engine's runner, so the runs of different requests share batches, and a request that
    ends makes room at once. Where the model is decoupled every run is an answer, and the next one begins when the
    reader has taken it; else the last run's outputs are the answer.

    Args:
        runner: of the engine. plan: how to iterate. name: of the model.
        batches: whether the model has a batch dimension; a request is then one row.
    """

    def __init__(self, runner: Runner, plan: IterationPlan, *, name: str, batches: bool, decoupled: bool) -> None:
        self.decoupled = decoupled
        self._runner = runner
        self._plan = plan
        self._name = name
        self._batches = batches
        self._loop = asyncio.get_running_loop()
        self._under_way: set[object] = set()
        self._draining = False
        self._quiet = asyncio.Event()

    @property
    def depth(self) -> int:
        """Requests under way."""
        return len(self._under_way)

    @property
    def capacity(self) -> int:
        """Requests that may be under way."""
        return self._runner.capacity

    def submit(self, work: Work, sink: Sink) -> None:
        """Take a request; see running.Runner. Its sink may be told Overloaded between two runs."""
        if self.decoupled:
            raise no_unary()
        self._check(work)
        iterations = _Iterations(self, work, sink)
        iterations.next()
        self._under_way.add(iterations)

    async def respond(self, work: Work) -> AsyncIterator[Answer]:
        """One answer a run where the model is decoupled; see running.Runner."""
        self._check(work)
        wanted, token = self._plan.wanted(work.outputs), object()
        self._under_way.add(token)
        try:
            state = self._plan.sequence.zeros()
            for iteration in range(self._plan.iterations_max):
                arrays = await run(self._runner, self.request(work, wanted, state, iteration))
                try:
                    state, stop = self.result(wanted, arrays)
                except EngineError as error:
                    raise InferenceError(str(error)) from error
                last = stop or iteration + 1 == self._plan.iterations_max
                if self.decoupled or last:
                    yield Answer(outputs=work.outputs, arrays=arrays[: len(work.outputs)])
                if last:
                    return
        finally:
            self.over(token)

    def _check(self, work: Work) -> None:
        if self._draining:
            raise NotReady(f"model '{self._name}' is being unloaded", reason="MODEL_NOT_READY")
        if self._batches and work.rows != 1:
            raise InvalidInput(
                f"inference request to model '{self._name}' must specify batch-size 1 due to requirements of sequence "
                f"batcher, got {work.rows}",
                field="inputs",
                reason="SHAPE_MISMATCH",
            )
        if len(self._under_way) >= self.capacity:
            text = f"{self.capacity} requests are under way for model '{self._name}' already"
            raise Overloaded(text, reason="QUEUE_FULL")

    def wanted(self, work: Work) -> tuple[str, ...]:
        """Outputs to ask the model for."""
        return self._plan.wanted(work.outputs)

    def begin(self) -> dict[str, Array]:
        """State of a first run."""
        return self._plan.sequence.zeros()

    def request(self, work: Work, wanted: tuple[str, ...], state: dict[str, Array], iteration: int) -> Work:
        """A run's request."""
        known = work.sequence
        control = SequenceControl(id=known.id if known else 1, start=iteration == 0)
        inputs = self._plan.sequence.inputs(work, state, control)
        return replace(work, inputs=inputs, outputs=wanted, shape_key=None)

    def result(self, wanted: tuple[str, ...], arrays: Sequence[Array]) -> tuple[dict[str, Array], bool]:
        """State after a run, and whether it says stop. Raises EngineError."""
        stop = bool(arrays[wanted.index(self._plan.stop)].any())
        return self._plan.sequence.states_of(wanted, arrays), stop

    def ended(self, iteration: int, *, stop: bool) -> bool:
        """Whether this run was the last."""
        return stop or iteration + 1 >= self._plan.iterations_max

    def withdrawn(self, iterations: object) -> None:
        """Nobody waits; found out in the middle of a queue, or on an engine's thread."""
        self._loop.call_soon_threadsafe(self.over, iterations)

    def over(self, iterations: object) -> None:
        """A request left."""
        self._under_way.discard(iterations)
        if self._draining and not self._under_way:
            self._quiet.set()

    def give(self, work: Work, sink: Sink) -> None:
        """A run's request to the engine's runner."""
        self._runner.submit(work, sink)

    async def drain(self) -> None:
        """See running.Runner."""
        self._draining = True
        if self._under_way:
            await self._quiet.wait()
        await self._runner.drain()

    def abort(self) -> None:
        """See running.Runner."""
        self._draining = True
        self._runner.abort()


class _Iterations:
    """One request of a model that has one answer, on its way through its runs; the sink of each of them."""

    __slots__ = ("_iteration", "_owner", "_sink", "_state", "_wanted", "_work")

    def __init__(self, owner: Iterative, work: Work, sink: Sink) -> None:
        self._owner = owner
        self._work = work
        self._sink = sink
        self._wanted = owner.wanted(work)
        self._state = owner.begin()
        self._iteration = 0

    def next(self) -> None:
        """Run once more. Raises what the engine's runner does."""
        self._owner.give(self._owner.request(self._work, self._wanted, self._state, self._iteration), self)

    def done(self) -> bool:
        """See Sink."""
        if not self._sink.done():
            return False
        self._owner.withdrawn(self)
        return True

    def answer(self, arrays: Sequence[Array]) -> None:
        """See Sink."""
        if self.done():
            return
        try:
            self._state, stop = self._owner.result(self._wanted, arrays)
            if not self._owner.ended(self._iteration, stop=stop):
                self._iteration += 1
                self.next()
                return
        except MeshError as error:
            self.fail(error)
            return
        except EngineError as error:
            self.fail(InferenceError(str(error)))
            return
        self._owner.over(self)
        self._sink.answer(arrays[: len(self._work.outputs)])

    def fail(self, error: Exception) -> None:
        """See Sink."""
        self._owner.over(self)
        if not self._sink.done():
            self._sink.fail(error)
