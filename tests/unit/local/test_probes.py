"""Probes of every kind, each against what really answers, or does not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator

import pytest

from mlmesh_local.probes import asking
from mlmesh_local.workloads import Probe

HOST = "127.0.0.1"


@contextlib.asynccontextmanager
async def serving(answer: bytes | None) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that answers each connection so, or never; its port, and the first lines that it was sent."""
    asked: list[bytes] = []
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        with contextlib.suppress(ConnectionError):
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
            writer.close()
            await writer.wait_closed()
        ended.set()

    async with await asyncio.start_server(serve, HOST, 0) as server:
        yield server.sockets[0].getsockname()[1], asked
        await ended.wait()


async def ask(probe: Probe) -> str:
    async with asking(probe, HOST, os.environ | {"SAID": "yes"}) as found:
        return await found()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", ""),
        (b"HTTP/1.0 399 \r\n\r\n", ""),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "HTTP 503"),
        (b"HTTP/1.1 199 \r\n\r\n", "HTTP 199"),
        (b"", "no answer of HTTP"),
        (b"\0" * 10_000, "no answer of HTTP"),
    ],
)
async def test_http_is_well_from_200_to_399(answer: bytes, expected: str) -> None:
    async with serving(answer) as (port, asked):
        assert await ask(Probe(how="http", port=port, path="/healthz?full", timeout_s=20)) == expected
    assert asked == [b"GET /healthz?full HTTP/1.1\r\n"]


async def test_who_is_silent_is_not_waited_for() -> None:
    async with serving(None) as (port, _):
        assert await ask(Probe(how="http", port=port, timeout_s=0.02)) == "no answer within 0.02 s"
    # Nobody listens there any more.
    assert await ask(Probe(how="http", port=port, timeout_s=20))
    assert await ask(Probe(how="tcp", port=port, timeout_s=20))


async def test_a_connection_is_enough() -> None:
    async with serving(None) as (port, _):
        assert await ask(Probe(how="tcp", port=port, timeout_s=20)) == ""


@pytest.mark.parametrize(
    ("script", "timeout_s", "expected"),
    [
        ("test $SAID = yes", 20, ""),
        ("exit 3", 20, "the command ended with 3"),
        ("exec sleep 600", 0.05, "no answer within 0.05 s"),
    ],
)
async def test_a_command_is_well_when_it_ends_with_0(script: str, timeout_s: float, expected: str) -> None:
    assert await ask(Probe(how="exec", command=("sh", "-c", script), timeout_s=timeout_s)) == expected


async def test_a_command_that_is_not_there_is_not_well() -> None:
    assert "No such file" in await ask(Probe(how="exec", command=(f"{sys.executable}-none",), timeout_s=20))
