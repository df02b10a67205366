"""Serves the metrics over HTTP, as Prometheus asks for them: `GET /metrics` on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable

logger = logging.getLogger(__name__)

REQUEST_S = 5.0
CONNECTIONS_MAX = 32
HEAD_BYTES_MAX = 16 * 1024


@contextlib.asynccontextmanager
async def serve(address: str, page: Callable[[], Iterable[str]], *, content_type: str) -> AsyncIterator[None]:
    """Serve what ``page`` gives, piece by piece, at "host:port" until the block ends."""
    host, _, port = address.rpartition(":")
    open_connections = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_connections
        open_connections += 1
        try:
            if open_connections > CONNECTIONS_MAX:
                return
            async with asyncio.timeout(REQUEST_S):
                await _answer(reader, writer, page, content_type)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            logger.debug("a scrape ended early", extra={"reason": str(error)})
        finally:
            open_connections -= 1
            writer.close()

    server = await asyncio.start_server(answer, host, int(port), limit=HEAD_BYTES_MAX)
    async with server:
        yield


async def _answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, page: Callable[[], Iterable[str]], content_type: str
) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    method, _, rest = head.partition(" ")
    path = rest.partition(" ")[0].partition("?")[0]
    pieces: Iterable[str] = ["GET /metrics\n"]
    if method not in ("GET", "HEAD"):
        status, kind = "405 Method Not Allowed", "text/plain"
    elif path != "/metrics":
        status, kind = "404 Not Found", "text/plain"
    else:
        status, kind, pieces = "200 OK", content_type, page()
    # Without a length the end of the connection is the end of the page.
    writer.write(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode())
    for piece in pieces if method != "HEAD" else ():
        writer.write(piece.encode())
        await writer.drain()
        # Others take their turn also while the reader keeps up.
        await asyncio.sleep(0)
    await writer.drain()
