"""grpc.aio's ServicerContext over a native call: what handlers, identity and streams use of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from mlmesh_runtime.direct import DirectMethod
from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.rpcs import Rpc

if TYPE_CHECKING:
    from mlmesh_front import Call as NativeCall

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
_AbortError: Any = grpc.aio.AbortError
Metadata = Sequence[tuple[str, str | bytes]]

# A writer whose reader keeps up would never let anybody else run.
_WRITES_A_TURN = 16


class NativeContext:
    """One call that a task answers. Belongs to the event loop's thread."""

    lingers = True
    """The front itself lets the end of a stream wait for a caller that still sends."""

    def __init__(self, call: NativeCall, limit: int) -> None:
        self.call = call
        self.task: asyncio.Task[None] | None = None
        self.lane: NativeLane | None = None
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._readable: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._metadata: tuple[tuple[str, str | bytes], ...] | None = None
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()
        self._code: Any = None
        self._details = ""
        self._ended = False
        self._headers_sent = False
        self._wrote = False
        self._writes = 0
        self._callbacks: list[Callable[[Any], None]] = []

    # What came.

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The request's metadata."""
        if self._metadata is None:
            self._metadata = self.call.metadata()
        return self._metadata

    def time_remaining(self) -> float | None:
        """Seconds to the deadline; None without one."""
        deadline_ns = self.call.deadline_ns
        return None if not deadline_ns else max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9)

    def peer(self) -> str:
        """The other end's address, as gRPC writes it."""
        return self.call.peer

    def peer_identities(self) -> None:
        """Nobody is authenticated here."""

    def peer_identity_key(self) -> None:
        """Nobody is authenticated here."""

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """Nobody is authenticated here."""
        return {}

    async def read(self) -> Any:
        """The next encoded request, or grpc.aio.EOF."""
        while True:
            raw = self.call.read()
            if raw is False:
                return _EOF
            if isinstance(raw, bytes):
                return raw
            # None: not there yet. True: the stream is broken, and the cancellation is on its way.
            self._readable = self._loop.create_future()
            try:
                await self._readable
            finally:
                self._readable = None

    def __aiter__(self) -> NativeContext:
        return self

    async def __anext__(self) -> bytes:
        if (raw := await self.read()) is _EOF:
            raise StopAsyncIteration
        return raw  # type: ignore[no-any-return]

    # What goes.

    async def write(self, message: bytes) -> None:
        """Send a message; waits while the reader is behind."""
        if self._ended or self.call.gone():
            await asyncio.sleep(0)  # for the cancellation to arrive
            return
        self._wrote = True
        room = self.call.write(message)
        if room is None:
            await self.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, self.too_large(message))
        elif not room:
            self._writable = self._loop.create_future()
            try:
                await self._writable
            finally:
                self._writable = None
        else:
            self._writes += 1
            if self._writes % _WRITES_A_TURN == 0:
                await asyncio.sleep(0)

    def too_large(self, message: bytes) -> str:
        """What a caller is told of an answer over the bound."""
        return f"Sent message larger than max ({len(message)} vs. {self._limit})"

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        """Send the headers now, with these."""
        if not (self._headers_sent or self._wrote or self._ended):
            self._headers_sent = True
            self.call.send_headers(tuple(metadata))

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        """What goes with the status."""
        self._trailing = tuple(metadata)

    def trailing_metadata(self) -> Metadata:
        """What goes with the status."""
        return self._trailing

    def set_code(self, code: Any) -> None:
        """The status to end with."""
        self._code = code

    def code(self) -> Any:
        """The status that was set; None when none was."""
        return self._code

    def set_details(self, details: str) -> None:
        """The status's text."""
        self._details = details

    def details(self) -> str:
        """The status's text."""
        return self._details

    def set_compression(self, _compression: grpc.Compression) -> None:
        """Answers are not compressed here."""

    def disable_next_message_compression(self) -> None:
        """Answers are not compressed here."""

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """End with a status."""
        if trailing_metadata:
            self._trailing = tuple(trailing_metadata)
        self._code, self._details = code, details
        self.end()
        raise _AbortError("Locally aborted.")

    async def abort_with_status(self, status: Any) -> NoReturn:
        """End with a status."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def cancelled(self) -> bool:
        """Whether the caller is gone."""
        return not self._ended and self.call.gone()

    def done(self) -> bool:
        """Whether it is over."""
        return self._ended or self.call.gone()

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call this when it is over."""
        self._callbacks.append(callback)

    # For the server.

    def end(self) -> None:
        """Send the status that was set, OK when none was; once."""
        if not self._ended:
            self._ended = True
            code = self._code
            number = code.value[0] if isinstance(code, grpc.StatusCode) else int(code or 0)
            self.call.end((number, self._details, self._trailing))

    def over(self) -> None:
        """Tell those who asked."""
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    def readable(self) -> None:
        """There is something to read."""
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)

    def writable(self) -> None:
        """The reader has caught up."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def direct_lane(self, rpc: Rpc, _method: DirectMethod) -> NativeLane:
        """The lane of a stream whose messages the front hands to its direct method itself."""
        self.lane = NativeLane(rpc, self)
        return self.lane


class NativeLane:
    """A direct stream: the front reads, keeps the slots' order and writes; a task waits for its end."""

    def __init__(self, rpc: Rpc, context: NativeContext) -> None:
        self._rpc, self._context = rpc, context
        self._ending: MeshError | None = None
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> bytes | None:
        """Wait for the stream's end, or for the message that was handed over, which it returns."""
        call = self._context.call
        call.start_lane(self._rpc.call)
        try:
            await self._over
        finally:
            first, error = call.stop_lane()
        if isinstance(error, tuple):
            await self._context.abort(_CODES[error[0]], error[1])
        if error is not None:
            raise error
        if first is None and self._ending is not None:
            raise self._ending
        return first

    def end(self, error: MeshError) -> None:
        """Read no more; answer what was read, then end with this error."""
        if self._ending is None:
            self._ending = error
            self._context.call.close_lane()

    def moved(self) -> int:
        """Grows with every message that comes or goes."""
        return self._context.call.moved()[1]

    def over(self) -> None:
        """There is nothing left to wait for."""
        if not self._over.done():
            self._over.set_result(None)


_CODES = {code.value[0]: code for code in grpc.StatusCode}
