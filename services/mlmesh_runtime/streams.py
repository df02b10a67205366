"""Messages on their way in and out: decoded and checked, encoded and counted, and bounded in idleness."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc

from mlmesh_runtime.errors import InvalidInput, MeshError, TimedOut
from mlmesh_runtime.rpcs import Method, Rpc

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
CANCELLED_S: Final = 1.0
"""How long a cancellation is waited for after a write that failed; it comes at once."""
LINGER_S: Final = 0.02
"""How long the end of a stream waits for the next words of a caller that has not ended its side."""
LINGER_MAX_S: Final = 0.25
"""The same for a caller that goes on sending."""


def decode(method: Method, raw: bytes) -> Any:
    try:
        message = method.decode(raw)
    except MeshError:
        raise
    except Exception as error:
        # The decoder's own text may quote what was sent.
        raise InvalidInput(
            f"the request of {method.name} is not a valid message ({len(raw)} bytes)", reason="MALFORMED_MESSAGE"
        ) from error
    if method.check is not None:
        method.check(message)
    return message


async def pump(rpc: Rpc, result: Any) -> None:
    """Send what a servicer's method yields; or let it write by itself."""
    if not hasattr(result, "__aiter__"):
        if inspect.isawaitable(result):
            await result
        return
    write, encode, sent = rpc.call.context.write, rpc.method.encode, rpc.method.meters.sent
    try:
        async for message in result:
            try:
                await write(encode(message))
            except grpc.aio.InternalError:
                # The caller is gone. The cancellation is on its way, and would cut off what the servicer does in its
                # own `finally` if that had begun.
                await asyncio.sleep(CANCELLED_S)
                raise
            sent()
            rpc.touched = time.monotonic()
    finally:
        if (aclose := getattr(result, "aclose", None)) is not None:
            await aclose()


class Requests:
    """The request stream as a servicer sees it: decoded, checked, counted, bounded in idleness."""

    __slots__ = ("_next", "_raw", "_rpc")

    def __init__(self, rpc: Rpc, raw: AsyncIterator[bytes]) -> None:
        self._rpc, self._raw = rpc, raw
        self._next: Callable[[], Awaitable[bytes]] | None = None

    def __aiter__(self) -> Requests:
        return self

    async def __anext__(self) -> Any:
        if self._next is None:  # gRPC's generator complains when it is made and never run
            self._next = self._raw.__aiter__().__anext__
        return await _receive(self._rpc, self._next)


async def receive(rpc: Rpc, read: Callable[[], Awaitable[Any]]) -> Any:
    """The next encoded request or gRPC's EOF: counted, and bounded in idleness."""
    rpc.reader = asyncio.current_task()
    try:
        raw = await read()
    except StopAsyncIteration:
        rpc.heard = True
        raise
    except asyncio.CancelledError:
        rpc.heard = None
        reader = rpc.reader
        if rpc.ended is not None and reader is not None and reader.cancelling():
            reader.uncancel()
            raise rpc.ended from None
        raise
    finally:
        rpc.reader = None
    if raw is _EOF:
        rpc.heard = True
    else:
        rpc.touched = time.monotonic()
        rpc.method.meters.received()
    return raw


async def linger(rpc: Rpc) -> None:
    """Let the end of a stream wait while its caller still sends, and drop what comes.

    grpc.aio's client tells of its own write that failed, and not of the status, when the end comes in the middle of
    one (github.com/grpc/grpc/issues/36066). The native transport waits by itself.
    """
    context = rpc.call.context
    if rpc.heard or context.done() or getattr(context, "lingers", False):
        return
    if rpc.heard is None:
        await asyncio.sleep(LINGER_S)
        return
    clock = asyncio.get_running_loop().time
    end_s = clock() + LINGER_MAX_S
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S) as bound:
            while await context.read() is not _EOF:
                bound.reschedule(min(clock() + LINGER_S, end_s))


async def _receive(rpc: Rpc, read: Callable[[], Awaitable[Any]]) -> Any:
    raw = await receive(rpc, read)
    return raw if raw is _EOF else decode(rpc.method, raw)


class HandedOver:
    """The requests of a stream from one that was read already on."""

    __slots__ = ("_first", "_read", "_rpc")

    def __init__(self, rpc: Rpc, first: bytes, read: Callable[[], Awaitable[Any]]) -> None:
        self._rpc, self._read = rpc, read
        self._first: bytes | None = first

    def __aiter__(self) -> HandedOver:
        return self

    async def __anext__(self) -> Any:
        if (message := await self.read()) is _EOF:
            raise StopAsyncIteration
        return message

    async def read(self) -> Any:
        """The next request, or grpc.aio.EOF."""
        if self._first is None:
            return await _receive(self._rpc, self._read)
        first, self._first = self._first, None
        return decode(self._rpc.method, first)


class StreamContext:
    """gRPC's context, with `read` and `write` that decode and encode; the rest is gRPC's own."""

    __slots__ = ("_context", "_handed", "_rpc")

    def __init__(self, rpc: Rpc, handed: HandedOver | None = None) -> None:
        self._rpc = rpc
        self._context = rpc.call.context
        self._handed = handed

    async def read(self) -> Any:
        """The next request, or grpc.aio.EOF."""
        if self._handed is not None:
            return await self._handed.read()
        return await _receive(self._rpc, self._context.read)

    async def write(self, message: Any) -> None:
        """Send one response; waits while the reader is behind."""
        await self._context.write(self._rpc.method.encode(message))
        self._rpc.method.meters.sent()
        self._rpc.touched = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class IdleWatch:
    """Ends the stream when its handler waits for a request and nothing moved for `idle_s`.

    One timer a stream looks now and then; nothing is armed and disarmed for every message.
    """

    def __init__(self, rpc: Rpc, idle_s: float) -> None:
        self._rpc, self._idle_s = rpc, idle_s
        self._loop = asyncio.get_running_loop()
        self._moved: int | None = None

    def __enter__(self) -> None:
        self._timer = self._loop.call_later(self._idle_s, self._look)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        rpc = self._rpc
        if rpc.lane is not None and (moved := rpc.lane.moved()) is not None:
            if moved != self._moved:
                self._moved = moved
                rpc.touched = time.monotonic()
            elif time.monotonic() - rpc.touched >= self._idle_s:
                rpc.lane.end(self._error())
                return
            self._timer = self._loop.call_later(self._idle_s / 4, self._look)
            return
        quiet_s = time.monotonic() - rpc.touched
        if rpc.reader is not None and quiet_s >= self._idle_s:
            if rpc.ended is None:
                rpc.ended = self._error()
                rpc.reader.cancel()
            return
        # While the handler is busy elsewhere the silence is its own.
        left_s = self._idle_s - quiet_s if rpc.reader is not None else self._idle_s
        self._timer = self._loop.call_later(left_s, self._look)

    def _error(self) -> TimedOut:
        return TimedOut(f"nothing moved on the stream for {self._idle_s:g} s", reason="STREAM_IDLE")
