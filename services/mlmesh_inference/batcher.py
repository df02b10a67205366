"""Dynamic batching without a timer: whatever waits when an engine instance is free runs together.

`BatchQueue` decides (pure, synchronous): what is taken, what is dropped, what is refused. `Batcher` acts: it hands
batches to the engine's own threads and gives every request its rows back. Each model version has its own of both, so a
slow model never stands in another's way.

Rules:

- A request whose sink is done (cancelled by its caller) or whose deadline has passed is dropped before it reaches the
  engine.
- Requests of one batch agree in every dimension but the first. Those that do not agree keep their place in the queue.
- When a batch of several fails, each of its requests runs alone, so that only the one at fault fails.
- The queue is bounded; one more is Overloaded (QUEUE_FULL), with a hint when to come back.

Everything but `Engine.run` happens on the event loop; nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from mlmesh_inference.engines.base import Engine, EngineError
from mlmesh_inference.running import Answer, Sink, Work, run
from mlmesh_inference.tensors import Array, show
from mlmesh_runtime.errors import InvalidInput, MeshError, NotReady, Overloaded, TimedOut

_LOG = logging.getLogger(__name__)

Clock = Callable[[], int]
"""Nanoseconds of a clock that never goes back."""


class InferenceError(MeshError):
    """The engine failed on a request that was in order: INTERNAL with a fixed text; the engine's own is in the log."""

    default_reason = "ENGINE_FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """Bounds of one model version.

    Attributes:
        batches: whether the first dimension is a free batch dimension; if not, every request runs alone.
        rows_max: most rows of one request and of one batch.
        rows_preferred: a batch takes no further request once it has this many rows.
        queue_items_max: requests that may wait.
    """

    batches: bool = True
    rows_max: int = 64
    rows_preferred: int = 8
    queue_items_max: int = 256


@dataclass(slots=True, kw_only=True, eq=False)
class Pending:
    """A request that waits. Times are nanoseconds of the batcher's clock."""

    work: Work
    sink: Sink
    shape_key: object
    arrived_ns: int


@dataclass(slots=True, kw_only=True)
class BatchReport:
    """How one batch went, for statistics and traces. Times are nanoseconds of the batcher's clock."""

    items: Sequence[Pending]
    rows: int
    formed_ns: int
    engine_start_ns: int
    engine_end_ns: int
    done_ns: int = 0
    failed: Sequence[Pending] = ()


class Observer(Protocol):
    """Is told what happens; must be quick and never raise."""

    def batch_done(self, report: BatchReport) -> None:
        """A batch ran; `report.failed` are the requests that failed in it."""

    def dropped(self, item: Pending, reason: str) -> None:
        """A request left without running: "cancelled", "expired" or "refused"."""


class BatchQueue:
    """Requests of one model version, in order of arrival. Decides, does nothing."""

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        self._items: deque[Pending] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Pending) -> bool:
        """Queue a request; False when the queue is full of requests that still matter."""
        if len(self._items) >= self._policy.queue_items_max:
            self._items = deque(waiting for waiting in self._items if not waiting.sink.done())
            if len(self._items) >= self._policy.queue_items_max:
                return False
        self._items.append(item)
        return True

    def take(self, now_ns: int) -> tuple[list[Pending], list[Pending]]:
        """Next batch and the requests dropped on the way: cancelled ones, whose future is done, and expired ones."""
        batch: list[Pending] = []
        dropped: list[Pending] = []
        kept: list[Pending] = []
        rows, policy = 0, self._policy
        while self._items:
            item = self._items.popleft()
            if item.sink.done() or (item.work.deadline_ns and item.work.deadline_ns <= now_ns):
                dropped.append(item)
            elif not batch:
                batch.append(item)
                rows = item.work.rows
            elif item.shape_key != batch[0].shape_key or rows + item.work.rows > policy.rows_max:
                kept.append(item)
            else:
                batch.append(item)
                rows += item.work.rows
            if batch and (not policy.batches or rows >= policy.rows_preferred or len(batch) >= policy.rows_max):
                break
        self._items.extendleft(reversed(kept))
        return batch, dropped


