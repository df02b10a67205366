"""The runner of one engine: takes requests, forms batches as instances become free, hands out the answers.

Work-conserving: an instance that is free takes what waits, and no timer holds it back unless the model's configuration
asks for one (`BatchPolicy.delay_us`). With several instances a batch takes no more than its instance's share of all
that is inside, so that one does not take everything while its neighbours have nothing.

Each model version has a batcher and threads of its own, so a slow model never stands in another's way; what they share
is the CPU. Statistics and health are answered on the event loop, which no engine occupies.

Everything but `Engine.run` happens on the event loop; nothing here needs a lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from mlmesh_inference.engines.base import Engine
from mlmesh_inference.running import Answer, Sink, Work, run, shape_key
from mlmesh_inference.scheduling.admission import Admission
from mlmesh_inference.scheduling.execution import Clock, Run, execute, outcomes
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.scheduling.queue import PATIENCE_NS, BatchQueue, Pending
from mlmesh_inference.scheduling.workers import Workers
from mlmesh_inference.tensors import Signature
from mlmesh_runtime.errors import MeshError, NotReady, Overloaded, TimedOut

_LOG = logging.getLogger(__name__)


class InferenceError(MeshError):
    """The engine failed on a request that was in order: INTERNAL with a fixed text; the engine's own is in the log."""

    default_reason = "ENGINE_FAILED"


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
        """A request left without running.

        "cancelled", "expired", "refused" (the queue is full), "limited" (the limiter), "would_expire".
        """


