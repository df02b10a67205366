"""What happens around every RPC: one wrapper a method, made once when the server is built.

gRPC's own server interceptors run, and look the method up, on every call; these wrappers resolve metrics, codecs, rules
and limits when the method is registered. In order: deadline, identity, limits, decoding, rules, the servicer's method,
encoding, errors to statuses, metrics, span.

A servicer's method is `async def` (unary response) or an async generator (stream response); an `async def` that uses
`context.write` works too.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from mlmesh_runtime import telemetry
from mlmesh_runtime.calls import CURRENT, Call
from mlmesh_runtime.errors import InvalidInput, MeshError, NotReady, Overloaded, TimedOut, Unsupported
from mlmesh_runtime.identity import identity_of
from mlmesh_runtime.limits import Limits
from mlmesh_runtime.status import InternalError, single_cause, to_status

logger = logging.getLogger(__name__)

Check = Callable[[Any], None]


class Gate:
    """What the methods of one server share: the bounds, who is inside, and whether the server is going away."""

    def __init__(self, limits: Limits, identity_source: str) -> None:
        self.limits = limits
        self.identity_source = identity_source
        self.in_flight = 0
        self.streams: Counter[str] = Counter()
        self.endless: set[Rpc] = set()
        self.draining = False

    def admit(self, rpc: Rpc) -> None:
        """Count an RPC in. Raises Overloaded where a bound is reached, Unauthenticated for an ambiguous identity."""
        limits = self.limits
        if self.in_flight >= limits.concurrent_rpcs_max:
            raise Overloaded(
                f"the server handles {limits.concurrent_rpcs_max} calls already",
                reason="TOO_MANY_RPCS",
                retry_after_s=limits.retry_after_s,
            )
        if self.identity_source == "tls" or rpc.method.streams:
            identity = identity_of(rpc.call)
            if rpc.method.streams:
                peer = identity or rpc.call.context.peer().rpartition(":")[0]
                if self.streams[peer] >= limits.streams_per_peer_max:
                    raise Overloaded(
                        f"this peer has {limits.streams_per_peer_max} streams open already",
                        reason="TOO_MANY_STREAMS",
                        retry_after_s=limits.retry_after_s,
                    )
                self.streams[peer] += 1
                rpc.peer = peer
        self.in_flight += 1
        rpc.admitted = True
        telemetry.RPC_IN_FLIGHT.inc()
        if rpc.method.endless:
            if self.draining:
                raise going_away()
            self.endless.add(rpc)

    def leave(self, rpc: Rpc) -> None:
        """Count an RPC out."""
        if rpc.peer is not None:
            self.streams[rpc.peer] -= 1
            if not self.streams[rpc.peer]:
                del self.streams[rpc.peer]
        if rpc.admitted:
            self.in_flight -= 1
            telemetry.RPC_IN_FLIGHT.dec()
            self.endless.discard(rpc)

    def end_endless(self) -> None:
        """End the RPCs that have no end of their own (watches): UNAVAILABLE, so that their clients go elsewhere."""
        self.draining = True
        for rpc in list(self.endless):
            rpc.end(going_away())


def going_away() -> NotReady:
    """What a caller is told when the server ends its stream."""
    return NotReady("the server is going away; call again", reason="DRAINING")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One RPC method and what was resolved for it.

    Attributes:
        path: "/package.Service/Method".
        streams: whether requests or responses stream.
        deadline_required: a call without a deadline is refused.
        endless: a watch: it has no deadline, and is ended when the server drains.
        internal: health and reflection: outside of limits and traces, so that they answer on a full server.
        check: rules for requests, or None.
    """

    service: str
    name: str
    path: str
    streams: bool
    deadline_required: bool
    endless: bool
    internal: bool
    check: Check | None
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    meters: Meters


class Meters:
    """A method's metric children; asking prometheus for them on every call costs more than the call's other work."""

    def __init__(self, kind: str, service: str, name: str) -> None:
        labels = (kind, service, name)
        self._labels = labels
        self._handled: dict[str, Callable[[], None]] = {}
        self.started = telemetry.RPC_STARTED.labels(*labels).inc
        self.seconds = telemetry.RPC_SECONDS.labels(*labels).observe
        self.received = telemetry.MESSAGES_RECEIVED.labels(*labels).inc
        self.sent = telemetry.MESSAGES_SENT.labels(*labels).inc

    def handled(self, code: str) -> None:
        inc = self._handled.get(code)
        if inc is None:
            inc = self._handled[code] = telemetry.RPC_HANDLED.labels(*self._labels, code).inc
        inc()


