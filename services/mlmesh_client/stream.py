"""A stream over blocking gRPC: a thread that connects and receives; gRPC's own thread sends."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

import grpc

from mlmesh_client.calling import (
    ANNOUNCED,
    LEAVE_S,
    RESULTS_MAX,
    Reconnecting,
    StreamOptions,
    stalled,
)
from mlmesh_client.errors import InferenceError, TimedOut, from_call
from mlmesh_client.messages import EndOfStream, Inputs, Model, Parameter, Result, SequencePlace, request_of
from mlmesh_client.session import Session
from open_inference import grpc_service_pb2 as pb

_LOOK_S: Final = 0.5


class Stream:
    """Requests and their results over one stream, which outlives connections and servers.

    Made by `Client.stream`; use it in `with`. At most `in_flight` requests are without a result that was taken: `send`
    then waits, so take results in another thread, or use `map`. Any thread may call anything.

    Attributes:
        connections: how often it connected.
    """

    def __init__(
        self,
        *,
        connect: Callable[..., Any],
        describe: Callable[[], Model],
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
        self._changed = threading.Condition()
        """Guards everything below, and tells of every change of it."""
        self._results: deque[Result] = deque()
        self._untaken = 0
        self._sending_done = self._closed = self._cancelled = False
        self._error: InferenceError | None = None
        self._call: Any = None
        self._epoch = 0
        self._last_s = 0.0
        self._thread: threading.Thread | None = None
        self.connections = 0

    @property
    def model(self) -> Model:
        """What it streams to; known inside of `with`."""
        if self._model is None:
            raise RuntimeError("use the stream in `with`")
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

    @property
    def room(self) -> int:
        """Requests that may be sent without waiting."""
        return self._options.in_flight - self._untaken

    def __enter__(self) -> Self:
        self._model = self._describe()
        self._session = Session(ordered=not self._model.decoupled, retry=self._reconnecting.again_s)
        # A daemon: a program that forgot a stream ends all the same.
        self._thread = threading.Thread(target=self._run, name=f"stream-{self._name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it now. What has no answer is given up."""
        with self._changed:
            self._closed = True
            call = self._call
            self._changed.notify_all()
        if call is not None:
            call.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def send(
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
        request = self.make(inputs, wanted=outputs, parameters=parameters, priority=priority, sequence=sequence)
        self.send_message(request, id=id, sequence=sequence, timeout=timeout)

    def make(self, inputs: Inputs, **fields: Any) -> pb.ModelInferRequest:
        """A request for `send_message`; `fields` are those of messages.request_of. Raises InvalidInput."""
        return request_of(self.model, inputs, version=self._version, **fields)

    def send_message(
        self,
        request: pb.ModelInferRequest,
        *,
        id: str = "",  # noqa: A002
        sequence: SequencePlace | None = None,
        timeout: float | None = None,
    ) -> None:
        """Like `send`, of a message that is made already. It becomes the stream's: its id is overwritten."""
        seconds = self._options.timeout_s if timeout is None else timeout
        with self._changed:
            self._check()
            if not self._wait_for(lambda: self._untaken < self._options.in_flight or self._over(), seconds):
                raise TimedOut(
                    f"{self._options.in_flight} requests have no result that was taken, for {seconds:g} s: receive "
                    "results in another thread",
                    code="DEADLINE_EXCEEDED",
                )
            self._check()
            self._untaken += 1
            self._results.extend(self._session.add(request, name=id, sequence=sequence))
            self._changed.notify_all()

    def done_sending(self) -> None:
        """There are no more requests: results end after the last one."""
        with self._changed:
            self._sending_done = True
            self._changed.notify_all()

    def receive(self, *, timeout: float | None = None) -> Result:
        """The next result. A request that failed gives a result with `error`.

        Raises EndOfStream when all requests have results and `done_sending` was called, TimedOut when none comes for
        `timeout` seconds (default: for ever; servers that hang are left), and the error of a stream that has failed.
        """
        with self._changed:
            if not self._wait_for(lambda: bool(self._results) or self._over(), timeout):
                raise TimedOut(f"no result for {timeout:g} s", code="DEADLINE_EXCEEDED")
            if not self._results:
                if self._error is not None:
                    raise self._error
                raise EndOfStream
            return self._take()

    def __iter__(self) -> Iterator[Result]:
        while True:
            try:
                result = self.receive()
            except EndOfStream:
                return
            yield result

    def map(self, inputs: Iterable[Inputs]) -> Iterator[Result]:
        """The results of many requests, which are sent while results come. Ends the sending.

        The inputs are asked in the caller's thread, between results.
        """
        for one in inputs:
            if self.room <= 0:
                yield self.receive()
            self.send(one)
            yield from self.arrived()
        self.done_sending()
        yield from self

    def arrived(self) -> Iterator[Result]:
        """The results that are there already."""
        while self._results:
            with self._changed:
                if not self._results:
                    return
                result = self._take()
            yield result

    def _take(self) -> Result:
        result = self._results.popleft()
        if result.final:
            self._untaken -= 1
        self._changed.notify_all()
        return result

    def _over(self) -> bool:
        return (
            self._error is not None or self._closed or (self._sending_done and not len(self._session))
        ) and not self._results

    def _wait_for(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        """Wait, and look after the server meanwhile; False when time is over. The lock is held."""
        end_s = None if seconds is None else time.monotonic() + seconds
        while not condition():
            left_s = _LOOK_S if end_s is None else min(_LOOK_S, end_s - time.monotonic())
            if left_s <= 0:
                return False
            self._changed.wait(left_s)
            self._look()
        return True

    def _look(self) -> None:
        """Leave a connection on which an answer is overdue. The lock is held."""
        if self._call is None or self._cancelled:
            return
        now_s = time.monotonic()
        if not len(self._session) or len(self._results) >= RESULTS_MAX:
            self._last_s = now_s
        elif now_s - self._last_s >= self._options.stalled_s:
            self._cancelled = True
            self._call.cancel()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error
        if self._sending_done or self._closed:
            raise RuntimeError("the stream takes no more requests")
        if self._thread is None:
            raise RuntimeError("use the stream in `with`")

    # The stream's thread.

    def _run(self) -> None:
        try:
            while self._something_to_send():
                error = self._one_connection()
                with self._changed:
                    moved = self._session.leaving
                    self._results.extend(self._session.broke())
                    self._changed.notify_all()
                    if self._closed or (self._sending_done and not len(self._session)):
                        return
                wait_s = self._reconnecting.wait_s(error, moved=moved)
                if wait_s is None:
                    raise error or InferenceError("the server ended the stream", code="UNAVAILABLE")
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, wait_s)
        except InferenceError as error:
            self._fail(error)
        except BaseException as error:
            self._fail(InferenceError(f"the stream failed here: {error!r}", code="INTERNAL"))
            raise

    def _fail(self, error: InferenceError) -> None:
        with self._changed:
            self._results.extend(self._session.fail(error))
            self._error = error
            self._changed.notify_all()

    def _something_to_send(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._session) or self._sending_done or self._closed)
            return bool(len(self._session)) and not self._closed

    def _one_connection(self) -> InferenceError | None:
        """Connect, send, receive; the error that ended it, None for an end with OK."""
        with self._changed:
            self._session.opened()
            self._epoch += 1
            self.connections += 1
            self._last_s, self._cancelled = time.monotonic(), False
            call = self._call = self._connect(
                self._requests(self._epoch),
                metadata=(*self._options.metadata, ANNOUNCED),
                timeout=self._options.connection_s,
            )
            if self._closed:
                call.cancel()
        leaving: threading.Timer | None = None
        try:
            for message in call:
                self._received(message)
                if self._session.leaving and leaving is None:
                    leaving = threading.Timer(LEAVE_S, call.cancel)
                    leaving.daemon = True
                    leaving.start()
        except grpc.RpcError as error:
            return stalled(self._options.stalled_s) if self._cancelled else from_call(error)
        finally:
            if leaving is not None:
                leaving.cancel()
            with self._changed:
                self._epoch += 1
                self._call = None
                self._changed.notify_all()
            call.cancel()
        return None

    def _received(self, message: pb.ModelStreamInferResponse) -> None:
        with self._changed:
            self._last_s = time.monotonic()
            self._results.extend(self._session.received(message))
            self._reconnecting.progressed()
            self._changed.notify_all()
            if len(self._results) >= RESULTS_MAX:
                self._changed.wait_for(lambda: len(self._results) < RESULTS_MAX or self._closed)

    def _requests(self, epoch: int) -> Iterator[pb.ModelInferRequest]:
        """What gRPC sends on one connection, in a thread of its own."""
        session = self._session
        while True:
            with self._changed:
                while True:
                    if self._epoch != epoch or self._closed:
                        return
                    if (request := session.next()) is not None:
                        break
                    if session.leaving or (self._sending_done and not len(session)):
                        return
                    self._changed.wait(session.due_s())
            yield request

    def __repr__(self) -> str:
        state = "failed" if self._error else "closed" if self._closed or self._thread is None else "open"
        return f"<Stream {self._name} {state}, {len(self._session)} waiting, {self.connections} connections>"
