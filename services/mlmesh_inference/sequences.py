"""Sequences of requests that share a state: the runner of a model with sequence_batching.

A `Sequencer` stands before the runner of the engine. It gives a model what it wants beside the caller's inputs (the
state that its last answer left, and control inputs such as START), and takes the next state from the answer. Semantics
are those of Triton's sequence batcher (its docs, "Stateful Models" and "Implicit State Management"), oldest strategy:

- Requests of one sequence run one after the other, in the order they came; those of different sequences share batches.
- The first request of a sequence says START, and its state is zeros. START on a live sequence begins it anew.
- After the answer to END, or when nobody continued it for `idle_us`, a sequence is forgotten.
- A request that fails or is withdrawn leaves the state as it was.
- A sequence belongs to its caller: the same id of another identity is another sequence.

Everything happens on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.running import Answer, Runner, SequenceControl, Sink, Work, run
from mlmesh_inference.scheduling.batcher import InferenceError
from mlmesh_inference.sequence_plan import SequencePlan
from mlmesh_inference.serving import SequenceConfig
from mlmesh_inference.tensors import Array, show
from mlmesh_runtime.errors import InvalidInput, MeshError, NotFound, NotReady, Overloaded, WrongState

SEQUENCES_MAX: Final = 1024
"""Live sequences of a version whose configuration sets no bound."""

Id = int | str
_Key = tuple[str, Id]


@dataclass(slots=True, kw_only=True, eq=False)
class _Sequence:
    """A live sequence. `turn` is the request that runs; `ending` after one that says END was taken; `coming` while a
    request of it still runs where it lived before."""

    key: _Key
    state: dict[str, Array]
    used_ns: int
    queue: deque[tuple[Work, Sink]] = field(default_factory=deque)
    turn: _Turn | None = None
    ending: bool = False
    coming: bool = False

    @property
    def busy(self) -> bool:
        return self.turn is not None or bool(self.queue) or self.coming


class _Turn:
    """Where the engine's answer to one request of a sequence goes."""

    __slots__ = ("_owner", "sequence", "sink", "wanted", "work")

    def __init__(self, owner: Sequencer, sequence: _Sequence, work: Work, sink: Sink, wanted: tuple[str, ...]) -> None:
        self._owner = owner
        self.sequence = sequence
        self.work = work
        self.sink = sink
        self.wanted = wanted

    def done(self) -> bool:
        """See Sink. Whoever finds a request withdrawn drops it without a word, so the next one is let through here."""
        if not self.sink.done():
            return False
        self._owner._withdrawn(self)
        return True

    def answer(self, arrays: Sequence[Array]) -> None:
        """See Sink."""
        self._owner._answered(self, arrays)

    def fail(self, error: Exception) -> None:
        """See Sink."""
        self._owner._failed(self, error)


