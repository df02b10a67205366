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
import dataclasses
import functools
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from mlmesh_runtime import telemetry
from mlmesh_runtime.calls import CURRENT
from mlmesh_runtime.direct import DirectMethod
from mlmesh_runtime.errors import MeshError, Unsupported
from mlmesh_runtime.lanes import StreamLane, UnaryCall
from mlmesh_runtime.rpcs import Gate, Method, Rpc, deadline_missing
from mlmesh_runtime.status import InternalError, single_cause, to_status
from mlmesh_runtime.streams import HandedOver, IdleWatch, Requests, StreamContext, decode, linger, pump, receive

logger = logging.getLogger(__name__)


class Wrapper:
    """Makes gRPC handlers out of a servicer's methods."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def wrap(self, method: Method, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        """The same method with everything around it. Codecs are ours, so that their errors are too."""
        if handler.request_streaming and handler.response_streaming:
            if method.direct is not None:
                return grpc.stream_stream_rpc_method_handler(
                    self._direct_stream(method, handler.stream_stream, method.direct)
                )
            return grpc.stream_stream_rpc_method_handler(self._streaming(method, handler.stream_stream, requests=True))
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._streaming(method, handler.unary_stream, requests=False))
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._stream_unary(method, handler.stream_unary))
        if method.direct is not None:
            return grpc.unary_unary_rpc_method_handler(self._direct_unary(method, handler.unary_unary, method.direct))
        return grpc.unary_unary_rpc_method_handler(self._unary_unary(method, handler.unary_unary))

    def ordinary(self, method: Method, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        """The servicer's method itself, for what its direct method hands back."""
        return self.wrap(dataclasses.replace(method, direct=None), handler)

    def _unary_unary(self, method: Method, behaviour: Callable[[Any, Any], Any]) -> Any:
        async def unary_unary(raw: bytes, context: Any) -> bytes:
            rpc = self._open(method, context)
            try:
                self._admit(rpc)
                return await _answered(method, behaviour, raw, context)
            except BaseException as error:
                await self._fail(rpc, error)
                raise
            finally:
                self._close(rpc)

        return unary_unary

    def _direct_unary(self, method: Method, behaviour: Callable[[Any, Any], Any], direct: DirectMethod) -> Any:
        async def direct_unary(raw: bytes, context: Any) -> bytes:
            rpc = self._open(method, context)
            try:
                self._admit(rpc)
                call = UnaryCall(rpc, raw)
                direct((call,))
                answer = await call.outcome
                if isinstance(answer, MeshError):
                    try:
                        raise answer
                    finally:
                        # Its traceback holds this frame, which would hold it, and the request, till collected.
                        del answer, call
                if answer is not None:
                    return answer
                return await _answered(method, behaviour, raw, context)
            except BaseException as error:
                await self._fail(rpc, error)
                raise
            finally:
                self._close(rpc)

        return direct_unary

    def _direct_stream(self, method: Method, behaviour: Callable[[Any, Any], Any], direct: DirectMethod) -> Any:
        async def direct_stream(_requests: Any, context: Any) -> None:
            rpc = self._open(method, context)
            try:
                self._admit(rpc)
                with self._idle_bound(rpc):
                    await self._lane(rpc, behaviour, direct)
                await linger(rpc)
            except BaseException as error:
                await self._fail(rpc, error, after=linger)
                raise
            finally:
                self._close(rpc)

        return direct_stream

    async def _lane(self, rpc: Rpc, behaviour: Callable[[Any, Any], Any], direct: DirectMethod) -> None:
        if self._gate.draining:
            raise rpc.method.going_away()
        read = rpc.call.context.read
        native = getattr(rpc.call.context, "direct_lane", None)
        if native is not None:
            rpc.lane = native(rpc, direct)
        else:
            rpc.lane = StreamLane(rpc, functools.partial(receive, rpc, read), direct)
        self._gate.lanes.add(rpc)
        try:
            first = await rpc.lane.run()
        finally:
            self._gate.lanes.discard(rpc)
            rpc.lane = None
        if first is not None:
            handed = HandedOver(rpc, first, read)
            del first  # the stream may last
            await pump(rpc, behaviour(handed, StreamContext(rpc, handed)))

    def _stream_unary(self, method: Method, behaviour: Callable[[Any, Any], Any]) -> Any:
        async def stream_unary(requests: AsyncIterator[bytes], context: Any) -> bytes:
            rpc = self._open(method, context)
            try:
                self._admit(rpc)
                with self._idle_bound(rpc):
                    response = behaviour(Requests(rpc, requests), StreamContext(rpc))
                    if inspect.isawaitable(response):
                        response = await response
                await linger(rpc)
                return method.encode(response) if context.code() in _OK else b""
            except BaseException as error:
                await self._fail(rpc, error, after=linger)
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
                        await pump(rpc, behaviour(Requests(rpc, request), StreamContext(rpc)))
                    await linger(rpc)
                else:
                    await pump(rpc, behaviour(decode(method, request), StreamContext(rpc)))
            except BaseException as error:
                await self._fail(rpc, error, after=linger if requests else None)
                raise
            finally:
                self._close(rpc)

        return streaming

    def _open(self, method: Method, context: Any) -> Rpc:
        rpc = Rpc(method, context, self._gate.identity_source)
        CURRENT.set(rpc.call)
        method.meters.started()
        if method.trailers is not None:
            context.set_trailing_metadata(method.trailers())
        if telemetry.tracing() and not method.internal:
            rpc.span = telemetry.ServerSpan.begin(rpc.call, method.service, method.name)
        return rpc

    def _admit(self, rpc: Rpc) -> None:
        method = rpc.method
        if method.internal:
            return
        if method.deadline_required and rpc.call.deadline is None:
            raise deadline_missing()
        if method.endless or method.streams:
            rpc.task = asyncio.current_task()
        self._gate.admit(rpc)

    def _idle_bound(self, rpc: Rpc) -> contextlib.AbstractContextManager[None]:
        idle_s = self._gate.limits.stream_idle_s
        if not idle_s or rpc.method.internal:
            return contextlib.nullcontext()
        return IdleWatch(rpc, idle_s)

    async def _fail(
        self, rpc: Rpc, error: BaseException, *, after: Callable[[Rpc], Awaitable[None]] | None = None
    ) -> None:
        """Turn an exception into a status, sent after `after`. Returns where the exception itself should pass on."""
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
        if rpc.method.trailers is not None:
            trailers = (*trailers, *rpc.method.trailers())
        rpc.code = code.name
        if after is not None:
            await after(rpc)
        await context.abort(code, message, trailers)

    def _close(self, rpc: Rpc) -> None:
        method, call = rpc.method, rpc.call
        if rpc.code == "OK" and (set_by_handler := call.context.code()) is not None:
            rpc.code = _name(set_by_handler)
        self._gate.leave(rpc)
        seconds = time.monotonic() - call.started
        method.meters.handled(rpc.code)
        method.meters.seconds(seconds, None if rpc.span is None else rpc.span.exemplar())
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


async def _answered(method: Method, behaviour: Callable[[Any, Any], Any], raw: bytes, context: Any) -> bytes:
    """What the servicer's own method answers to a unary request, encoded; nothing beside a status that it set."""
    response = behaviour(decode(method, raw), context)
    if inspect.isawaitable(response):
        response = await response
    return method.encode(response) if context.code() in _OK else b""


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