class Rpc:
    """One RPC in flight."""

    __slots__ = ("admitted", "call", "code", "ended", "method", "peer", "reader", "span", "task", "touched")

    def __init__(self, method: Method, context: Any, identity_source: str) -> None:
        self.call = Call(context, method.path, identity_source)
        self.method = method
        self.code = "OK"
        self.admitted = False
        self.peer: str | None = None
        self.ended: MeshError | None = None
        self.reader: asyncio.Task[Any] | None = None
        self.touched = self.call.started
        self.task: asyncio.Task[Any] | None = None
        self.span: telemetry.ServerSpan | None = None

    def end(self, error: MeshError) -> None:
        """Make the servicer's method end, and tell `error` to the client."""
        if self.ended is None and self.task is not None:
            self.ended = error
            self.task.cancel()


class Wrapper:
    """Makes gRPC handlers out of a servicer's methods."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def wrap(self, method: Method, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        """The same method with everything around it. Codecs are ours, so that their errors are too."""
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._streaming(method, handler.stream_stream, requests=True))
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._streaming(method, handler.unary_stream, requests=False))
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._stream_unary(method, handler.stream_unary))
        return grpc.unary_unary_rpc_method_handler(self._unary_unary(method, handler.unary_unary))

    def _unary_unary(self, method: Method, behaviour: Callable[[Any, Any], Any]) -> Any:
        async def unary_unary(raw: bytes, context: Any) -> bytes:
            rpc = self._open(method, context)
            try:
                self._admit(rpc)
                response = behaviour(_decode(method, raw), context)
                if inspect.isawaitable(response):
                    response = await response
                return method.encode(response) if context.code() in _OK else b""
            except BaseException as error:
                await self._fail(rpc, error)
                raise
            finally:
                self._close(rpc)

        return unary_unary

    def _stream_unary(self, method: Method, behaviour: Callable[[Any, Any], Any]) -> Any:
        async def stream_unary(requests: AsyncIterator[bytes], context: Any) -> bytes:
            rpc = self._open(method, context)
            try:
                self._admit(rpc)
                with self._idle_bound(rpc):
                    response = behaviour(Requests(rpc, requests), StreamContext(rpc))
                    if inspect.isawaitable(response):
                        response = await response
                return method.encode(response) if context.code() in _OK else b""
            except BaseException as error:
                await self._fail(rpc, error)
                raise
            finally:
                self._close(rpc)

        return stream_unary

    def _streaming(self, method: Method, behaviour: Callable[[Any, Any], Any], *, requests: bool) -> Any:
        # A coroutine that writes, not an async generator: a cancelled generator is cleaned up when it is collected, a
        # cancelled coroutine at once.
        async def streaming(request: Any, context: Any) -> None:
            rpc = self._open(method, context)
            try:
                self._admit(rpc)
                if requests:
                    with self._idle_bound(rpc):
                        await _pump(rpc, behaviour(Requests(rpc, request), StreamContext(rpc)))
                else:
                    await _pump(rpc, behaviour(_decode(method, request), StreamContext(rpc)))
            except BaseException as error:
                await self._fail(rpc, error)
                raise
            finally:
                self._close(rpc)

        return streaming

    def _open(self, method: Method, context: Any) -> Rpc:
        rpc = Rpc(method, context, self._gate.identity_source)
        CURRENT.set(rpc.call)
        method.meters.started()
        if telemetry.tracing() and not method.internal:
            rpc.span = telemetry.ServerSpan.begin(rpc.call, method.service, method.name)
        return rpc

    def _admit(self, rpc: Rpc) -> None:
        method = rpc.method
        if method.internal:
            return
        if method.deadline_required and rpc.call.deadline is None:
            raise InvalidInput(
                "a deadline is required: set a timeout on the call (grpcurl: -max-time)", reason="DEADLINE_REQUIRED"
            )
        if method.endless or method.streams:
            rpc.task = asyncio.current_task()
        self._gate.admit(rpc)

    def _idle_bound(self, rpc: Rpc) -> contextlib.AbstractContextManager[None]:
        idle_s = self._gate.limits.stream_idle_s
        if not idle_s or rpc.method.internal:
            return contextlib.nullcontext()
        return _IdleWatch(rpc, idle_s)

    async def _fail(self, rpc: Rpc, error: BaseException) -> None:
        """Turn an exception into a status. Returns where the exception itself should pass on."""
        context = rpc.call.context
        error = single_cause(error)
        if isinstance(error, grpc.aio.AbortError):
            rpc.code = _name(context.code())
            raise error
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if rpc.ended is not None and task is not None and task.cancelling():
                task.uncancel()
                error = rpc.ended
            elif task is not None and task.cancelling():
                late = rpc.call.deadline is not None and time.monotonic() >= rpc.call.deadline
                rpc.code = "DEADLINE_EXCEEDED" if late else "CANCELLED"
                return
            # Else nobody cancelled this call: something inside of it leaked a cancellation. gRPC would then send
            # nothing at all, and the client would wait for its deadline.
        elif not isinstance(error, Exception):
            rpc.code = "INTERNAL"
            return
        if context.cancelled():
            rpc.code = "CANCELLED"
            return
        told = _told(rpc, error)
        code, message, trailers = to_status(told)
        rpc.code = code.name
        await context.abort(code, message, trailers)

    def _close(self, rpc: Rpc) -> None:
        method, call = rpc.method, rpc.call
        if rpc.code == "OK" and (set_by_handler := call.context.code()) is not None:
            rpc.code = _name(set_by_handler)
        self._gate.leave(rpc)
        seconds = time.monotonic() - call.started
        method.meters.handled(rpc.code)
        method.meters.seconds(seconds)
        if rpc.span is not None:
            rpc.span.end(rpc.code)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "rpc",
                extra={
                    "method": method.path,
                    "code": rpc.code,
                    "seconds": round(seconds, 6),
                    "peer": call.context.peer(),
                    "identity": call.identity or "",
                },
            )


_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_OK = (None, 0, grpc.StatusCode.OK)
_CODE_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


def _name(code: Any) -> str:
    if code is None:
        return "OK"
    return code.name if isinstance(code, grpc.StatusCode) else _CODE_NAMES.get(code, "UNKNOWN")


def _told(rpc: Rpc, error: BaseException) -> MeshError:
    if isinstance(error, MeshError) and type(error) is not MeshError:
        return error
    if isinstance(error, NotImplementedError) and rpc.call.context.code() is grpc.StatusCode.UNIMPLEMENTED:
        return Unsupported(f"{rpc.method.name} is not implemented here", reason="METHOD_NOT_IMPLEMENTED")
    told = InternalError.fresh()
    logger.error(
        "rpc failed unexpectedly",
        exc_info=error,
        extra={"log_id": told.log_id, "method": rpc.method.path, "peer": rpc.call.context.peer()},
    )
    return told


def _decode(method: Method, raw: bytes) -> Any:
    try:
        message = method.decode(raw)
    except Exception as error:
        # The decoder's own text may quote what was sent.
        raise InvalidInput(
            f"the request of {method.name} is not a valid message ({len(raw)} bytes)", reason="MALFORMED_MESSAGE"
        ) from error
    if method.check is not None:
        method.check(message)
    return message


async def _pump(rpc: Rpc, result: Any) -> None:
    """Send what a servicer's method yields; or let it write by itself."""
    if not hasattr(result, "__aiter__"):
        if inspect.isawaitable(result):
            await result
        return
    write, encode, sent = rpc.call.context.write, rpc.method.encode, rpc.method.meters.sent
    try:
        async for message in result:
            await write(encode(message))
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


