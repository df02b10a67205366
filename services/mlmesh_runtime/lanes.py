"""The direct lane over a context that reads and writes as grpc.aio's does: one future a call, one reader a stream.

What surrounds a call (gate, metrics, span, errors) is `mlmesh_runtime.handlers`, as for every other method.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from mlmesh_runtime.calls import Call
from mlmesh_runtime.direct import CREDIT, DirectMethod, Payload
from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.rpcs import Rpc

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]

Receive = Callable[[], Awaitable[Any]]
"""The next encoded request, or grpc.aio.EOF."""


def joined(payload: tuple[Payload, ...]) -> bytes:
    """The pieces of a message as the bytes that gRPC's Python wants."""
    if len(payload) == 1 and type(payload[0]) is bytes:
        return payload[0]
    return b"".join(payload)


class _Call:
    """What a unary call and a stream's message have in common."""

    __slots__ = ("_rpc", "deadline_ns", "request")

    def __init__(self, rpc: Rpc, request: bytes) -> None:
        self._rpc = rpc
        self.request = request
        deadline = rpc.call.deadline
        self.deadline_ns = 0 if deadline is None else int(deadline * 1e9)

    def metadata(self, name: str) -> str | None:
        """See `DirectCall`."""
        return self._rpc.call.header(name)

    def context(self) -> Call:
        """See `DirectCall`."""
        return self._rpc.call

    def _late(self) -> bool:
        return self.deadline_ns != 0 and time.monotonic_ns() >= self.deadline_ns


class UnaryCall(_Call):
    """One unary call; its outcome is an encoded answer, an error, or None: the ordinary method is to answer."""

    __slots__ = ("outcome",)

    streaming = False

    def __init__(self, rpc: Rpc, request: bytes) -> None:
        super().__init__(rpc, request)
        self.outcome: asyncio.Future[bytes | MeshError | None] = asyncio.get_running_loop().create_future()

    def done(self) -> bool:
        """See `DirectCall`."""
        return self.outcome.done() or self._late()

    def reply(self, *payload: Payload) -> None:
        """See `DirectCall`."""
        if not self.outcome.done():
            self.outcome.set_result(joined(payload))

    def send(self, *payload: Payload) -> None:  # noqa: ARG002
        """Not of a unary call."""
        raise TypeError("send: a unary call has one answer; use reply")

    def finish(self) -> None:
        """Not of a unary call."""
        raise TypeError("finish: a unary call has one answer; use reply or fail")

    def fail(self, error: MeshError) -> None:
        """See `DirectCall`."""
        if not self.outcome.done():
            self.outcome.set_result(error)

    def generic(self) -> None:
        """See `DirectCall`."""
        if not self.outcome.done():
            self.outcome.set_result(None)


class StreamMessage(_Call):
    """One message of a stream, and the slot of its answers."""

    __slots__ = ("_lane", "answers", "ended", "error")

    streaming = True

    def __init__(self, rpc: Rpc, request: bytes, lane: StreamLane) -> None:
        super().__init__(rpc, request)
        self._lane = lane
        self.answers: deque[bytes] = deque()
        self.ended = False
        self.error: MeshError | None = None

    def done(self) -> bool:
        """See `DirectCall`."""
        return self.ended or self._lane.closed or self._late()

    def reply(self, *payload: Payload) -> None:
        """See `DirectCall`."""
        if not self.ended:
            self.answers.append(joined(payload))
            self.finish()

    def send(self, *payload: Payload) -> None:
        """See `DirectCall`."""
        if not self.ended:
            self.answers.append(joined(payload))
            self._lane.changed.set()

    def finish(self) -> None:
        """See `DirectCall`."""
        self.ended = True
        self._lane.changed.set()

    def fail(self, error: MeshError) -> None:
        """See `DirectCall`."""
        if not self.ended:
            self.error = error
            self.finish()

    def generic(self) -> None:
        """See `DirectCall`."""
        if not self.ended:
            self.ended = True
            self._lane.hand_over(self)


class StreamLane:
    """One stream whose messages a DirectMethod answers; slots keep the order of the answers."""

    def __init__(self, rpc: Rpc, receive: Receive, method: DirectMethod) -> None:
        self._rpc, self._receive, self._method = rpc, receive, method
        self._slots: deque[StreamMessage] = deque()
        self._room = asyncio.Semaphore(CREDIT)
        self._ending: MeshError | None = None
        self._read_all = False
        self._handed: StreamMessage | None = None
        self._reader: asyncio.Task[None] | None = None
        self._going = False
        self.closed = False
        self.changed = asyncio.Event()

    async def run(self) -> bytes | None:
        """Answer the stream to its end, or up to the message that was handed over, which it returns."""
        async with asyncio.TaskGroup() as group:
            self._reader = group.create_task(self._read())
            try:
                if self._going:
                    self._reader.cancel()
                await self._write()
            finally:
                self.closed = self._handed is None
                self._reader.cancel()
        return None if self._handed is None else self._handed.request

    def end(self, error: MeshError) -> None:
        """Read no more; answer what was read, then end with this error."""
        if self._ending is None and not self._read_all:
            self._ending, self._going = error, True
            if self._reader is not None:
                self._reader.cancel()
            self.changed.set()

    def moved(self) -> None:
        """The stream's reader says."""

    def hand_over(self, message: StreamMessage) -> None:
        """From this message on the ordinary method answers."""
        self._handed = message
        self.changed.set()

    async def _read(self) -> None:
        method = self._method
        try:
            while self._handed is None:
                await self._room.acquire()
                raw = await self._receive()
                if raw is _EOF:
                    break
                message = StreamMessage(self._rpc, raw, self)
                self._slots.append(message)
                method((message,))
        except MeshError as error:
            self._ending = self._ending or error
        self._read_all = True
        self.changed.set()

    async def _write(self) -> None:
        slots, changed, write = self._slots, self.changed, self._rpc.call.context.write
        sent = self._rpc.method.meters.sent
        while True:
            changed.clear()
            while slots:
                first = slots[0]
                if first is self._handed:
                    return
                while first.answers:
                    await write(first.answers.popleft())
                    sent()
                    self._rpc.touched = time.monotonic()
                if not first.ended:
                    break
                if first.error is not None:
                    raise first.error
                slots.popleft()
                self._room.release()
            if not slots and self._ending is not None:
                raise self._ending
            if not slots and self._read_all:
                return
            await changed.wait()