class Sequencer:
    """Runs requests of sequences; a running.Runner around another.

    Args:
        runner: of the engine. plan: what the model wants beside the caller's inputs. config: bounds.
        name: of the model, for texts. batches: whether the model has a batch dimension; a request is then one row.
        clock: nanoseconds that never go back.
    """

    decoupled = False

    def __init__(
        self,
        runner: Runner,
        plan: SequencePlan,
        config: SequenceConfig,
        *,
        name: str,
        batches: bool,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._runner = runner
        self._plan = plan
        self._state_bytes = plan.state_bytes
        self._name = name
        self._batches = batches
        self._clock = clock
        self._idle_ns = config.idle_us * 1000
        self._sequences_max = config.sequences_max or SEQUENCES_MAX
        self._loop = asyncio.get_running_loop()
        self._sequences: OrderedDict[_Key, _Sequence] = OrderedDict()
        self._wanted: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._taken = 0
        self._draining = False
        self._successor: Sequencer | None = None
        self._quiet = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def depth(self) -> int:
        """Requests waiting, here for their sequence's turn or before the engine."""
        return self._runner.depth + sum(len(sequence.queue) for sequence in self._sequences.values())

    @property
    def capacity(self) -> int:
        """Requests that may wait."""
        return self._runner.capacity

    @property
    def sequences(self) -> int:
        """Live sequences."""
        return len(self._sequences)

    @property
    def state_bytes(self) -> int:
        """Memory that the states of live sequences take."""
        return len(self._sequences) * self._state_bytes

    def submit(self, work: Work, sink: Sink) -> None:
        """Take a request of a sequence; see running.Runner.

        Raises what the engine's runner does; InvalidInput (INVALID_FIELD; SEQUENCE_NOT_FOUND for a sequence that did
        not begin here, was forgotten or is somebody else's); Overloaded (SEQUENCE_LIMIT, QUEUE_FULL).
        """
        control = self._checked(work)
        key = (work.tenant, control.id)
        known = self._sequences.get(key)
        if not control.start and (known is None or known.ending):
            raise self._unknown(control.id)
        sequence = known or self._begin(key)
        if sequence.busy:
            if self._taken >= self.capacity:
                text = f"{self._taken} requests are waiting for model '{self._name}' already"
                raise Overloaded(text, reason="QUEUE_FULL")
            sequence.queue.append((work, sink))
        else:
            try:
                self._run(sequence, work, sink)
            except BaseException:
                # It was not taken: a sequence that it would have begun does not exist.
                if known is None:
                    del self._sequences[key]
                raise
        sequence.ending = control.end
        self._taken += 1

    def _checked(self, work: Work) -> SequenceControl:
        control = work.sequence
        if self._draining:
            raise NotReady(f"model '{self._name}' is being unloaded", reason="MODEL_NOT_READY")
        if control is None or not control.id:
            raise InvalidInput(
                f"inference request to model '{self._name}' must specify a non-zero or non-empty correlation ID",
                field="parameters[sequence_id]",
            )
        if self._batches and work.rows != 1:
            raise InvalidInput(
                f"inference request to model '{self._name}' must specify batch-size 1 due to requirements of sequence "
                f"batcher, got {work.rows}",
                field="inputs",
                reason="SHAPE_MISMATCH",
            )
        return control

    def _unknown(self, sequence_id: Id) -> InvalidInput:
        shown = sequence_id if isinstance(sequence_id, int) else f"'{sequence_id[:64]}'"
        return InvalidInput(
            f"inference request for sequence {shown} to model '{self._name}' must specify the START flag on the first "
            "request of the sequence",
            field="parameters[sequence_start]",
            reason="SEQUENCE_NOT_FOUND",
        )

    def _begin(self, key: _Key) -> _Sequence:
        if len(self._sequences) >= self._sequences_max:
            self._forget_idle()
        if len(self._sequences) >= self._sequences_max:
            oldest = next(iter(self._sequences.values()))
            raise Overloaded(
                f"model '{self._name}' has {self._sequences_max} live sequences already",
                reason="SEQUENCE_LIMIT",
                retry_after_s=min(max((oldest.used_ns + self._idle_ns - self._clock()) / 1e9, 0.01), 10.0),
            )
        sequence = _Sequence(key=key, state=self._plan.zeros(), used_ns=self._clock())
        self._sequences[key] = sequence
        if self._timer is None:
            self._timer = self._loop.call_later(self._idle_ns / 1e9, self._timed)
        return sequence

    def _run(self, sequence: _Sequence, work: Work, sink: Sink) -> None:
        """Give a request to the engine's runner. Raises what that raises; the state is then as it was."""
        control = work.sequence
        if control is None:
            raise TypeError("a checked request has a sequence")
        state = self._plan.zeros() if control.start else sequence.state
        wanted = self._wanted.get(work.outputs)
        if wanted is None:
            wanted = self._plan.wanted(work.outputs)
            if len(self._wanted) < 64:
                self._wanted[work.outputs] = wanted
        turn = _Turn(self, sequence, work, sink, wanted)
        inputs = self._plan.inputs(work, state, control)
        self._runner.submit(replace(work, inputs=inputs, outputs=wanted, shape_key=None), turn)
        sequence.turn, sequence.state = turn, state

    def _answered(self, turn: _Turn, arrays: Sequence[Array]) -> None:
        sequence, work = turn.sequence, turn.work
        if sequence.turn is not turn:
            return
        try:
            sequence.state = self._plan.states_of(turn.wanted, arrays)
        except EngineError as error:
            self._failed(turn, InferenceError(str(error)))
            return
        self._release(turn)
        if not turn.sink.done():
            turn.sink.answer(arrays[: len(work.outputs)])

    def _failed(self, turn: _Turn, error: Exception) -> None:
        if turn.sequence.turn is turn:
            self._release(turn)
        if not turn.sink.done():
            turn.sink.fail(error)

    def _withdrawn(self, turn: _Turn) -> None:
        if turn.sequence.turn is turn:
            # Found out in the middle of somebody's queue, or on an engine's thread.
            self._loop.call_soon_threadsafe(self._let_go, turn)

    def _let_go(self, turn: _Turn) -> None:
        if turn.sequence.turn is turn:
            self._release(turn)

    def _release(self, turn: _Turn) -> None:
        """A request is over, whichever way: forget the sequence, or let its next request run."""
        sequence = turn.sequence
        sequence.turn = None
        sequence.used_ns = self._clock()
        self._over(sequence, turn.work)
        self._advance(sequence)

    def _advance(self, sequence: _Sequence) -> None:
        """Let the next request of a sequence run; with none left, it may go on elsewhere."""
        while sequence.queue:
            work, sink = sequence.queue.popleft()
            if sink.done():
                self._over(sequence, work)
                continue
            try:
                self._run(sequence, work, sink)
            except MeshError as error:
                self._over(sequence, work)
                sink.fail(error)
            else:
                return
        if self._successor is not None:
            self._successor._handed(sequence, ended=self._sequences.get(sequence.key) is not sequence)

    def _over(self, sequence: _Sequence, work: Work) -> None:
        self._taken -= 1
        control = work.sequence
        if self._sequences.get(sequence.key) is sequence:
            if control is not None and control.end and not sequence.queue:
                del self._sequences[sequence.key]
            else:
                self._sequences.move_to_end(sequence.key)
        if self._draining and self._taken == 0:
            self._quiet.set()

    def _timed(self) -> None:
        self._timer = None
        self._forget_idle()
        if self._sequences:
            oldest = next(iter(self._sequences.values()))
            wait_ns = max(oldest.used_ns + self._idle_ns - self._clock(), 1_000_000)
            self._timer = self._loop.call_later(wait_ns / 1e9, self._timed)

    def _forget_idle(self) -> None:
        """Forget sequences that nobody continued for too long; the dictionary is in the order of their last use."""
        before = self._clock() - self._idle_ns
        for sequence in list(self._sequences.values()):
            if sequence.busy:
                sequence.used_ns = self._clock()
                self._sequences.move_to_end(sequence.key)
            elif sequence.used_ns <= before:
                del self._sequences[sequence.key]
            else:
                return

    def adopt(self, before: Sequencer) -> None:
        """Go on with the sequences of the runner that answered for this version until now, such as by another engine.

        Those whose requests run there come when these are done; what is asked of them meanwhile waits here. Sequences
        of another kind of state are left to end.
        """
        if before._plan.states != self._plan.states:
            return
        before._successor = self
        for key, old in list(before._sequences.items()):
            if len(self._sequences) >= self._sequences_max:
                return
            sequence = self._begin(key)
            sequence.ending = old.ending
            if old.busy:
                sequence.coming = True
            else:
                sequence.state = old.state
                del before._sequences[key]

    def _handed(self, old: _Sequence, *, ended: bool) -> None:
        sequence = self._sequences.get(old.key)
        if sequence is None or not sequence.coming:
            return
        sequence.coming, sequence.state, sequence.used_ns = False, old.state, self._clock()
        if ended and not sequence.queue:
            del self._sequences[old.key]
        else:
            self._advance(sequence)

    def snapshot(self, tenant: str, sequence_id: Id) -> Mapping[str, Array]:
        """The state of a sequence between two requests, by input of the model; copies.

        Raises NotFound (SEQUENCE_NOT_FOUND), WrongState (SEQUENCE_BUSY) while a request of it waits or runs.
        """
        sequence = self._sequences.get((tenant, sequence_id))
        if sequence is None:
            raise NotFound(f"model '{self._name}' has no such sequence", reason="SEQUENCE_NOT_FOUND")
        self._check_idle(sequence)
        return {name: array.copy() for name, array in sequence.state.items()}

    def restore(self, tenant: str, sequence_id: Id, arrays: Mapping[str, Array]) -> None:
        """Let a sequence live here with the state that `snapshot` gave elsewhere; one of the same id is replaced.

        Raises InvalidInput (INVALID_FIELD, SHAPE_MISMATCH) for a state that is not of this model, Overloaded
        (SEQUENCE_LIMIT), WrongState (SEQUENCE_BUSY), NotReady while draining.
        """
        if self._draining:
            raise NotReady(f"model '{self._name}' is being unloaded", reason="MODEL_NOT_READY")
        expected = {state.input: state for state in self._plan.states}
        if arrays.keys() != expected.keys():
            raise InvalidInput(f"the state has tensors {sorted(arrays)}, expected {sorted(expected)}", field="state")
        for name, state in expected.items():
            array = arrays[name]
            if array.shape != state.shape or array.dtype != state.datatype.dtype:
                raise InvalidInput(
                    f"state '{name}' is {array.dtype}{show(array.shape)}, expected "
                    f"{state.datatype.name}{show(state.shape)}",
                    field=f"state[{name}]",
                    reason="SHAPE_MISMATCH",
                )
        key = (tenant, sequence_id)
        sequence = self._sequences.get(key)
        if sequence is None:
            sequence = self._begin(key)
        self._check_idle(sequence)
        sequence.state = {name: array.copy() for name, array in arrays.items()}
        sequence.used_ns = self._clock()
        self._sequences.move_to_end(key)

    def forget(self, tenant: str, sequence_id: Id) -> None:
        """Forget a sequence that went on elsewhere; nothing when there is none. Raises WrongState (SEQUENCE_BUSY)."""
        sequence = self._sequences.get((tenant, sequence_id))
        if sequence is not None:
            self._check_idle(sequence)
            del self._sequences[tenant, sequence_id]

    def _check_idle(self, sequence: _Sequence) -> None:
        if sequence.busy:
            raise WrongState(f"a request of the sequence to model '{self._name}' is running", reason="SEQUENCE_BUSY")

    async def respond(self, work: Work) -> AsyncIterator[Answer]:
        """The one answer; see running.Runner."""
        yield Answer(outputs=work.outputs, arrays=await run(self, work))

    async def drain(self) -> None:
        """Take no more, finish what was taken, forget every sequence, drain the engine's runner."""
        self._draining = True
        if self._taken:
            await self._quiet.wait()
        self._end()
        await self._runner.drain()

    def abort(self) -> None:
        """See running.Runner."""
        self._draining = True
        error = NotReady("the server is shutting down", reason="MODEL_NOT_READY")
        for sequence in list(self._sequences.values()):
            while sequence.queue:
                _, sink = sequence.queue.popleft()
                if not sink.done():
                    sink.fail(error)
        self._end()
        self._runner.abort()

    def _end(self) -> None:
        self._sequences.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
