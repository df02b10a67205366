"""The RPC that watches."""

import asyncio
from contextlib import aclosing
from typing import Any

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_registry import convert, names
from mlmesh_registry.events import Bookmark, Change
from mlmesh_registry.watch import ChangeFeed, too_slow

_MESSAGES_MAX = 256


class Messages:
    """Messages of the latest changes: a thousand watchers who get one change get one message."""

    def __init__(self) -> None:
        # By identity: two readings of one change may differ in what they know of its subject.
        self._made: dict[int, tuple[Change, pb.WatchModelsResponse]] = {}

    def of(self, event: Change | Bookmark) -> pb.WatchModelsResponse:
        """The message of an event; not to be changed."""
        if isinstance(event, Bookmark):
            return convert.event(event)
        if (made := self._made.get(id(event))) is not None:
            return made[1]
        while len(self._made) >= _MESSAGES_MAX:
            del self._made[next(iter(self._made))]
        message = convert.event(event)
        # The change is kept with it, so that nothing else can have its identity.
        self._made[id(event)] = event, message
        return message


class WatchMethods:
    """Part of RegistryServicer."""

    _feed: ChangeFeed
    _messages: Messages
    _stall_s: float

    async def WatchModels(self, request: pb.WatchModelsRequest, context: Any) -> None:
        model_id = names.parse_parent(request.parent or names.ALL_MODELS)
        sent = request.from_revision - 1
        # Written, not yielded: only so is there a bound on how long a client that does not read may hold this up.
        async with aclosing(self._feed.watch(request.from_revision, model_id)) as events:
            async for event in events:
                try:
                    async with asyncio.timeout(self._stall_s):
                        await context.write(self._messages.of(event))
                except TimeoutError as error:
                    raise too_slow(f"took no event for {self._stall_s:g} s", sent) from error
                sent = event.revision
