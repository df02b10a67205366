"""The order of waiting requests: priority levels, then tenants (`fairness`), then deadlines. Decides, does nothing.

- Levels are strict, as Triton's: while anything of level 1 waits, a batch begins with it. A level that is never empty
  starves those below it; bounds of their waits (`QueueConfig.timeout_us`) are theirs to set.
- Within a tenant the earliest deadline goes first. A request without a deadline goes as if it had one `PATIENCE_NS`
  after it came, and so does one with a later deadline: behind everything urgent, in the order of arrival, and no
  request that comes `PATIENCE_NS` later goes first. That bounds how long either can be passed over.
- A batch holds requests of one shape key: that of the request that goes first. The others keep their place.
- A request that is done with (`Sink.done`) or whose run would be in vain (`Pending.latest_ns`) never enters a batch.

As long as all that waits is alike (one level, one tenant, one shape, deadlines in the order of arrival) a deque is the
whole queue, which is the ordinary case. The first request that is not alike moves what waits into `FairLevel`s, until
the queue is empty once.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from typing import Final

from mlmesh_inference.scheduling.fairness import FairLevel, Pending
from mlmesh_inference.scheduling.policy import BatchPolicy

__all__ = ["PATIENCE_NS", "BatchQueue", "Pending"]

PATIENCE_NS: Final = 30_000_000_000
"""Deadlines further away than this do not count as such."""


class BatchQueue:
    """Requests of one model version."""

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        self._alike: deque[Pending] = deque()
        self._levels: dict[int, FairLevel] = {}
        self._order: list[int] = []
        self._mixed = False
        self._serial = 0
        self._sweep_in = 0
        self.count = 0
        """Requests that wait."""
        self.rows = 0
        """Rows that wait."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Pending]:
        yield from self._alike
        for level in self._order:
            yield from self._levels[level]

    def waiting(self, level: int) -> int:
        """Requests of this level and of more urgent ones."""
        if self._mixed:
            return sum(len(self._levels[urgent]) for urgent in self._order if urgent <= level)
        return self.count if self.count and self._alike[0].level <= level else 0

    def held(self, level: int) -> int:
        """Requests of this level."""
        if self._mixed:
            known = self._levels.get(level)
            return 0 if known is None else len(known)
        return self.count if self.count and self._alike[0].level == level else 0

    def add(self, item: Pending) -> None:
        """Queue a request."""
        self._serial += 1
        item.serial = self._serial
        self.count += 1
        self.rows += item.rows
        if not self._mixed:
            alike = self._alike
            if not alike or self._fits(alike[-1], item):
                alike.append(item)
                return
            self._mix()
        self._put(item)

    def rows_ahead(self, item: Pending) -> int:
        """Rows that run before this request would, if it were queued now; not more than that."""
        if not self._mixed:
            last = self._alike[-1] if self._alike else None
            if last is None or item.level < last.level:
                return 0
            if item.level > last.level or self._fits(last, item):
                return self.rows
            self._mix()
        ahead = 0
        for level in self._order:
            if level >= item.level:
                return ahead + (self._levels[level].rows_ahead(item) if level == item.level else 0)
            ahead += self._levels[level].rows
        return ahead

    @staticmethod
    def _fits(last: Pending, item: Pending) -> bool:
        return (
            item.order_ns >= last.order_ns
            and item.shape_key == last.shape_key
            and item.work.tenant == last.work.tenant
            and item.level == last.level
        )

    def _mix(self) -> None:
        self._mixed = True
        for item in self._alike:
            self._put(item)
        self._alike.clear()

    def _put(self, item: Pending) -> None:
        level = self._levels.get(item.level)
        if level is None:
            level = self._levels[item.level] = FairLevel()
            insort(self._order, item.level)
        level.add(item)

    def _left(self, item: Pending) -> None:
        """A request left the levels."""
        self.count -= 1
        self.rows -= item.rows
        if not len(self._levels[item.level]):
            del self._levels[item.level]
            self._order.remove(item.level)
        if not self.count:
            self._mixed = False

    def make_room(self, item: Pending, now_ns: int) -> tuple[Pending | None, list[Pending]]:
        """There is no room for this request: who is refused instead, and who left because nobody needs them.

        The tenant that holds most gives way, if that is not the one who asks; its last request leaves the queue. None
        means that there is room after all; the request itself, that it is the one to refuse.
        """
        gone: list[Pending] = []
        self._sweep_in -= 1
        if self._sweep_in < 0:
            gone = self._sweep(now_ns)
            # Looking at all of them costs each refusal as much as looking at eight.
            self._sweep_in = self.count // 8
            if gone:
                return None, gone
        if not self._mixed:
            last = self._alike[-1] if self._alike else None
            if last is None or last.work.tenant == item.work.tenant or last.level != item.level:
                return item, gone
            self._mix()
        level = self._levels.get(item.level)
        victim = level.longest() if level is not None else None
        if level is None or victim is None or level.most_held <= level.held(item.work.tenant) + 1:
            return item, gone
        level.remove(victim)
        self._left(victim)
        return victim, gone

    def _sweep(self, now_ns: int) -> list[Pending]:
        """Take out whoever needs no answer any more."""
        gone = [item for item in self if item.sink.done() or 0 < item.latest_ns <= now_ns]
        if not self._mixed:
            left = set(map(id, gone))
            self._alike = deque(item for item in self._alike if id(item) not in left)
            self.count = len(self._alike)
            self.rows -= sum(item.rows for item in gone)
            return gone
        for item in gone:
            self._levels[item.level].remove(item)
            self._left(item)
        return gone

    def take(self, now_ns: int, rows_wanted: int = 0) -> tuple[list[Pending], list[Pending]]:
        """The next batch, and the requests that left on the way because their run would be in vain.

        Args:
            now_ns: the time.
            rows_wanted: rows at which the batch is full; 0 or more than the policy's `rows_preferred` means that.
        """
        preferred = self._policy.rows_preferred
        if 0 < rows_wanted < preferred:
            preferred = rows_wanted
        if not self._policy.batches:
            preferred = 0
        return self._take_mixed(now_ns, preferred) if self._mixed else self._take_alike(now_ns, preferred)

    def _take_alike(self, now_ns: int, preferred: int) -> tuple[list[Pending], list[Pending]]:
        batch: list[Pending] = []
        dropped: list[Pending] = []
        alike, rows_max, rows, left = self._alike, self._policy.rows_max, 0, 0
        while alike:
            item = alike[0]
            if item.sink.done() or 0 < item.latest_ns <= now_ns:
                dropped.append(item)
                left += item.rows
            elif batch and rows + item.rows > rows_max:
                break
            else:
                batch.append(item)
                rows += item.rows
            alike.popleft()
            if batch and (rows >= preferred or len(batch) >= rows_max):
                break
        self.count = len(alike)
        self.rows -= rows + left
        return batch, dropped

    def _take_mixed(self, now_ns: int, preferred: int) -> tuple[list[Pending], list[Pending]]:
        batch: list[Pending] = []
        dropped: list[Pending] = []
        rows_max, rows, at = self._policy.rows_max, 0, 0
        while at < len(self._order):
            number = self._order[at]
            level = self._levels[number]
            item = level.first_of(batch[0].shape_key) if batch else level.first()
            if item is None:
                at += 1
                continue
            if item.sink.done() or 0 < item.latest_ns <= now_ns:
                level.remove(item)
                dropped.append(item)
            elif batch and rows + item.rows > rows_max:
                break
            else:
                level.take(item)
                batch.append(item)
                rows += item.rows
            self._left(item)
            if batch and (rows >= preferred or len(batch) >= rows_max):
                break
        return batch, dropped

    def clear(self) -> list[Pending]:
        """Everything that waits; the queue is empty then."""
        items = list(self)
        self._alike.clear()
        self._levels.clear()
        self._order.clear()
        self._mixed, self.count, self.rows = False, 0, 0
        return items