class Batcher:
    """Runs the requests of one model version on its engine.

    Args:
        engine: runs batches, on `engine.concurrency` threads named after `name`.
        policy: bounds.
        observer: is told of batches and drops.
        clock: time in nanoseconds.
    """

    def __init__(
        self,
        engine: Engine,
        policy: BatchPolicy,
        observer: Observer,
        *,
        name: str,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._observer = observer
        self._clock = clock
        self._queue = BatchQueue(policy)
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(engine.concurrency, thread_name_prefix=f"engine-{name}")
        self._name = name
        self._free = engine.concurrency
        self._wake_scheduled = False
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._failures = 0
        self._log_failures_ns = 0
        self._batch_ns = 1_000_000
        """Moving average of a batch's time in the engine: tells a refused caller when to come back."""

    @property
    def depth(self) -> int:
        """Requests waiting."""
        return len(self._queue)

    @property
    def capacity(self) -> int:
        """Requests that may wait."""
        return self._policy.queue_items_max

    decoupled = False

    def submit(self, work: Work, sink: Sink) -> None:
        """Queue a checked request; see running.Runner.

        Raises NotReady while draining, TimedOut when the deadline has passed, Overloaded (QUEUE_FULL). The sink is told
        InvalidInput, TimedOut or InferenceError.
        """
        now = self._clock()
        deadline_ns = work.deadline_ns
        item = Pending(
            work=work,
            sink=sink,
            shape_key=(tuple((name, array.shape[1:]) for name, array in work.inputs.items()), work.outputs),
            arrived_ns=now,
        )
        if self._draining:
            raise NotReady(f"model '{self._name}' is being unloaded", reason="MODEL_NOT_READY")
        if deadline_ns and deadline_ns <= now:
            self._observer.dropped(item, "expired")
            raise _expired()
        if not self._queue.add(item):
            self._observer.dropped(item, "refused")
            raise self._full()
        self._wake()

    async def respond(self, work: Work) -> AsyncIterator[Answer]:
        """The one answer; see running.Runner."""
        yield Answer(outputs=work.outputs, arrays=await run(self, work))

    def _full(self) -> Overloaded:
        batches = self._policy.queue_items_max / (self._policy.rows_preferred if self._policy.batches else 1)
        wait_s = batches * self._batch_ns / 1e9 / self._engine.concurrency
        return Overloaded(
            f"{self._policy.queue_items_max} requests are waiting for model '{self._name}' already",
            reason="QUEUE_FULL",
            retry_after_s=min(max(wait_s, 0.01), 10.0),
        )

    def _wake(self) -> None:
        """Dispatch at the end of this turn of the loop: requests that came in one turn run together."""
        if self._free and not self._wake_scheduled:
            self._wake_scheduled = True
            self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._wake_scheduled = False
        while self._free and len(self._queue):
            now = self._clock()
            batch, dropped = self._queue.take(now)
            for item in dropped:
                self._drop(item)
            if batch:
                self._free -= 1
                self._idle.clear()
                self._threads.submit(self._execute_batch, _Run(items=batch, formed_ns=now))

    def _drop(self, item: Pending) -> None:
        if item.sink.done():
            self._observer.dropped(item, "cancelled")
        else:
            self._observer.dropped(item, "expired")
            item.sink.fail(_expired())

    def _execute_batch(self, run: _Run) -> None:
        """On an engine thread. Whatever happens is handed back to the loop."""
        try:
            run.results = self._execute(run.items, run)
        except Exception as error:
            run.error = error
        run.engine_end_ns = self._clock()
        run.engine_start_ns = run.engine_start_ns or run.engine_end_ns
        if run.error is not None and len(run.items) > 1:
            run.alone = [self._execute_alone(item) for item in run.items]
        try:
            self._loop.call_soon_threadsafe(self._done, run)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def _execute(self, items: Sequence[Pending], run: _Run | None = None) -> list[Array]:
        first = items[0].work
        if len(items) == 1:
            inputs = first.inputs
        else:
            inputs = {name: np.concatenate([item.work.inputs[name] for item in items]) for name in first.inputs}
        if run is not None:
            run.engine_start_ns = self._clock()
        results = self._engine.run(inputs, first.outputs)
        if self._policy.batches:
            rows = sum(item.work.rows for item in items)
            for name, array in zip(first.outputs, results, strict=True):
                if array.shape[:1] != (rows,):
                    raise EngineError(f"output '{name}' has shape {show(array.shape)} for a batch of {rows} rows")
        return results

    def _execute_alone(self, item: Pending) -> list[Array] | Exception | None:
        """Results, the error, or None when nobody waits for it any more."""
        if item.sink.done() or (item.work.deadline_ns and item.work.deadline_ns <= self._clock()):
            return None
        try:
            return self._execute([item])
        except Exception as error:
            return error

    def _done(self, run: _Run) -> None:
        """On the loop: free the instance first, so the next batch runs while this one's rows are handed out."""
        self._free += 1
        self._dispatch()
        outcomes = run.alone if run.alone is not None else self._split(run)
        failed: list[Pending] = []
        for item, outcome in zip(run.items, outcomes, strict=True):
            if item.sink.done():
                continue
            if outcome is None:
                item.sink.fail(_expired())
            elif isinstance(outcome, list):
                item.sink.answer(outcome)
            else:
                failed.append(item)
                item.sink.fail(self._failure(outcome))
        took = run.engine_end_ns - run.engine_start_ns
        self._batch_ns += (took - self._batch_ns) // 8
        rows = sum(item.work.rows for item in run.items)
        self._observer.batch_done(
            BatchReport(
                items=run.items,
                rows=rows,
                formed_ns=run.formed_ns,
                engine_start_ns=run.engine_start_ns,
                engine_end_ns=run.engine_end_ns,
                done_ns=self._clock(),
                failed=failed,
            )
        )
        if self._free == self._engine.concurrency and not len(self._queue):
            self._idle.set()

    def _split(self, run: _Run) -> Sequence[list[Array] | Exception | None]:
        if run.error is not None:
            return [run.error]
        if len(run.items) == 1:
            return [run.results]
        outcomes, start = [], 0
        for item in run.items:
            outcomes.append([array[start : start + item.work.rows] for array in run.results])
            start += item.work.rows
        return outcomes

    def _failure(self, error: Exception) -> Exception:
        if isinstance(error, MeshError):
            return error
        self._failures += 1
        now = self._clock()
        if now >= self._log_failures_ns:
            # A model that fails on everything must not fill the log.
            _LOG.warning(
                "engine failed",
                extra={"model": self._name, "error": str(error)[:2000], "failures": self._failures},
            )
            self._failures, self._log_failures_ns = 0, now + 1_000_000_000
        return InferenceError(f"model '{self._name}' failed on the request; its log says why")

    async def drain(self) -> None:
        """Take no more, finish what waits and runs, stop the threads, close the engine."""
        self._draining = True
        self._dispatch()
        await self._idle.wait()
        self._threads.shutdown(wait=False)
        self._engine.close()

    def abort(self) -> None:
        """Fail everything that waits, and take no more; what runs ends by itself."""
        self._draining = True
        error: Final = NotReady("the server is shutting down", reason="MODEL_NOT_READY")
        while len(self._queue):
            batch, dropped = self._queue.take(self._clock())
            for item in (*batch, *dropped):
                if not item.sink.done():
                    item.sink.fail(error)
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass(slots=True, kw_only=True)
class _Run:
    items: list[Pending]
    formed_ns: int
    engine_start_ns: int = 0
    engine_end_ns: int = 0
    results: list[Array] = field(default_factory=list)
    error: Exception | None = None
    alone: list[list[Array] | Exception | None] | None = None


def _expired() -> TimedOut:
    return TimedOut("the request's time ran out while it waited", reason="DEADLINE_TOO_SHORT")


def check_rows(rows: int, policy: BatchPolicy, *, model: str) -> None:
    """Refuse a request with more rows than a batch may have."""
    if rows > policy.rows_max:
        raise InvalidInput(
            f"inference request batch-size must be <= {policy.rows_max} for '{model}', got {rows}",
            field="inputs",
            reason="SHAPE_MISMATCH",
        )
