"""The native transport: grpc.aio's server surface over `mlmesh_front`.

The front wakes the event loop once a burst. Direct methods get their calls from the front itself; every other call gets
a task here, which runs the same wrapped handler as on grpcio.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import grpc

import mlmesh_front
from mlmesh_runtime import telemetry
from mlmesh_runtime.calls import Call
from mlmesh_runtime.direct import CREDIT
from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.limits import Limits
from mlmesh_runtime.rpcs import Gate, Meters, Trailers, deadline_missing, too_many_rpcs
from mlmesh_runtime.status import InternalError, to_status
from mlmesh_runtime.transport import INTERNAL_RPCS_MAX
from mlmesh_runtime.transport.context import NativeContext

logger = logging.getLogger(__name__)

HEADER_BYTES_MAX: Final = 32 * 1024
"""Metadata of one call."""
_OPEN, _READABLE, _WRITABLE, _CANCELLED, _LANE, _IDLE, _ORDINARY = range(7)
_OK: Final = (None, 0, grpc.StatusCode.OK)
_CODE_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}


class NativeServer:
    """A server on the event loop that starts it.

    Args:
        limits: bounds of messages, calls and connections.
        gate: who is inside already; its count and the front's direct calls share one bound.
    """

    def __init__(self, limits: Limits, gate: Gate) -> None:
        self._limits, self._gate = limits, gate
        self._front = mlmesh_front.Front(
            receive_max=limits.message_bytes_max,
            send_max=limits.message_bytes_max,
            streams_max=limits.concurrent_rpcs_max + INTERNAL_RPCS_MAX,
            header_max=HEADER_BYTES_MAX,
            keepalive_s=limits.keepalive_time_s,
            keepalive_timeout_s=limits.keepalive_timeout_s,
            ping_interval_s=limits.keepalive_time_s / 2,
            credit=CREDIT,
            calls_max=4 * (limits.concurrent_rpcs_max + INTERNAL_RPCS_MAX),
        )
        self._handlers: list[Any] = []
        self._ordinary: dict[int, Any] = {}
        self._paths: list[str] = []
        self._counted: list[Counted] = []
        self._trailers: dict[int, Callable[[], Trailers]] = {}
        self._trailers_told: dict[int, Trailers] = {}
        self._contexts: dict[int, NativeContext] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: list[Path] = []
        self._idle = asyncio.Event()
        self._hurry = asyncio.Event()
        self._ended = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None
        self._started = False

    # grpc.aio's surface.

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Serve these methods."""
        self.add_direct_method_handlers(service, handlers, {})

    def add_direct_method_handlers(
        self, service: str, handlers: Mapping[str, Any], direct: Mapping[str, tuple[Any, Any]]
    ) -> None:
        """Serve these methods; `direct`: of those with a direct method, (Method, what answers what it hands back)."""
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            method, ordinary = direct.get(name, (None, None))
            number = self._front.add_method(
                path,
                request_streaming=handler.request_streaming,
                direct=None if method is None else method.direct,
                deadline_required=method is not None and method.deadline_required,
            )
            self._handlers.append(handler)
            self._paths.append(path)
            if method is not None:
                self._ordinary[number] = ordinary
                self._counted.append(Counted(number, method.meters))
                if method.trailers is not None:
                    self._trailers[number] = method.trailers

    def add_insecure_port(self, address: str) -> int:
        """Listen on host:port or unix:path. Returns the port. Raises RuntimeError when it cannot be bound."""
        try:
            if address.startswith("unix:"):
                return self._listen_unix(Path(address.removeprefix("unix:")))
            return self._listen_tcp(address)
        except OSError as error:
            raise RuntimeError(f"cannot listen on {address}: {error.strerror}") from error

    async def start(self) -> None:
        """Begin to serve, on this event loop."""
        self._loop = asyncio.get_running_loop()
        self._front.start(
            to_status=_told,
            make_context=self._direct_context,
            broken=self._broken,
            busy=_told(too_many_rpcs(self._limits)),
            no_deadline=_told(deadline_missing()),
        )
        self._gate.direct = self._front.in_flight
        self._loop.add_reader(self._front.fileno(), self._ready)
        self._bulk = Bulk(self._front, self._counted)
        telemetry.BULK.add(self._bulk)
        self._started = True

    async def stop(self, grace: float | None) -> None:
        """Close the port, let calls end for so long, end the rest. Stopping again may shorten the time."""
        if not self._started:
            self._front.join()
            return
        if not grace:
            self._hurry.set()
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop(grace or 0.0))
        await asyncio.shield(self._stopping)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Wait until it was stopped; True when the time was over before."""
        try:
            await asyncio.wait_for(self._ended.wait(), timeout)
        except TimeoutError:
            return True
        return False

    async def _stop(self, grace_s: float) -> None:
        for path in self._sockets:
            path.unlink(missing_ok=True)
        self._front.graceful()
        if grace_s and not self._hurry.is_set():
            waiting = {asyncio.ensure_future(event.wait()) for event in (self._idle, self._hurry)}
            await asyncio.wait(waiting, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
            for waiter in waiting:
                waiter.cancel()
        self._front.kill()
        # Its thread ends the calls that are left; their tasks learn of it from what it says last.
        while self._tasks and not self._front.ended():
            await asyncio.wait(self._tasks, timeout=0.02)
        await asyncio.to_thread(self._front.wait)
        self._ready()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._loop.remove_reader(self._front.fileno())
        telemetry.BULK.remove(self._bulk)
        self._front.join()
        self._ended.set()

    # The event loop's side of the front.

    def _ready(self) -> None:
        for number, trailers in self._trailers.items():
            if (now := trailers()) is not self._trailers_told.get(number):
                self._trailers_told[number] = now
                self._front.set_trailers(number, now)
        room = self._limits.concurrent_rpcs_max - self._gate.in_flight
        events, more = self._front.pump(room, 2 if logger.isEnabledFor(logging.DEBUG) else telemetry.recording())
        for kind, key, item in events:
            if kind == _OPEN:
                self._open(key, item, self._handlers[item.method])
                continue
            if kind == _ORDINARY:
                self._open(key, item, self._ordinary[item.method])
                continue
            if kind == _IDLE:
                self._idle.set()
                continue
            context = self._contexts.get(key)
            if context is None:
                continue
            if kind == _READABLE:
                context.readable()
            elif kind == _WRITABLE:
                context.writable()
            elif kind == _LANE and context.lane is not None:
                context.lane.over()
            elif kind == _CANCELLED and context.task is not None:
                context.task.cancel()
        if more:
            self._loop.call_soon(self._ready)

    def _open(self, key: int, call: mlmesh_front.Call, handler: Any) -> None:
        context = NativeContext(call, self._limits.message_bytes_max)
        if call.gone():
            return
        self._contexts[key] = context
        context.task = task = asyncio.ensure_future(self._serve(key, context, handler))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, key: int, context: NativeContext, handler: Any) -> None:
        try:
            request = context if handler.request_streaming else context.call.request()
            answer = await _behaviour(handler)(request, context)
            answers = not handler.response_streaming and not context.done() and context.code() in _OK
            if answers and context.call.write(answer) is None:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, context.too_large(answer))
            context.end()
        except grpc.aio.AbortError:
            pass
        except asyncio.CancelledError:
            if context.call.gone():
                return
            context.set_code(grpc.StatusCode.CANCELLED)
            context.end()
            raise
        except Exception:
            # The wrapped handler turns errors into statuses; what comes here is a fault of its own.
            logger.exception("handler failed", extra={"method": self._paths[context.call.method]})
            context.set_code(grpc.StatusCode.INTERNAL)
            context.end()
        finally:
            del self._contexts[key]
            context.over()

    def _direct_context(self, call: mlmesh_front.Call) -> Call:
        context = NativeContext(call, self._limits.message_bytes_max)
        return Call(context, self._paths[call.method], self._gate.identity_source)

    def _broken(self, error: BaseException, calls: Sequence[mlmesh_front.DirectCall]) -> None:
        """A direct method raised."""
        told = InternalError.fresh()
        logger.error("rpc failed unexpectedly", exc_info=error, extra={"log_id": told.log_id})
        for call in calls:
            if not call.done():
                call.fail(told)

    # Listening.

    def _listen_tcp(self, address: str) -> int:
        host, _, wanted = address.rpartition(":")
        host, port, bound = host.removeprefix("[").removesuffix("]"), int(wanted), 0
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        failed: OSError | None = None
        for family, _kind, _proto, _name, place in found:
            try:
                listener = _listener(family, (place[0], bound or port, *place[2:]))
            except OSError as error:
                failed = error
                continue
            bound = listener.getsockname()[1]
            self._front.listen(listener.detach(), unix=False)
        if not bound:
            raise failed or OSError("no address")
        return bound

    def _listen_unix(self, path: Path) -> int:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.stat().st_mode) and not _answers(path):
                path.unlink()  # left by a process that is gone
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            listener.listen(1024)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        self._sockets.append(path)
        self._front.listen(listener.detach(), unix=True)
        return 1


def _listener(family: int, place: tuple[Any, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(place)
        listener.listen(1024)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
        return True


def _behaviour(handler: Any) -> Any:
    return handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream


def _told(error: MeshError) -> tuple[int, str, Any]:
    code, message, trailers = to_status(error)
    return code.value[0], message, trailers


class Counted:
    """A direct method's counts that were told already."""

    def __init__(self, number: int, meters: Meters) -> None:
        self.number, self.meters = number, meters
        self.started, self.received, self.sent = 0, 0, 0
        self.handled = [0] * len(_CODE_NAMES)
        self.buckets: list[int] = []
        self.seconds = 0.0