class Batcher:
    """Runs the requests of one model version on its engine.

    Args:
        engine: runs batches, on `engine.concurrency` threads named after `name`.
        policy: bounds.
        observer: is told of batches and drops.
        seconds: median time of a batch by its rows, as measured at warm-up.
        clock: time in nanoseconds, the one of `Work.deadline_ns`.
    """

    decoupled = False

    def __init__(
        self,
        engine: Engine,
        policy: BatchPolicy,
        observer: Observer,
        *,
        name: str,
        seconds: Mapping[int, float] | None = None,
        clock: Clock = time.monotonic_ns,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._observer = observer
        self._clock = clock
        self._name = name
        self._instances = engine.concurrency
        self._fixed_shapes = _fixed_shapes(engine.signature)
        self._queue = BatchQueue(policy)
        self._admission = Admission(policy, instances=engine.concurrency, name=name, seconds=seconds)
        self._one_level = policy.levels == 1
        self._bounds_waits = any(queue.timeout_us for queue in (policy.queue, *policy.queues.values()))
        self._loop = asyncio.get_running_loop()
        self._workers: Workers[Run] = Workers(engine.concurrency, name=f"engine-{name}", work=self._execute)
        self._running: list[Run] = []
        self._running_items = 0
        self._running_rows = 0
        self._since_ns = 0
        """When the first of those that wait came; for `delay_us`."""
        self._wake_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._failures = 0
        self._log_failures_ns = 0

    @property
    def depth(self) -> int:
        """Requests waiting."""
        return len(self._queue)

    @property
    def capacity(self) -> int:
        """Requests that may wait."""
        policy = self._policy
        if policy.levels == 1:
            return policy.items_max(1)
        # Not more levels than have bounds of their own: all the others are alike.
        return max(policy.items_max(level) for level in (policy.level_default, *policy.queues))

    @property
    def concurrency_limit(self) -> int:
        """Requests that may be inside, as the limiter has it now; 0 when nothing limits them."""
        limiter = self._admission.limiter
        return 0 if limiter is None else limiter.limit

    def submit(self, work: Work, sink: Sink) -> None:
        """Queue a checked request; see running.Runner.

        Raises NotReady while draining, TimedOut when the deadline has passed, Overloaded (QUEUE_FULL,
        CONCURRENCY_LIMIT, WOULD_EXPIRE). The sink is told InvalidInput, TimedOut, Overloaded or InferenceError.
        """
        if self._draining:
            raise NotReady(f"model '{self._name}' is being unloaded", reason="MODEL_NOT_READY")
        now, queue = self._clock(), self._queue
        level = 1 if self._one_level else self._policy.level(work.priority)
        deadline_ns = latest = work.deadline_ns
        order = now + PATIENCE_NS
        start_by = 0
        if self._bounds_waits or work.timeout_us:
            timeout_ns = self._policy.timeout_ns(level, work.timeout_us)
            if timeout_ns:
                start_by = now + timeout_ns
                latest = min(latest, start_by) if latest else start_by
        if 0 < latest < order:
            order = latest
        item = Pending(work, sink, self._shape_key(work), now, work.rows, level, latest, order)
        if 0 < deadline_ns <= now:
            self._observer.dropped(item, "expired")
            raise _expired()
        waiting = queue.count
        if not waiting:
            self._since_ns = now
        if waiting or len(self._running) >= self._instances:
            known = self._admission
            if (
                waiting >= known.plenty
                or waiting + self._running_items >= known.limit
                or (latest and known.usable * (latest - now) < queue.rows * known.row_ns + known.turn_ns)
            ):
                self._admit(item, deadline_ns, start_by)
            if deadline_ns:
                # A run that begins later than this is over too late, even if it goes faster than usual.
                latest = deadline_ns - known.least_ns
                item.latest_ns = min(latest, start_by) if start_by else latest
        queue.add(item)
        if not self._wake_scheduled and len(self._running) < self._instances:
            # At the end of this turn of the loop: requests that came in one turn run together.
            self._wake_scheduled = True
            self._loop.call_soon(self._dispatch)

    async def respond(self, work: Work) -> AsyncIterator[Answer]:
        """The one answer; see running.Runner."""
        yield Answer(outputs=work.outputs, arrays=await run(self, work))

    def _shape_key(self, work: Work) -> Hashable:
        if self._fixed_shapes:
            return work.outputs
        return work.shape_key or shape_key(work.inputs, work.outputs)

    def _admit(self, item: Pending, deadline_ns: int, start_by_ns: int) -> None:
        """All instances are busy, or others wait: refuse what has no room or cannot be in time."""
        admission = self._admission
        late = admission.too_late(item, self._queue, self._running, deadline_ns=deadline_ns, start_by_ns=start_by_ns)
        if late is not None:
            self._observer.dropped(item, "would_expire")
            raise late
        if (crowded := admission.no_room(item, self._queue, self._running_items)) is not None:
            self._make_room(item, *crowded)

    def _make_room(self, item: Pending, outcome: str, error: Overloaded) -> None:
        """Refuse this request, or another one in its place. Returns where it may come in."""
        victim, gone = self._queue.make_room(item, item.arrived_ns)
        for other in gone:
            self._drop(other)
        if victim is None:
            return
        self._observer.dropped(victim, outcome)
        if victim is item:
            raise error
        if not victim.sink.done():
            victim.sink.fail(error)

    def _dispatch(self) -> None:
        """Give every free instance a batch, as long as something waits."""
        self._wake_scheduled = False
        queue = self._queue
        while len(queue) and len(self._running) < self._instances:
            now = self._clock()
            if self._policy.delay_us and not self._draining and self._delayed(now):
                return
            self._cancel_timer()
            batch, dropped = queue.take(now, self._share())
            for item in dropped:
                self._drop(item)
            if batch:
                rows = sum([item.rows for item in batch])
                run = Run(items=batch, rows=rows, formed_ns=now, ends_ns=now + self._admission.pace.batch_ns(rows))
                self._running.append(run)
                self._running_items += len(batch)
                self._running_rows += rows
                self._idle.clear()
                self._workers.submit(run)
        if not self._running and not len(queue):
            self._idle.set()

    def _share(self) -> int:
        """Rows for the next batch: an equal part of all that is inside; 0 for no bound but the policy's."""
        if self._instances == 1:
            return 0
        return -(-(self._queue.rows + self._running_rows) // self._instances)

    def _delayed(self, now: int) -> bool:
        """Whether to wait for a fuller batch; sets the timer that ends the waiting."""
        until = self._since_ns + 1000 * self._policy.delay_us
        if self._queue.rows >= self._admission.full_rows or now >= until:
            return False
        if self._timer is None:
            self._timer = self._loop.call_later((until - now) / 1e9, self._delay_over)
        return True

    def _delay_over(self) -> None:
        self._timer = None
        self._since_ns = 0
        self._dispatch()

    def _drop(self, item: Pending) -> None:
        if item.sink.done():
            self._observer.dropped(item, "cancelled")
        else:
            self._observer.dropped(item, "expired")
            self._admission.lost()
            item.sink.fail(_expired())

    def _execute(self, run: Run) -> None:
        """On an engine thread. Whatever happens is handed back to the loop."""
        execute(run, self._engine, self._clock, batches=self._policy.batches)
        try:
            self._loop.call_soon_threadsafe(self._done, run)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return

    def _done(self, run: Run) -> None:
        """On the loop: free the instance first, so the next batch runs while this one's rows are handed out."""
        self._running.remove(run)
        inside = len(self._queue) + self._running_items
        self._running_items -= len(run.items)
        self._running_rows -= run.rows
        self._dispatch()
        failed: list[Pending] = []
        for item, outcome in zip(run.items, outcomes(run), strict=True):
            sink = item.sink
            if sink.done():
                if 0 < item.work.deadline_ns <= run.engine_end_ns:
                    self._admission.lost()
                continue
            if outcome is None:
                sink.fail(_expired())
            elif isinstance(outcome, list):
                sink.answer(outcome)
            else:
                failed.append(item)
                sink.fail(self._failure(outcome))
        done_ns = self._clock()
        self._admission.learn(run, done_ns, inside)
        self._observer.batch_done(
            BatchReport(
                items=run.items,
                rows=run.rows,
                formed_ns=run.formed_ns,
                engine_start_ns=run.engine_start_ns,
                engine_end_ns=run.engine_end_ns,
                done_ns=done_ns,
                failed=failed,
            )
        )

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
        self._cancel_timer()
        self._dispatch()
        await self._idle.wait()
        self._workers.close()
        # Giving 150 MB back to the system takes 50 ms, in which nobody would be answered.
        await asyncio.to_thread(self._engine.close)

    def abort(self) -> None:
        """Fail everything that waits, and take no more; what runs ends by itself."""
        self._draining = True
        self._cancel_timer()
        error: Final = NotReady("the server is shutting down", reason="MODEL_NOT_READY")
        for item in self._queue.clear():
            if not item.sink.done():
                item.sink.fail(error)
        self._workers.close()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _fixed_shapes(signature: Signature) -> bool:
    """Whether any two requests for the same outputs can share a batch."""
    return all(-1 not in spec.shape[1:] and not spec.optional for spec in signature.inputs)


def _expired() -> TimedOut:
    return TimedOut("the request's time ran out while it waited", reason="DEADLINE_TOO_SHORT")
