"""The fault proxy, between real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from random import Random

import pytest

from mlmesh_local.chaos.disturbance import Blackhole, Disturbance
from mlmesh_local.chaos.proxy import FaultProxy
from mlmesh_runtime.errors import InvalidInput

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def echoing() -> AsyncIterator[FaultProxy]:
    """A proxy in front of a server that sends everything back, until its client has said all."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            writer.close()
            await writer.wait_closed()

    async with asyncio.timeout(10), await asyncio.start_server(echo, "127.0.0.1", 0) as server:
        proxy = FaultProxy(("127.0.0.1", 0), server.sockets[0].getsockname(), random=Random(1))  # noqa: S311
        await proxy.start()
        try:
            yield proxy
        finally:
            await proxy.close()
            server.close()


@contextlib.asynccontextmanager
async def connected(proxy: FaultProxy) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(*proxy.address)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ask(connection: Connection, data: bytes) -> bytes:
    reader, writer = connection
    writer.write(data)
    await writer.drain()
    return await reader.readexactly(len(data))


async def test_undisturbed_everything_arrives_and_ends_in_order() -> None:
    async with echoing() as proxy, connected(proxy) as (reader, writer):
        data = bytes(range(256)) * 40_000

        async def send() -> None:
            writer.write(data)
            await writer.drain()
            writer.write_eof()

        sending = asyncio.ensure_future(send())
        assert await _all(reader) == data
        await sending


async def _all(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while part := await reader.read(1 << 16):
        parts.append(part)
    return b"".join(parts)


async def test_a_delay_acts_in_each_direction_and_on_open_connections() -> None:
    async with echoing() as proxy, connected(proxy) as connection:
        assert await ask(connection, b"now") == b"now"
        proxy.set(Disturbance(delay_s=0.05))
        started = asyncio.get_running_loop().time()
        assert await ask(connection, b"late") == b"late"
        assert asyncio.get_running_loop().time() - started >= 0.1


async def test_a_cut_resets_what_is_open_and_refuses_what_is_new() -> None:
    async with echoing() as proxy, connected(proxy) as connection:
        assert await ask(connection, b"x") == b"x"
        proxy.set(Disturbance(cut=True))
        with pytest.raises(ConnectionResetError):
            await connection[0].readexactly(1)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            async with connected(proxy) as refused:
                await ask(refused, b"y")
        proxy.set(Disturbance())
        async with connected(proxy) as again:
            assert await ask(again, b"z") == b"z"


async def test_a_blackhole_keeps_connections_open_and_loses_bytes_of_its_direction() -> None:
    async with echoing() as proxy, connected(proxy) as connection:
        proxy.set(Disturbance(blackhole=Blackhole.RESPONSES))
        reader, writer = connection
        writer.write(b"lost")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await reader.readexactly(1)
        assert proxy.connections == 1
        proxy.set(Disturbance())
        assert await ask(connection, b"kept") == b"kept"


async def test_corruption_turns_over_one_bit_of_a_piece() -> None:
    async with echoing() as proxy, connected(proxy) as connection:
        proxy.set(Disturbance(corrupt=1.0))
        sent = bytes(64)
        got = await ask(connection, sent)
        # Once on the way there, once on the way back.
        assert 0 < sum(bin(byte).count("1") for byte in got) <= 2


async def test_a_rate_bounds_what_a_connection_carries() -> None:
    async with echoing() as proxy, connected(proxy) as connection:
        proxy.set(Disturbance(bytes_per_s=20_000))
        started = asyncio.get_running_loop().time()
        # The first piece passes at once, in each direction; what follows it waits for its due.
        for _ in range(4):
            await ask(connection, bytes(1000))
        assert asyncio.get_running_loop().time() - started >= 3 * 1000 / 20_000


async def test_a_target_that_is_not_there_is_a_reset() -> None:
    with contextlib.closing(await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)) as server:
        gone = server.sockets[0].getsockname()
    proxy = FaultProxy(("127.0.0.1", 0), gone, random=Random(1))  # noqa: S311
    await proxy.start()
    try:
        async with connected(proxy) as (reader, _), asyncio.timeout(5):
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await reader.readexactly(1)
    finally:
        await proxy.close()


def test_a_disturbance_tells_what_it_does() -> None:
    assert str(Disturbance()) == "watched"
    it = Disturbance(delay_s=0.1, jitter_s=0.05, bytes_per_s=1000, blackhole=Blackhole.BOTH, corrupt=0.01)
    assert str(it) == "delay 100 to 150 ms, 1000 bytes/s, requests and responses vanish, corrupt 1 %"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("delay", {"delay_s": -1}),
        ("jitter", {"jitter_s": 61}),
        ("bytes_per_second", {"bytes_per_s": -1}),
        ("corrupt_percent", {"corrupt": 1.1}),
    ],
)
def test_what_cannot_be_is_refused(field: str, fields: dict[str, float]) -> None:
    with pytest.raises(InvalidInput) as refused:
        Disturbance(**fields)  # type: ignore[arg-type]
    assert [violation.field for violation in refused.value.violations] == [field]
