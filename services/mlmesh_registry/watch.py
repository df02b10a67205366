"""Following the log: the present state or a replay first, then every change as it is committed.

A watcher is a cursor. Commits wake it; it then takes what it has not seen from a window of recent changes that all
watchers share, or from the database when that is further back. So memory is bounded by the window however many watch,
no watcher polls, and a gap or a repeat would need two different revisions with one number.

The window holds consecutive revisions up to the feed's head. Commits of this process enter it as they are; when others
wrote in between, `follow` reads the log.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime

from mlmesh_registry.events import Bookmark, Change
from mlmesh_registry.store import SqlModelStore
from mlmesh_runtime.errors import MeshError, Overloaded, RevisionLost

log = logging.getLogger(__name__)

PAGE_ITEMS = 500
# Watchers that read the database at once; when a thousand come back together, callers still get their turn.
BACKLOGS_MAX = 4
_RETRY_S = 0.5

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
        # Set when the log may be ahead of the head.
        self._behind_log = asyncio.Event()
        # Counts how often the log was found replaced by another one.
        self._histories = 0
        self._backlogs = asyncio.Semaphore(BACKLOGS_MAX)

    async def open(self) -> None:
        """Learn where the log stands, and take its end into the window. Call it before the first watcher."""
        self._head = max(0, await self._store.head() - min(self._queue_items_max, PAGE_ITEMS))
        await self._read_log()

    def publish(self, changes: Sequence[Change]) -> None:
        """Take in the changes of one commit of this process, on the event loop, in commit order."""
        fresh = [change for change in changes if change.revision > self._head]
        if fresh and fresh[0].revision == self._head + 1:
            self._extend(fresh)
        elif not all(_same(change, self._in_window(change.revision)) for change in changes):
            # Others wrote in between; or the number was given before, and the log is another one now.
            self._behind_log.set()

    def heard(self, revision: int) -> None:
        """Learn, on the event loop, that the log has reached a revision; 0: that it may have moved on."""
        if not 0 < revision <= self._head:
            self._behind_log.set()

    async def follow(self, *, poll_s: float | None = None) -> None:
        """Read what others wrote, for ever: when told by `heard`, and every poll_s (None: never) in case nobody does.

        A database that does not answer is asked again.
        """
        told = False
        while True:
            await _happens(self._behind_log, None if poll_s is None else asyncio.get_running_loop().time() + poll_s)
            self._behind_log.clear()
            try:
                await self._read_log()
            except Exception as error:
                # Also what is not understood, such as a change that a newer release writes: following never ends.
                if not told:
                    trace = None if isinstance(error, MeshError) else error
                    log.warning("the log of changes cannot be read; it is tried again", exc_info=trace)
                told = True
                self._behind_log.set()
                await asyncio.sleep(_RETRY_S)
            else:
                told = False

    async def _read_log(self) -> None:
        """Take in what the log has behind the head; the last change known is read again, to see that it is that log."""
        while True:
            head, known = self._head, 1 if self._recent else 0
            try:
                changes, upto = await self._store.changes_after(head - known, model_id=None, limit=PAGE_ITEMS)
            except RevisionLost:
                changes, upto = (), await self._store.head()
                self._begin_anew(upto, replaced=upto < head)
                return
            if upto < head or (known and not _same(changes[0], self._in_window(head))):
                self._begin_anew(upto, replaced=True)
                continue
            # While it was read, commits of this process may have come in.
            if fresh := [change for change in changes if change.revision > self._head]:
                self._extend(fresh)
            if upto <= self._head:
                return

    def _in_window(self, revision: int) -> Change | None:
        place = revision - self._recent[0].revision if self._recent else -1
        return self._recent[place] if 0 <= place < len(self._recent) else None

    def _extend(self, changes: Sequence[Change]) -> None:
        self._recent.extend(changes)
        self._head = changes[-1].revision
        self._wake()

    def _begin_anew(self, head: int, *, replaced: bool) -> None:
        """Go on from where the log is: too much of it was missed, or an older copy was restored in its place."""
        if replaced:
            log.warning("the log of changes is another one; its watchers are ended", extra={"revision": head})
            self._histories += 1
        self._recent.clear()
        self._head = head
        self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def watch(self, from_revision: int, model_id: str | None) -> AsyncGenerator[Event, None]:
        """Events in revision order without gap or repeat, of one model or (None) of all.

        from_revision 0 gives the present state first, another number replays from there; a bookmark ends that backlog.
        Errors: RevisionLost (REVISION_LOST), Overloaded (WATCHER_TOO_SLOW), NotReady (STORAGE_UNAVAILABLE) when it must
        read the database and cannot. It has no end of its own.
        """
        history = self._histories
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
            if history != self._histories:
                raise _lost(cursor)
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
        while True:
            page = await self._present_page(model_id, after, upto)
            for change in page:
                yield change
            if len(page) < PAGE_ITEMS:
                return
            after = page[-1].revision

    async def _present_page(self, model_id: str | None, after: int, upto: int) -> Sequence[Change]:
        async with self._backlogs:
            return await self._store.present_state(model_id, after=after, upto=upto, limit=PAGE_ITEMS)

    async def _behind(self, cursor: int, model_id: str | None) -> tuple[Sequence[Change], int]:
        """Changes behind a cursor that matter to a watcher, and the revision up to which that is all."""
        if cursor == self._head:
            return [], cursor
        if self._recent and self._recent[0].revision <= cursor + 1 <= self._head:
            # From the right: most watchers lack one change of thousands, and a deque is quick at its ends only.
            unseen = (self._recent[-back] for back in range(self._head - cursor, 0, -1))
            return [change for change in unseen if model_id in (None, change.model)], self._head
        async with self._backlogs:
            return await self._store.changes_after(cursor, model_id=model_id, limit=PAGE_ITEMS)


def _same(change: Change, other: Change | None) -> bool:
    """Whether two are one change; what a subject is made of differs between the log and who wrote it."""
    return other is not None and (change.revision, change.time, change.actor, change.model) == (
        other.revision,
        other.time,
        other.actor,
        other.model,
    )


async def _happens(event: asyncio.Event, before: float | None) -> bool:
    """Whether an event happens before a time of the loop's clock (None: it will)."""
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


def _lost(revision: int) -> RevisionLost:
    return RevisionLost(
        f"the log was replaced by another one after revision {revision} was sent; watch again from 0",
        reason="REVISION_LOST",
        metadata={"revision": str(revision)},
    )
