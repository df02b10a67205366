"""Follows the registry: keeps a view of it through cuts, restarts and lost revisions."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from mlmesh_inference.desired import ModelFile, RegistryView
from mlmesh_inference.events import AliasDeleted, AliasMoved, Bookmark, Change, Event, Named, Withdrawn
from mlmesh_runtime.chunks import Chunk
from mlmesh_runtime.errors import MeshError, RevisionLost, TimedOut

_LOG = logging.getLogger(__name__)

SILENCE_S: Final = 20.0
"""The registry sends a bookmark every few seconds; this is several of them missed."""

Sleep = Callable[[float], Awaitable[None]]


class Source(Protocol):
    """Where changes and bytes come from; registry.RegistryClient is one."""

    def watch(self, from_revision: int) -> AsyncGenerator[Event]:
        """Changes from a revision, 0 for the present state first."""

    def download(self, file: ModelFile, offset: int) -> AsyncGenerator[Chunk]:
        """Bytes of a file from an offset, in order."""


@dataclass(slots=True, kw_only=True)
class Backoff:
    """Waits that double up to a bound, each shortened by chance so that many clients do not come back at once."""

    first_s: float = 0.1
    most_s: float = 5.0
    random: Callable[[], float] = random.random
    attempt: int = field(default=0)

    def next_s(self) -> float:
        """How long to wait now."""
        full = min(self.most_s, self.first_s * float(1 << min(self.attempt, 30)))
        self.attempt += 1
        return full * (0.5 + self.random() / 2)

    def reset(self) -> None:
        """It worked: begin anew."""
        self.attempt = 0


class Follower:
    """The registry's state, kept up to date.

    Args:
        source: the registry. changed: is set on every change of `view` and at the first failure.
        backoff, sleep: waits between attempts. silence_s: a watch that is silent for this long is begun anew.
    """

    def __init__(
        self,
        source: Source,
        changed: asyncio.Event,
        *,
        backoff: Backoff | None = None,
        sleep: Sleep = asyncio.sleep,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._source = source
        self._changed = changed
        self._backoff = backoff or Backoff()
        self._sleep = sleep
        self._silence_s = silence_s
        self._from = 0
        self.view: RegistryView | None = None
        """What the registry said last; None before its first word."""
        self.problem = ""
        """Why the registry does not answer now, "" when it does."""

    async def run(self) -> None:
        """Follow for ever."""
        while True:
            try:
                await self._follow()
                self.problem = "the registry ended the watch"
            except RevisionLost as error:
                self._from = 0
                self.problem = error.message
            except MeshError as error:
                self.problem = error.message
            wait_s = self._backoff.next_s()
            _LOG.warning(
                "registry watch ended",
                extra={"error": self.problem, "from_revision": self._from, "retry_in_s": round(wait_s, 3)},
            )
            self._changed.set()
            await self._sleep(wait_s)

    async def _follow(self) -> None:
        """One watch. Without a resume point the view is gathered apart and taken over at the bookmark, whole."""
        gathering = self._from == 0 or self.view is None
        view = RegistryView() if gathering or self.view is None else self.view
        async with aclosing(self._source.watch(self._from)) as events:
            while (event := await self._next(events)) is not None:
                self._backoff.reset()
                if isinstance(event, Bookmark):
                    if not gathering and event.revision < view.revision:
                        raise RevisionLost(f"the registry is at {event.revision}, behind {view.revision}")
                    view = replace(view, revision=event.revision)
                    gathering = False
                else:
                    view = _applied(view, event)
                if not gathering:
                    self._take(view)

    async def _next(self, events: AsyncGenerator[Event]) -> Event | None:
        """The next event, None at the end. An idle registry sends bookmarks, so long silence is a hung peer."""
        try:
            async with asyncio.timeout(self._silence_s):
                return await anext(events, None)
        except TimeoutError:
            raise TimedOut(f"the registry said nothing for {self._silence_s:g} s") from None

    def _take(self, view: RegistryView) -> None:
        self.problem = ""
        self._from = view.revision + 1
        before, self.view = self.view, view
        if before is None or replace(before, revision=view.revision) != view:
            self._changed.set()


def _applied(view: RegistryView, event: Change) -> RegistryView:
    if isinstance(event, AliasMoved):
        return view.with_alias(event.model, event.alias, event.version, event.revision)
    if isinstance(event, AliasDeleted):
        return view.without_alias(event.model, event.alias, event.revision)
    if isinstance(event, Withdrawn):
        return view.without_version(event.model, event.version, event.revision)
    if isinstance(event, Named):
        return view.with_model(event.model, event.revision, servable=event.servable)
    if event.record is None:
        _LOG.warning("version passed over", extra={"error": event.problem})
        return view.at(event.revision)
    return view.with_version(event.record, event.revision)
