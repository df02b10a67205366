"""Following the log: the present state or a replay first, then every change as it is committed.

A watcher is a cursor. Commits wake it; it then takes what it has not seen from a window of recent changes that all
watchers share, or from the database when that is further back. So memory is bounded by the window however many watch,
nothing polls, and a gap or a repeat would need two different revisions with one number.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime

from mlmesh_registry.events import Bookmark, Change
from mlmesh_registry.store import SqlModelStore
from mlmesh_runtime.errors import Overloaded

PAGE_ITEMS = 500

Event = Change | Bookmark


class ChangeFeed:
    """Hands committed changes to watchers.

    Args:
        store: the log and the present state.
        queue_items_max: a watcher that has caught up once and then falls behind by more changes is ended; also the
            size of the shared window.
        bookmark_s: an idle watcher gets a bookmark this often.
        clock: the present time, timezone-aware UTC.
    """

    def __init__(
        self, store: SqlModelStore, *, queue_items_max: int, bookmark_s: float, clock: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._queue_items_max = queue_items_max
        self._bookmark_s = bookmark_s
        self._clock = clock
        self._recent: deque[Change] = deque(maxlen=queue_items_max)
        self._head = 0
        self._news = asyncio.Event()

    async def open(self) -> None:
        """Learn where the log stands. Call it before the first write and the first watcher."""
        self._head = await self._store.head()

    def publish(self, changes: Sequence[Change]) -> None:
        """Take in the changes of one commit, on the event loop, in commit order; wakes every watcher."""
        self._recent.extend(changes)
        self._head = changes[-1].revision
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def watch(self, from_revision: int, model_id: str | None) -> AsyncGenerator[Event, None]:
        """Events in revision order without gap or repeat, of one model or (None) of all.

        from_revision 0 gives the present state first, another number replays from there; a bookmark ends that backlog.
        Errors: RevisionLost (REVISION_LOST), Overloaded (WATCHER_TOO_SLOW). It has no end of its own.
        """
        if from_revision == 0:
            cursor = self._head
            async with aclosing(self._present(model_id, cursor)) as present:
                async for change in present:
                    yield change
        else:
            cursor = from_revision - 1
        now = asyncio.get_running_loop().time
        caught_up, bookmark_due = False, 0.0
        while True:
            news = self._news
            if caught_up and self._head - cursor > self._queue_items_max:
                raise too_slow(f"is {self._head - cursor} changes behind", cursor)
            changes, upto = await self._behind(cursor, model_id)
            for change in changes:
                yield change
            cursor = upto
            if cursor < self._head:
                continue
            if changes and caught_up:
                bookmark_due = now() + self._bookmark_s
            # News that is not for this watcher does not put its bookmark off: it must hear that it is still served.
            if now() >= bookmark_due or not await _happens(news, bookmark_due):
                caught_up, bookmark_due = True, now() + self._bookmark_s
                yield Bookmark(revision=cursor, time=self._clock())

    async def _present(self, model_id: str | None, upto: int) -> AsyncGenerator[Change, None]:
        after = 0
        while page := await self._store.present_state(model_id, after=after, upto=upto, limit=PAGE_ITEMS):
            for change in page:
                yield change
            after = page[-1].revision

    async def _behind(self, cursor: int, model_id: str | None) -> tuple[Sequence[Change], int]:
        """Changes behind a cursor that matter to a watcher, and the revision up to which that is all."""
        if self._recent and self._recent[0].revision <= cursor + 1 <= self._head + 1:
            # From the right: most watchers lack one change of thousands, and a deque is quick at its ends only.
            unseen = (self._recent[-back] for back in range(self._head - cursor, 0, -1))
            return [change for change in unseen if model_id in (None, change.model)], self._head
        return await self._store.changes_after(cursor, model_id=model_id, limit=PAGE_ITEMS)


async def _happens(event: asyncio.Event, before: float) -> bool:
    """Whether an event happens before a time of the loop's clock."""
    try:
        async with asyncio.timeout_at(before):
            await event.wait()
    except TimeoutError:
        return False
    return True


def too_slow(why: str, revision: int) -> Overloaded:
    """Build the error that ends a slow watcher; `revision` is the last that it was given."""
    return Overloaded(
        f"the watcher {why}; watch again from {revision + 1}",
        reason="WATCHER_TOO_SLOW",
        metadata={"revision": str(revision)},
    )
