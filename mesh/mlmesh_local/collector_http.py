"""OTLP over HTTP into the trace store: `POST /v1/traces` with Protobuf or JSON.

https://opentelemetry.io/docs/specs/otlp/#otlphttp
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from mlmesh_runtime.errors import Overloaded

BODY_BYTES_MAX = 16 * 1024 * 1024
HEAD_BYTES_MAX = 16 * 1024
LENGTH_DIGITS_MAX = 16
REQUEST_S = 10.0
CONNECTIONS_MAX = 64
_PATH = "/v1/traces"
_IDS = ("traceId", "spanId", "parentSpanId")

Export = trace_service_pb2.ExportTraceServiceRequest
Take = Callable[[Export], Awaitable[None]]


class _RefusedError(Exception):
    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


@contextlib.asynccontextmanager
async def serve(address: str, take: Take) -> AsyncIterator[None]:
    """Hand every export at "host:port" to ``take`` until the block ends."""
    host, _, port = address.rpartition(":")
    connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            if connections <= CONNECTIONS_MAX:
                async with asyncio.timeout(REQUEST_S):
                    await _answer(reader, writer, take)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # an exporter that went away sends again
        finally:
            connections -= 1
            writer.close()

    server = await asyncio.start_server(answer, host, int(port), limit=HEAD_BYTES_MAX)
    async with server:
        yield


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, take: Take) -> None:
    kind, status, body = "application/json", "200 OK", b"{}"
    try:
        kind, export = await _read(reader)
        await take(export)
        body = b"" if kind != "application/json" else b"{}"
    except _RefusedError as error:
        status = error.status
    except Overloaded:
        # Exporters send again after this one.
        status = "503 Service Unavailable"
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def _read(reader: asyncio.StreamReader) -> tuple[str, Export]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, _, rest = lines[0].partition(" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if rest.partition(" ")[0] != _PATH:
        raise _RefusedError("404 Not Found")
    if method != "POST":
        raise _RefusedError("405 Method Not Allowed")
    length = headers.get("content-length", "")
    if not length.isascii() or not length.isdecimal():
        raise _RefusedError("411 Length Required")
    if len(length) > LENGTH_DIGITS_MAX or int(length) > BODY_BYTES_MAX:
        raise _RefusedError("413 Content Too Large")
    body = await reader.readexactly(int(length))
    if headers.get("content-encoding", "identity") == "gzip":
        body = _unpacked(body)
    kind = headers.get("content-type", "").partition(";")[0]
    return kind, parse(kind, body)


def _unpacked(body: bytes) -> bytes:
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        result = unpacker.decompress(body, BODY_BYTES_MAX)
    except zlib.error as error:
        raise _RefusedError("400 Bad Request") from error
    if unpacker.unconsumed_tail:
        raise _RefusedError("413 Content Too Large")
    if not unpacker.eof:
        raise _RefusedError("400 Bad Request")
    return result


def parse(kind: str, body: bytes) -> Export:
    """An export of a content type; refused where it is none."""
    try:
        if kind == "application/x-protobuf":
            return Export.FromString(body)
        if kind == "application/json":
            plain = json.loads(body)
            if not isinstance(plain, dict):
                raise ValueError("not an object")
            _encode_ids(plain)
            return json_format.ParseDict(plain, Export(), ignore_unknown_fields=True)
    except (DecodeError, json_format.ParseError, ValueError, RecursionError) as error:
        raise _RefusedError("400 Bad Request") from error
    raise _RefusedError("415 Unsupported Media Type")


def _encode_ids(value: Any) -> None:
    """OTLP's JSON has ids in hex, where Protobuf's has base64."""
    if isinstance(value, list):
        for item in value:
            _encode_ids(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name in _IDS and isinstance(item, str):
                value[name] = base64.b64encode(bytes.fromhex(item)).decode()
            else:
                _encode_ids(item)
