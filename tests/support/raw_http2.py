"""A gRPC client of single HTTP/2 frames, for what no library would send."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events

Headers = list[tuple[str, str]]


def framed(message: bytes, flags: int = 0) -> bytes:
    """A message with its gRPC prefix."""
    return struct.pack(">BI", flags, len(message)) + message


def request(path: str = "/test.echo.Echo/Unary", *more: tuple[str, str], without: str = "", **changed: str) -> Headers:
    """The headers of a call. `changed` are pseudo headers without colon, content_type, te, or grpc_timeout."""
    base = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "test",
        "content-type": "application/grpc",
        "te": "trailers",
        "grpc-timeout": "10S",
    }
    for name, value in changed.items():
        key = name.replace("_", "-")
        base[key if key in base else f":{key}"] = value
    base.pop(without, None)
    return [*base.items(), *more]


@dataclass(slots=True)
class Answer:
    """What came on one stream."""

    headers: list[dict[str, str]] = field(default_factory=list)
    data: bytes = b""
    end: str = ""

    @property
    def status(self) -> int | None:
        """grpc-status."""
        value = next((found["grpc-status"] for found in self.headers if "grpc-status" in found), None)
        return None if value is None else int(value)

    @property
    def http_status(self) -> str:
        """:status."""
        return self.headers[0].get(":status", "") if self.headers else ""


class Raw:
    """One connection. `http` makes the frames; `send` sends what it made."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
            validate_inbound_headers=False,
        )
        self.http: Any = h2.connection.H2Connection(config)
        self.answers: dict[int, Answer] = {}
        self.reads = True
        self.goaway: int | None = None
        self.closed = False

    async def send(self, raw: bytes = b"") -> None:
        """Send these bytes, after what `http` made."""
        self.writer.write(self.http.data_to_send() + raw)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def open(self, headers: Headers, *chunks: bytes, end: bool = True) -> int:
        """Begin a call; its stream's number."""
        stream: int = self.http.get_next_available_stream_id()
        self.answers[stream] = Answer()
        self.http.send_headers(stream, headers, end_stream=end and not chunks)
        for index, chunk in enumerate(chunks):
            self.http.send_data(stream, chunk, end_stream=end and index == len(chunks) - 1)
        await self.send()
        return stream

    async def until(self, done: Callable[[], bool], *, timeout_s: float = 10.0) -> bool:
        """Read until this is so, or the connection is closed. False when neither comes."""
        try:
            async with asyncio.timeout(timeout_s):
                while not done() and not self.closed:
                    await self._receive()
        except TimeoutError:
            return False
        return True

    async def answer(self, stream: int, *, timeout_s: float = 10.0) -> Answer:
        """Wait for the end of one stream."""
        found = self.answers[stream]
        await self.until(lambda: bool(found.end), timeout_s=timeout_s)
        return found

    async def call(self, headers: Headers, chunks: Sequence[bytes], *, timeout_s: float = 10.0) -> Answer:
        """One call, to its end."""
        return await self.answer(await self.open(headers, *chunks), timeout_s=timeout_s)

    async def _receive(self) -> None:
        try:
            raw = await self._reader.read(65536)
        except ConnectionError:
            raw = b""
        if not raw:
            self.closed = True
            return
        for event in self.http.receive_data(raw):
            self._take(event)
        await self.send()

    def _take(self, event: Any) -> None:
        if isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = int(event.error_code or 0)
            return
        found = self.answers.get(getattr(event, "stream_id", 0) or 0)
        if found is None:
            return
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            found.headers.append(dict(event.headers))
        elif isinstance(event, h2.events.DataReceived):
            found.data += event.data
            if self.reads and event.flow_controlled_length:
                self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            found.end = found.end or "ended"
        elif isinstance(event, h2.events.StreamReset):
            found.end = found.end or f"reset {int(event.error_code)}"


@contextlib.asynccontextmanager
async def connected(address: str, *, preface: bool = True) -> AsyncIterator[Raw]:
    """A connection to host:port; its preface is sent."""
    host, _, port = address.rpartition(":")
    raw = Raw(*await asyncio.open_connection(host, int(port)))
    try:
        if preface:
            raw.http.initiate_connection()
            await raw.send()
        yield raw
    finally:
        raw.writer.close()
        with contextlib.suppress(ConnectionError):
            await raw.writer.wait_closed()
