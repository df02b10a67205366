"""A stream over grpc.aio: one task that connects, and on each connection one that sends and one that receives."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from mlmesh_client.calling import (
    ANNOUNCED,
    FOREVER_S,
    LEAVE_S,
    RESULTS_MAX,
    Reconnecting,
    StreamOptions,
    stalled,
)
from mlmesh_client.errors import InferenceError, TimedOut, from_call
from mlmesh_client.messages import EndOfStream, Inputs, Model, Parameter, Result, SequencePlace, request_of
from mlmesh_client.rows import each
from mlmesh_client.session import Session
from open_inference import grpc_service_pb2 as pb


class AioStream:
    """Requests and their results over one stream, which outlives connections and servers.

    Made by `AioClient.stream`; use it in `async with`. At most `in_flight` requests are without a result that was
    taken: `send` then waits, so take results in another task, or use `map`.

    Attributes:
        connections: how often it connected.
    """

    def __init__(
        self,
        *,
        connect: Callable[..., Any],
        describe: Callable[[], Awaitable[Model]],
        version: str,
        options: StreamOptions,
        reconnecting: Reconnecting,
        name: str,
    ) -> None:
        self._connect, self._describe, self._options = connect, describe, options
        self._reconnecting = reconnecting
        self._name, self._version = name, version
        self._model: Model | None = None
        self._session = Session()
        self._room = asyncio.Semaphore(options.in_flight)
        self._results: deque[Result] = deque()
        self._changed = asyncio.Event()
        """Something is to be sent, or the stream is to end."""
        self._arrived = asyncio.Event()
        self._taken = asyncio.Event()
        self._sending_done = self._closed = False
        self._error: InferenceError | None = None
        self._task: asyncio.Task[None] | None = None
        self.connections = 0

    @property
    def model(self) -> Model:
        """What it streams to; known inside of `async with`."""
        if self._model is None:
            raise RuntimeError("use the stream in `async with`")
        return self._model

    @property
    def moves(self) -> int:
        """How often the server asked it to move."""
        return self._session.moves

    @property
    def resent(self) -> int:
        """Requests that were sent again on another connection."""
        return self._session.resent

    @property
    def waiting(self) -> int:
        """Requests without a last answer."""
        return len(self._session)

    async def __aenter__(self) -> Self:
        self._model = await self._describe()
        self._session = Session(ordered=not self._model.decoupled, retry=self._reconnecting.again_s)
        self._task = asyncio.ensure_future(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End it now. What has no answer is given up."""
        self._closed = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error

    async def send(
        self,
        inputs: Inputs,
        *,
        id: str = "",  # noqa: A002  the protocol's word
        outputs: Sequence[str] | None = None,
        parameters: Mapping[str, Parameter] | None = None,
        priority: int = 0,
        sequence: SequencePlace | None = None,
        timeout: float | None = None,
    ) -> None:
        """Send a request; its result comes by `receive`.

        Waits for room. Raises InvalidInput for what the model does not take, TimedOut when there is no room for
        `timeout` seconds (default: the client's), and the error of a stream that has failed.
        """
        self._check()
        request = self.make(inputs, wanted=outputs, parameters=parameters, priority=priority, sequence=sequence)
        await self.send_message(request, id=id, sequence=sequence, timeout=timeout)

    def make(self, inputs: Inputs, **fields: Any) -> pb.ModelInferRequest:
        """A request for `send_message`; `fields` are those of messages.request_of. Raises InvalidInput."""
        return request_of(self.model, inputs, version=self._version, **fields)

    async def send_message(
        self,
        request: pb.ModelInferRequest,
        *,
        id: str = "",  # noqa: A002
        sequence: SequencePlace | None = None,
        timeout: float | None = None,
    ) -> None:
        """Like `send`, of a message that is made already. It becomes the stream's: its id is overwritten."""
        self._check()
        if self._room.locked():
            seconds = self._options.timeout_s if timeout is None else timeout
            try:
                async with asyncio.timeout(seconds):
                    await self._room.acquire()
            except TimeoutError:
                raise TimedOut(
                    f"{self._options.in_flight} requests have no result that was taken, for {seconds:g} s: receive "
                    "results in another task",
                    code="DEADLINE_EXCEEDED",
                ) from None
            try:
                self._check()
            except BaseException:
                self._room.release()
                raise
        else:
            await self._room.acquire()
        self._put(self._session.add(request, name=id, sequence=sequence))
        self._changed.set()

    def done_sending(self) -> None:
        """There are no more requests: results end after the last one."""
        self._sending_done = True
        self._changed.set()
        self._arrived.set()

    async def receive(self, *, timeout: float | None = None) -> Result:
        """The next result. A request that failed gives a result with `error`.

        Raises EndOfStream when all requests have results and `done_sending` was called, TimedOut when none comes for
        `timeout` seconds (default: for ever; servers that hang are left), and the error of a stream that has failed.
        """
        if not self._results:
            try:
                async with asyncio.timeout(timeout):
                    await self._arrival()
            except TimeoutError:
                raise TimedOut(f"no result for {timeout:g} s", code="DEADLINE_EXCEEDED") from None
        result = self._results.popleft()
        self._taken.set()
        if result.final:
            self._room.release()
        return result

    async def _arrival(self) -> None:
        while not self._results:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise EndOfStream
            if self._sending_done and not len(self._session):
                raise EndOfStream
            self._arrived.clear()
            await self._arrived.wait()

    def __aiter__(self) -> AsyncIterator[Result]:
        return self._all()

    async def _all(self) -> AsyncIterator[Result]:
        while True:
            try:
                yield await self.receive()
            except EndOfStream:
                return

    async def map(self, inputs: Iterable[Inputs] | AsyncIterable[Inputs]) -> AsyncIterator[Result]:
        """The results of many requests, which are sent while results come. Ends the sending."""
        feeding = asyncio.ensure_future(self._feed(inputs))
        try:
            async for result in self._all():
                yield result
            await feeding
        finally:
            await ended(feeding)

    async def _feed(self, inputs: Iterable[Inputs] | AsyncIterable[Inputs]) -> None:
        try:
            async for one in each(inputs):
                await self.send(one, timeout=FOREVER_S)
        finally:
            self.done_sending()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._sending_done or self._closed:
            raise RuntimeError("the stream takes no more requests")
        if self._task is None:
            raise RuntimeError("use the stream in `async with`")

    def _put(self, results: Sequence[Result]) -> None:
        if results:
            self._results.extend(results)
            self._arrived.set()

    async def _run(self) -> None:
        try:
            while await self._something_to_send():
                error = await self._one_connection()
                moved = self._session.leaving
                self._put(self._session.broke())
                if self._finished():
                    break
                wait_s = self._reconnecting.wait_s(error, moved=moved)
                if wait_s is None:
                    raise error or InferenceError("the server ended the stream", code="UNAVAILABLE")
                if wait_s:
                    await asyncio.sleep(wait_s)
        except InferenceError as error:
            self._fail(error)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._fail(InferenceError(f"the stream failed here: {error!r}", code="INTERNAL"))
            raise
        finally:
            self._arrived.set()

    def _fail(self, error: InferenceError) -> None:
        self._put(self._session.fail(error))
        self._error = error
        # Whoever waits to send is to see it.
        for _ in range(self._options.in_flight):
            self._room.release()

    def _finished(self) -> bool:
        return self._sending_done and not len(self._session)

    async def _something_to_send(self) -> bool:
        """Waits for a request without an answer; False when there will be none any more."""
        while not len(self._session):
            if self._sending_done:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    async def _one_connection(self) -> InferenceError | None:
        """Connect, send, receive; the error that ended it, None for an end with OK."""
        self._session.opened()
        self.connections += 1
        call = self._connect(metadata=(*self._options.metadata, ANNOUNCED), timeout=self._options.connection_s)
        sender = asyncio.ensure_future(self._send_all(call))
        watch = _Watch(call, self._session, self._results, self._options.stalled_s)
        try:
            with watch:
                await self._receive_all(call, watch)
        except grpc.aio.AioRpcError as error:
            return stalled(self._options.stalled_s) if watch.cancelled else from_call(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if watch.cancelled and task is not None and not task.cancelling():
                return stalled(self._options.stalled_s)
            raise
        finally:
            call.cancel()
            await ended(sender)
        return None

    async def _receive_all(self, call: Any, watch: _Watch) -> None:
        session, results = self._session, self._results
        async for message in call:
            watch.touched()
            ready = session.received(message)
            self._reconnecting.progressed()
            if ready:
                results.extend(ready)
                self._arrived.set()
                while len(results) >= RESULTS_MAX:
                    self._taken.clear()
                    await self._taken.wait()
            if not ready or (self._sending_done and not len(session)):
                # For the sender: it is to end its side, or something is to be sent again.
                self._changed.set()

    async def _send_all(self, call: Any) -> None:
        """Send what there is; end the side when the server asked to move or all is done."""
        session = self._session
        # A connection that broke says so where it is read from.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                request = session.next()
                if request is not None:
                    await call.write(request)
                elif session.leaving or self._finished():
                    await call.done_writing()
                    return
                else:
                    self._changed.clear()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(session.due_s()):
                            await self._changed.wait()

    def __repr__(self) -> str:
        state = "failed" if self._error else "closed" if self._closed or self._task is None else "open"
        return f"<AioStream {self._name} {state}, {len(self._session)} waiting, {self.connections} connections>"


class _Watch:
    """Cancels a connection on which an answer is overdue."""

    def __init__(self, call: Any, session: Session, results: deque[Result], stalled_s: float) -> None:
        self._call, self._session, self._results, self._stalled_s = call, session, results, stalled_s
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self.cancelled = False

    def __enter__(self) -> Self:
        self._look()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def touched(self) -> None:
        """Something came."""
        self._last_s = self._loop.time()

    def _look(self) -> None:
        bound_s, now_s = self._stalled_s, self._loop.time()
        if self._session.leaving:
            bound_s = min(bound_s, LEAVE_S)
        elif not len(self._session) or len(self._results) >= RESULTS_MAX:
            # Nobody waits for the server.
            self._last_s = now_s
        if now_s - self._last_s >= bound_s:
            self.cancelled = True
            self._call.cancel()
        else:
            self._timer = self._loop.call_later(min(bound_s, LEAVE_S) / 4, self._look)


async def ended(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for it; its error, if any, was told elsewhere or comes too late."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
