"""Runs an ensemble: every step as soon as its inputs are there, on the runner of its own model.

A step is an ordinary request to its model's runner, so the steps of different requests meet in batches there, are
dropped when their time is over or nobody waits, and a model's queue holds back only what needs it. Deadline, priority,
tenant and trace of the request go with every step. Steps may change the number of rows (an image gives many crops);
more rows than a step's model takes at once go there in several requests.

One step's failure fails its request, and withdraws what else runs for it. A decoupled ensemble gives its outputs as
they come, one answer a step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from mlmesh_inference.pipelines.plan import ANY_SHAPE, Course, Node, Plan
from mlmesh_inference.pipelines.streams import AnswerStream, no_unary
from mlmesh_inference.running import Answer, Runner, Sink, Work
from mlmesh_inference.scheduling.batcher import BatchReport, Observer
from mlmesh_inference.scheduling.queue import Pending
from mlmesh_inference.tensors import Array, TensorSpec, show
from mlmesh_runtime.errors import InvalidInput, MeshError, NotReady, Overloaded, TimedOut

_COURSES_MAX: Final = 64
"""Sets of wanted outputs whose course is remembered."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """What runs a step.

    Attributes:
        runner: of the step's model. batches: whether its tensors have a batch dimension, of at most `rows_max` rows.
        owned: whether the graph gives it back when it is drained.
    """

    runner: Runner
    batches: bool = False
    rows_max: int = 0
    owned: bool = True


class Graph:
    """The runner of an ensemble; see running.Runner.

    Args:
        plan: the ensemble. parts: what runs each of its steps, in the order of plan.nodes.
        observer: is told of every request, as if it were a batch of its own.
        name: for texts. requests_max: requests under way; one more is refused.
        decoupled: whether outputs are given as they come.
        closing: called once it is drained.
    """

    def __init__(
        self,
        plan: Plan,
        parts: Sequence[Part],
        observer: Observer,
        *,
        name: str,
        requests_max: int,
        decoupled: bool = False,
        closing: Sequence[Callable[[], None]] = (),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.plan = plan
        self.parts = tuple(parts)
        self.decoupled = decoupled
        self._observer = observer
        self._closing = closing
        self._name = name
        self._requests_max = requests_max
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._courses: dict[tuple[str, ...], Course] = {}
        self._running: set[_Execution] = set()
        self._draining = False
        self._quiet = asyncio.Event()

    @property
    def depth(self) -> int:
        """Requests under way."""
        return len(self._running)

    @property
    def capacity(self) -> int:
        """Requests that may be under way."""
        return self._requests_max

    def submit(self, work: Work, sink: Sink) -> None:
        """Take a request; see running.Runner. Raises also what the first steps' runners raise."""
        if self.decoupled:
            raise no_unary()
        self._begin(work, sink, None)

    def respond(self, work: Work) -> AsyncIterator[Answer]:
        """Outputs as they come where the ensemble is decoupled, one answer where it is not; see running.Runner."""
        stream = AnswerStream(work.outputs)
        self._begin(work, stream, stream.send if self.decoupled else None)
        return stream

    def _begin(self, work: Work, sink: Sink, partial: Callable[[Answer], None] | None) -> None:
        now = self._clock()
        execution = _Execution(self, work, sink, partial=partial, arrived_ns=now)
        if self._draining:
            raise NotReady(f"model '{self._name}' is being unloaded", reason="MODEL_NOT_READY")
        if work.deadline_ns and work.deadline_ns <= now:
            self._observer.dropped(execution.pending, "expired")
            raise TimedOut("the request's time ran out while it waited", reason="DEADLINE_TOO_SHORT")
        if len(self._running) >= self._requests_max:
            self._observer.dropped(execution.pending, "refused")
            text = f"{self._requests_max} requests are under way for model '{self._name}' already"
            raise Overloaded(text, reason="QUEUE_FULL", retry_after_s=0.1)
        self._running.add(execution)
        execution.begin()

    def course(self, outputs: tuple[str, ...]) -> Course:
        """What must run for these outputs."""
        course = self._courses.get(outputs)
        if course is None:
            course = self.plan.course(outputs)
            if len(self._courses) < _COURSES_MAX:
                self._courses[outputs] = course
        return course

    def _over(self, execution: _Execution, *, failed: bool = False, dropped: str = "") -> None:
        """A request left, whichever way."""
        if execution not in self._running:
            return
        self._running.discard(execution)
        pending, now = execution.pending, self._clock()
        if dropped:
            self._observer.dropped(pending, dropped)
        else:
            self._observer.batch_done(
                BatchReport(
                    items=(pending,),
                    rows=pending.work.rows,
                    formed_ns=pending.arrived_ns,
                    engine_start_ns=pending.arrived_ns,
                    engine_end_ns=now,
                    done_ns=now,
                    failed=(pending,) if failed else (),
                )
            )
        if self._draining and not self._running:
            self._quiet.set()

    def _withdrawn(self, execution: _Execution) -> None:
        """Nobody waits; found out in the middle of a queue, or on an engine's thread."""
        self._loop.call_soon_threadsafe(lambda: self._over(execution, dropped="cancelled"))

    async def drain(self) -> None:
        """Take no more, finish what was taken, drain the runners that are the graph's own."""
        self._draining = True
        if self._running:
            await self._quiet.wait()
        for runner in self._own():
            await runner.drain()
        for close in self._closing:
            close()

    def abort(self) -> None:
        """See running.Runner."""
        self._draining = True
        for execution in list(self._running):
            execution.fail(NotReady("the server is shutting down", reason="MODEL_NOT_READY"))
        for runner in self._own():
            runner.abort()

    def _own(self) -> list[Runner]:
        """Runners to give back; two steps may share one."""
        return list({id(part.runner): part.runner for part in self.parts if part.owned}.values())