class Bulk:
    """Adds what the front counted to the metrics, when they are looked at."""

    def __init__(self, front: mlmesh_front.Front, counted: Sequence[Counted]) -> None:
        self._front, self._counted = front, counted
        self._in_flight = 0
        self._ended: dict[str, int] = {}
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            counters = self._front.counters()
            for was in self._counted:
                started, handled, buckets, seconds, received, sent = counters[was.number]
                meters = was.meters
                meters.started(started - was.started)
                meters.received(received - was.received)
                meters.sent(sent - was.sent)
                for code, count in enumerate(handled):
                    if count > was.handled[code]:
                        meters.handled(_CODE_NAMES[code], count - was.handled[code])
                before = was.buckets or [0] * len(buckets)
                meters.observe_many(
                    [new - old for new, old in zip(buckets, before, strict=True)], seconds - was.seconds
                )
                was.started, was.received, was.sent, was.seconds = started, received, sent, seconds
                was.handled, was.buckets = handled, buckets
            ended = self._front.ended_connections()
            for reason, count in ended.items():
                telemetry.CONNECTIONS_ENDED.labels(reason).inc(count - self._ended.get(reason, 0))
            self._ended = ended
            in_flight = self._front.in_flight()
            telemetry.RPC_IN_FLIGHT.inc(in_flight - self._in_flight)
            self._in_flight = in_flight
