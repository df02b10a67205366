"""Who is let in: what has room, does not make the others wait too long, and can be answered in time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from mlmesh_inference.scheduling.execution import Run
from mlmesh_inference.scheduling.limiter import GradientLimiter
from mlmesh_inference.scheduling.pace import USABLE_LEAST, USABLE_MOST, Pace, end_ns
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.scheduling.queue import BatchQueue, Pending
from mlmesh_runtime.errors import Overloaded

_GOLDEN: Final = 0.618033988749895
_LIMIT_LEAST: Final = 64
"""The limiter never goes below this, whatever the engine."""


class Admission:
    """What one batcher has learnt of its engine, and the refusals that follow from it.

    Args:
        policy: bounds. instances: batches that run at once.
        seconds: median time of a batch by its rows, as measured at warm-up.
        name: of the model, for texts.
    """

    def __init__(
        self, policy: BatchPolicy, *, instances: int, name: str, seconds: Mapping[int, float] | None = None
    ) -> None:
        self._policy = policy
        self._instances = instances
        self._name = name
        self._refusals = 0
        self.full_rows = policy.rows_preferred if policy.batches else 1
        self.pace = Pace(self.full_rows, seconds)
        self.limiter: GradientLimiter | None = None
        if policy.limiter:
            busy = instances * self.full_rows
            most = max(policy.items_max(level) for level in (policy.level_default, *policy.queues)) + busy
            self.limiter = GradientLimiter(least=max(_LIMIT_LEAST, 4 * busy), most=most)
        # What follows lets most requests in without a closer look; see `Batcher.submit`.
        self.plenty = policy.items_max(1) if policy.levels == 1 else 0
        """As long as fewer wait, no level is full."""
        self.limit = 1 << 62
        """Requests that may be inside."""
        self.row_ns = self.turn_ns = 0.0
        """Nothing that waits takes longer than this a row ahead of it, and this beside."""
        self.least_ns = 0
        """No batch takes less."""
        self.usable = USABLE_MOST
        """Share of a caller's time that may be used here; see `pace`."""
        self._lost = 0
        self._refresh()

    def _refresh(self) -> None:
        pace = self.pace
        self.row_ns = pace.full_ns / self.full_rows / self._instances
        self.turn_ns = 2 * pace.full_ns + pace.margin_ns
        self.least_ns = int(max(pace.full_ns - pace.margin_ns, pace.batch_ns(1) / 2))
        if self.limiter is not None:
            self.limit = self.limiter.limit

    def learn(self, run: Run, done_ns: int, inside: int) -> None:
        """A batch was answered; `inside` requests waited or ran when it came back."""
        took, count = done_ns - run.formed_ns, len(run.items)
        if run.alone is None:
            expected = max([item.expected_ns for item in run.items])
            self.pace.observe(run.rows, took, done_ns - expected if expected else None)
        if self._lost:
            self._lost = 0
            self.usable = max(USABLE_LEAST, self.usable - 0.02)
        else:
            self.usable = min(USABLE_MOST, self.usable + 0.001)
        if self.limiter is not None:
            seen = done_ns * count - sum([item.arrived_ns for item in run.items])
            self.limiter.observe(done_ns, requests=count, seen_ns=seen, base_ns=took, inside=inside)
        self._refresh()

    def lost(self) -> None:
        """Somebody who was let in was not answered in time."""
        self._lost += 1

    def no_room(self, item: Pending, queue: BatchQueue, running_items: int) -> tuple[str, Overloaded] | None:
        """Why somebody has to be refused for this request to come in: the outcome's name, and what to tell.

        None where there is room.
        """
        if queue.held(item.level) >= self._policy.items_max(item.level):
            text = f"{queue.count} requests are waiting for model '{self._name}' already"
            return "refused", Overloaded(text, reason="QUEUE_FULL", retry_after_s=self._drained_s(queue))
        # What is less urgent does not stand in the way.
        if queue.waiting(item.level) + running_items >= self.limit:
            text = f"{self.limit} requests are inside of model '{self._name}' already"
            return "limited", Overloaded(text, reason="CONCURRENCY_LIMIT", retry_after_s=self._drained_s(queue))
        return None

    def too_late(
        self, item: Pending, queue: BatchQueue, running: Sequence[Run], *, deadline_ns: int, start_by_ns: int
    ) -> Overloaded | None:
        """What to tell a request that could not be answered by its deadline or begin by its time; None: let it in."""
        pace, now = self.pace, item.arrived_ns
        if not (deadline_ns or start_by_ns) or not pace.full_ns or not self._policy.admission:
            return None
        end = end_ns(
            pace,
            now_ns=now,
            rows_ahead=queue.rows_ahead(item),
            mates=queue.rows + item.rows,
            full_rows=self.full_rows,
            ends_ns=[run.ends_ns for run in running],
            instances=self._instances,
        )
        item.expected_ns = end
        late = end + pace.margin_ns - (now + self.usable * (deadline_ns - now)) if deadline_ns else 0.0
        if start_by_ns:
            late = max(late, end - pace.full_ns + pace.margin_ns - start_by_ns)
        if late <= 0:
            return None
        text = f"model '{self._name}' could not answer in time: {queue.count} requests wait"
        return Overloaded(text, reason="WOULD_EXPIRE", retry_after_s=self._spread(late / 1e9))

    def _drained_s(self, queue: BatchQueue) -> float:
        """Time until half of what waits has run."""
        turns = queue.rows / 2 / self.full_rows / self._instances
        return self._spread(turns * (self.pace.full_ns or 1e6) / 1e9)

    def _spread(self, wait_s: float) -> float:
        """Between once and one and a half times as long, never twice the same: those refused do not return as one."""
        self._refusals += 1
        return min(max(wait_s, 0.01), 10.0) * (1 + self._refusals * _GOLDEN % 1 / 2)