class _Execution:
    """One request on its way through the graph."""

    __slots__ = ("_course", "_graph", "_left", "_partial", "_waits", "finished", "pending", "sink", "values", "work")

    def __init__(
        self,
        graph: Graph,
        work: Work,
        sink: Sink,
        *,
        partial: Callable[[Answer], None] | None,
        arrived_ns: int,
    ) -> None:
        course = graph.course(work.outputs)
        self._graph = graph
        self._course = course
        self._partial = partial
        self._waits = list(course.waits)
        self._left = sum(wait >= 0 for wait in course.waits)
        self.work = work
        self.sink = sink
        self.values = dict(work.inputs)
        self.finished = False
        self.pending = Pending(work, sink, None, arrived_ns, work.rows)

    def begin(self) -> None:
        """Start the steps that wait for nothing. Raises what refuses one of them; nothing runs then."""
        try:
            for place in [place for place, wait in enumerate(self._waits) if wait == 0]:
                self._start(place)
        except MeshError:
            self.finished = True
            self._graph._over(self, failed=True)
            raise
        self._finish_if_done()

    def withdrawn(self) -> bool:
        """Whether nobody waits for this request any more."""
        if self.finished:
            return True
        if not self.sink.done():
            return False
        self.finished = True
        self._graph._withdrawn(self)
        return True

    def given(self, place: int, outputs: Sequence[str], arrays: Sequence[Array]) -> None:
        """A step has answered: start what waited for it."""
        if self.withdrawn():
            return
        node = self._graph.plan.nodes[place]
        named = {node.outputs[own]: array for own, array in zip(outputs, arrays, strict=True)}
        self.values.update(named)
        self._left -= 1
        if self._partial is not None:
            ready = tuple(name for name in self.work.outputs if name in named)
            if ready:
                self._partial(Answer(outputs=ready, arrays=[named[name] for name in ready]))
        try:
            for follower in self._graph.plan.follows[place]:
                self._waits[follower] -= 1
                if self._waits[follower] == 0:
                    self._start(follower)
        except MeshError as error:
            self.fail(error)
            return
        self._finish_if_done()

    def fail(self, error: Exception) -> None:
        """A step has failed."""
        if self.withdrawn():
            return
        self.finished = True
        self._graph._over(self, failed=True)
        self.sink.fail(error)

    def _finish_if_done(self) -> None:
        if self._left or self.finished:
            return
        self.finished = True
        self._graph._over(self)
        self.sink.answer([self.values[name] for name in self.work.outputs])

    def _start(self, place: int) -> None:
        node, part = self._graph.plan.nodes[place], self._graph.parts[place]
        inputs = {own: self.values[tensor] for own, tensor in node.inputs.items() if tensor in self.values}
        outputs = self._course.outputs[place]
        for spec in node.signature.inputs:
            if spec.name in inputs:
                _check_shape(node, spec, inputs[spec.name])
        rows = _rows(node, inputs.values()) if part.batches else 1
        if rows == 0:
            self.given(place, outputs, _nothing(node, outputs))
        elif not part.batches or rows <= part.rows_max:
            self._submit(part, inputs, outputs, rows, _StepSink(self, place, outputs))
        else:
            starts = range(0, rows, part.rows_max)
            pieces = _Pieces(self, place, outputs, len(starts))
            for index, start in enumerate(starts):
                piece = {name: array[start : start + part.rows_max] for name, array in inputs.items()}
                size = min(part.rows_max, rows - start)
                self._submit(part, piece, outputs, size, _PieceSink(pieces, index))

    def _submit(self, part: Part, inputs: dict[str, Array], outputs: tuple[str, ...], rows: int, sink: Sink) -> None:
        work = self.work
        part.runner.submit(
            Work(
                inputs=inputs,
                outputs=outputs,
                rows=rows,
                deadline_ns=work.deadline_ns,
                timeout_us=work.timeout_us,
                priority=work.priority,
                tenant=work.tenant,
                sequence=work.sequence,
                parameters=work.parameters,
                trace=work.trace,
            ),
            sink,
        )