async def _receive(rpc: Rpc, read: Callable[[], Awaitable[Any]]) -> Any:
    rpc.reader = asyncio.current_task()
    try:
        raw = await read()
    except asyncio.CancelledError:
        reader = rpc.reader
        if rpc.ended is not None and reader is not None and reader.cancelling():
            reader.uncancel()
            raise rpc.ended from None
        raise
    finally:
        rpc.reader = None
    if raw is _EOF:
        return raw
    rpc.touched = time.monotonic()
    rpc.method.meters.received()
    return _decode(rpc.method, raw)


class StreamContext:
    """gRPC's context, with `read` and `write` that decode and encode; the rest is gRPC's own."""

    __slots__ = ("_context", "_rpc")

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._context = rpc.call.context

    async def read(self) -> Any:
        """The next request, or grpc.aio.EOF."""
        return await _receive(self._rpc, self._context.read)

    async def write(self, message: Any) -> None:
        """Send one response; waits while the reader is behind."""
        await self._context.write(self._rpc.method.encode(message))
        self._rpc.method.meters.sent()
        self._rpc.touched = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


class _IdleWatch:
    """Ends the stream when its handler waits for a request and nothing moved for `idle_s`.

    One timer a stream looks now and then; nothing is armed and disarmed for every message.
    """

    def __init__(self, rpc: Rpc, idle_s: float) -> None:
        self._rpc, self._idle_s = rpc, idle_s
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        self._timer = self._loop.call_later(self._idle_s, self._look)

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        rpc, quiet_s = self._rpc, time.monotonic() - self._rpc.touched
        if rpc.reader is not None and quiet_s >= self._idle_s:
            if rpc.ended is None:
                rpc.ended = TimedOut(f"nothing moved on the stream for {self._idle_s:g} s", reason="STREAM_IDLE")
                rpc.reader.cancel()
            return
        # While the handler is busy elsewhere the silence is its own.
        left_s = self._idle_s - quiet_s if rpc.reader is not None else self._idle_s
        self._timer = self._loop.call_later(left_s, self._look)
