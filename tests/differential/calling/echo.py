"""An application that answers HTTP/1.1, HTTP/2 and gRPC on one port with who it is and what it got; and a client.

Headers of a call tell the application what to do: "x-fail: 503*2" fails the first two attempts of a call ("x-call" is
its name), "x-slow: 1" answers never.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions

PREFACE = b"PRI * HTTP/2.0\r\n"
TLS = b"\x16"
Headers = list[tuple[str, str]]


@dataclass
class Journal:
    """What arrived where, by the name of the call."""

    arrived: dict[str, list[tuple[str, dict[str, str]]]] = field(default_factory=lambda: defaultdict(list))

    def of(self, call: str) -> list[tuple[str, dict[str, str]]]:
        """Applications that a call reached, each with the request's headers."""
        return list(self.arrived[call])


@dataclass
class Echo:
    """The application of one instance."""

    name: str
    journal: Journal

    async def serve(self, host: str, port: int) -> asyncio.Server:
        """Listen at an address."""
        return await asyncio.start_server(self._connected, host, port)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gone = (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, h2.exceptions.ProtocolError)
        with contextlib.suppress(*gone):
            first = await reader.readexactly(1)
            if first == TLS:
                # It speaks none; a hello is no line to wait for the end of.
                writer.close()
                return
            first += await reader.readline()
            if first == PREFACE:
                await self._http2(first, reader, writer)
            elif first.endswith(b"HTTP/1.1\r\n"):
                await self._http1(first, reader, writer)
        writer.close()

    async def _http1(self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while first:
            method, path, _ = first.decode().split(" ", 2)
            headers = await _headers1(reader)
            if headers.get("transfer-encoding") == "chunked":
                while size := int((await reader.readline()).strip(), 16):
                    await reader.readexactly(size + 2)
                await reader.readline()
            await reader.readexactly(int(headers.get("content-length", "0")))
            headers[":authority"] = headers.pop("host", "")
            status, body = self._answer({":method": method, ":path": path, **headers})
            if status == 0:
                await reader.read()
                return
            more = ""
            if headers.get("content-type") == "application/grpc":
                status, more = 200, f"content-type: application/grpc\r\ngrpc-status: {0 if status == 200 else 14}\r\n"
            answer = f"HTTP/1.1 {status} x\r\ncontent-length: {len(body)}\r\nx-app: {self.name}\r\n{more}\r\n"
            writer.write(answer.encode() + (b"" if method == "HEAD" else body))
            await writer.drain()
            first = await reader.readline()

    async def _http2(self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        data = first
        asked: dict[int, dict[str, str]] = {}
        while data:
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    asked[event.stream_id] = _joined(event.headers)
                elif isinstance(event, h2.events.StreamEnded):
                    self._answer2(connection, event.stream_id, asked.pop(event.stream_id))
            writer.write(connection.data_to_send())
            await writer.drain()
            data = await reader.read(65536)

    def _answer2(self, connection: h2.connection.H2Connection, stream: int, headers: dict[str, str]) -> None:
        status, body = self._answer(headers)
        if status == 0:
            return
        grpc = headers.get("content-type", "").startswith("application/grpc")
        if not grpc:
            connection.send_headers(stream, [(":status", str(status)), ("x-app", self.name)])
            connection.send_data(stream, body, end_stream=True)
            return
        plain = [(":status", "200"), ("content-type", "application/grpc"), ("x-app", self.name)]
        if status != 200:
            connection.send_headers(stream, [*plain, ("grpc-status", "14")], end_stream=True)
            return
        connection.send_headers(stream, plain)
        connection.send_data(stream, b"\0" + len(body).to_bytes(4, "big") + body)
        connection.send_headers(stream, [("grpc-status", "0")], end_stream=True)

    def _answer(self, headers: dict[str, str]) -> tuple[int, bytes]:
        call = headers.get("x-call", "")
        self.journal.arrived[call].append((self.name, headers))
        if "x-slow" in headers:
            return 0, b""
        code, star, times = headers.get("x-fail", "").partition("*")
        if star and len(self.journal.arrived[call]) <= int(times):
            return int(code), b"failed"
        return 200, json.dumps({"name": self.name}).encode()


async def _headers1(reader: asyncio.StreamReader) -> dict[str, str]:
    found: Headers = []
    while (line := (await reader.readline()).strip()) != b"":
        name, _, value = line.decode().partition(":")
        found.append((name.lower(), value.strip()))
    return _joined(found)


def _joined(headers: Sequence[tuple[Any, Any]]) -> dict[str, str]:
    result: dict[str, str] = {}
    for raw, value in headers:
        name = str(raw)
        result[name] = f"{result[name]},{value}" if name in result else str(value)
    return result


@dataclass(frozen=True, kw_only=True)
class Response:
    """What came back. ``status`` is 0 where the connection was closed; ``grpc`` the gRPC status' number, if any."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    grpc: int | None = None

    @property
    def app(self) -> str:
        """The application that answered, empty where the mesh did."""
        return self.headers.get("x-app", "")


async def ask(
    address: tuple[str, int],
    headers: Mapping[str, str],
    *,
    http2: bool,
    secure: ssl.SSLContext | None = None,
    server_name: str = "",
    timeout_s: float = 20.0,
) -> Response:
    """One call over a connection of its own; pseudo-headers are among the headers."""
    try:
        async with asyncio.timeout(timeout_s):
            shown = server_name if secure else None
            reader, writer = await asyncio.open_connection(*address, ssl=secure, server_hostname=shown)
            try:
                return await (_ask2 if http2 else _ask1)(reader, writer, dict(headers))
            finally:
                writer.close()
    except (OSError, EOFError, asyncio.IncompleteReadError):
        return Response(status=0)


async def _ask1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: dict[str, str]) -> Response:
    line = f"{headers.pop(':method')} {headers.pop(':path')} HTTP/1.1\r\nhost: {headers.pop(':authority')}\r\n"
    headers.pop(":scheme", "")
    writer.write((line + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "connection: close\r\n\r\n").encode())
    status = (await reader.readline()).split()
    if len(status) < 2:
        return Response(status=0)
    received = await _headers1(reader)
    # Envoy closes a connection a second after its last answer: who reads to the end waits for that.
    length = received.get("content-length")
    body = await reader.readexactly(int(length)) if length else b""
    return Response(status=int(status[1]), headers=received, body=body)


async def _ask2(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: dict[str, str]) -> Response:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    connection.send_headers(1, list(headers.items()))
    connection.send_data(1, b"\0\0\0\0\0", end_stream=True)
    received: dict[str, str] = {}
    body = b""
    while True:
        writer.write(connection.data_to_send())
        data = await reader.read(65536)
        if not data:
            return Response(status=0)
        for event in connection.receive_data(data):
            if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                received |= _joined(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                body += event.data
            elif isinstance(event, h2.events.StreamReset):
                return Response(status=0)
            elif isinstance(event, h2.events.StreamEnded):
                grpc = received.get("grpc-status")
                status = int(received.pop(":status"))
                return Response(status=status, headers=received, body=body, grpc=int(grpc) if grpc else None)