class _StepSink:
    """Where a step's answer goes."""

    __slots__ = ("_execution", "_outputs", "_place")

    def __init__(self, execution: _Execution, place: int, outputs: tuple[str, ...]) -> None:
        self._execution = execution
        self._place = place
        self._outputs = outputs

    def done(self) -> bool:
        """See Sink."""
        return self._execution.withdrawn()

    def answer(self, arrays: Sequence[Array]) -> None:
        """See Sink."""
        self._execution.given(self._place, self._outputs, arrays)

    def fail(self, error: Exception) -> None:
        """See Sink."""
        self._execution.fail(error)


class _Pieces:
    """Answers of a step that had more rows than its model takes at once."""

    __slots__ = ("execution", "left", "outputs", "place", "results")

    def __init__(self, execution: _Execution, place: int, outputs: tuple[str, ...], count: int) -> None:
        self.execution = execution
        self.place = place
        self.outputs = outputs
        self.left = count
        self.results: list[Sequence[Array]] = [()] * count

    def put(self, index: int, arrays: Sequence[Array]) -> None:
        """One piece is there; with the last one the step has answered."""
        self.results[index] = arrays
        self.left -= 1
        if not self.left:
            try:
                joined = [np.concatenate(column) for column in zip(*self.results, strict=True)]
            except ValueError:
                text = f"step '{self.execution._graph.plan.nodes[self.place].name}' gives pieces of different shapes"
                self.execution.fail(InvalidInput(text, field="inputs", reason="SHAPE_MISMATCH"))
            else:
                self.execution.given(self.place, self.outputs, joined)


class _PieceSink:
    """Where the answer to some of a step's rows goes."""

    __slots__ = ("_index", "_pieces")

    def __init__(self, pieces: _Pieces, index: int) -> None:
        self._pieces = pieces
        self._index = index

    def done(self) -> bool:
        """See Sink."""
        return self._pieces.execution.withdrawn()

    def answer(self, arrays: Sequence[Array]) -> None:
        """See Sink."""
        self._pieces.put(self._index, arrays)

    def fail(self, error: Exception) -> None:
        """See Sink."""
        self._pieces.execution.fail(error)


def _check_shape(node: Node, spec: TensorSpec, array: Array) -> None:
    expected = spec.shape
    if expected == ANY_SHAPE:
        return
    shape = array.shape
    if len(shape) != len(expected) or any(want not in (have, -1) for have, want in zip(shape, expected, strict=True)):
        raise InvalidInput(
            f"unexpected shape for input '{spec.name}' of step '{node.name}'. Expected {show(expected)}, got "
            f"{show(shape)}",
            field=f"inputs[{node.inputs[spec.name]}].shape",
            reason="SHAPE_MISMATCH",
        )


def _rows(node: Node, arrays: Iterable[Array]) -> int:
    """The common first dimension of a step's inputs."""
    sizes: set[int] = {array.shape[0] for array in arrays}
    if len(sizes) != 1:
        raise InvalidInput(
            f"the inputs of step '{node.name}' have {' and '.join(map(str, sorted(sizes)))} rows",
            field="inputs",
            reason="SHAPE_MISMATCH",
        )
    return sizes.pop()


def _nothing(node: Node, outputs: Sequence[str]) -> list[Array]:
    """Outputs for no rows: a model need not run for them."""
    specs = {spec.name: spec for spec in node.signature.outputs}
    shapes = [(specs[name], [max(dim, 0) for dim in specs[name].shape]) for name in outputs]
    return [np.zeros((0, *shape[1:]), spec.datatype.dtype) for spec, shape in shapes]
