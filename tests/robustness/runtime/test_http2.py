"""What peers send that do not play by the rules: the server lives, others are served, memory stays bounded."""

import asyncio
import contextlib
import gzip
import os
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import h2.exceptions
import hyperframe.frame as frames
import psutil
import pytest

from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.direct import DirectCall
from mlmesh_runtime.limits import Limits
from mlmesh_runtime.server import Server
from mlmesh_runtime.telemetry import REGISTRY
from tests.support.echo import PROTOS, EchoServicer, Text, echo_service
from tests.support.raw_http2 import Raw, connected, framed, request
from tests.support.server import serving

pytestmark = pytest.mark.usefixtures("each_transport")

HI = Text(text="hi").SerializeToString()
CHAT = "/test.echo.Echo/Chat"
MIB = 1024 * 1024
ENDED = "mlmesh_server_connections_ended_total"


def echo(calls: Sequence[DirectCall]) -> None:
    for call in calls:
        call.reply(call.request)


def rss() -> int:
    return int(psutil.Process(os.getpid()).memory_info().rss)


async def lives(server: Server) -> None:
    """The server answers others."""
    async with open_channel(server.address) as channel:
        assert (await PROTOS.stub(channel).Unary(Text(text="well?"), timeout=10)).text == "well?"


async def ends(raw: Raw, *, timeout_s: float = 10.0) -> None:
    """The connection is ended by the server."""
    assert await raw.until(lambda: False, timeout_s=timeout_s), "the connection is open still"


async def test_rapid_resets_end_the_connection(each_transport: str) -> None:
    servicer = EchoServicer()
    async with serving(echo_service(servicer)) as server, connected(server.address) as raw:
        for _ in range(400 if each_transport == "native" else 200):
            for _ in range(20):
                stream = raw.http.get_next_available_stream_id()
                raw.http.send_headers(stream, request())
                raw.http.reset_stream(stream, 8)
            await raw.send()
            if raw.writer.is_closing():
                break
        if each_transport == "native":
            await ends(raw)
            assert raw.goaway in (None, 11)
            await lives(server)
            reasons = ("too many resets", "too much to be calm")  # ours, or h2's own
            assert any(REGISTRY.get_sample_value(ENDED, {"reason": reason}) for reason in reasons)
            return
        # grpcio cancels a call or two of others among so many resets; it comes to itself.
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await lives(server)
                    return


async def test_a_thousand_calls_given_up_in_time_are_no_attack() -> None:
    begun = asyncio.Event()
    waiting = 0

    async def hold(request: Any) -> None:
        nonlocal waiting
        if request.text != "wait":
            return
        waiting += 1
        if waiting == 300:
            begun.set()
        await asyncio.Event().wait()

    async with serving(echo_service(EchoServicer(hold))) as server, connected(server.address) as raw:
        wait = framed(Text(text="wait").SerializeToString())
        for _ in range(3):
            streams = [await raw.open(request(), wait) for _ in range(300)]
            await begun.wait()
            waiting = 0
            begun.clear()
            await asyncio.sleep(0.03)  # older than a rapid reset is
            for stream in streams:
                raw.http.reset_stream(stream, 8)
            await raw.send()
        assert (await raw.call(request(), [framed(HI)])).status == 0


async def test_deadlines_that_end_are_no_attack(each_transport: str) -> None:
    """Calls with 5 ms to live, which their client gives up when these are over, as fast as they come."""
    if each_transport == "grpcio":
        pytest.skip("the bound on resets is the native transport's own")

    async def hold(request: Any) -> None:
        if request.text == "wait":
            await asyncio.Event().wait()

    async with serving(echo_service(EchoServicer(hold))) as server, connected(server.address) as raw:
        wait = framed(Text(text="wait").SerializeToString())
        for _ in range(22):
            streams = [await raw.open(request(grpc_timeout="5m"), wait) for _ in range(80)]
            await asyncio.sleep(0.006)
            for stream in streams:
                with contextlib.suppress(h2.exceptions.StreamClosedError):
                    raw.http.reset_stream(stream, 8)
            await raw.send()
        assert (await raw.call(request(), [framed(HI)])).status == 0
        assert not raw.closed


@pytest.mark.parametrize("kind", ["ping", "settings", "empty data", "continuation", "priority"])
async def test_floods(kind: str, each_transport: str) -> None:
    async with serving(echo_service()) as server, connected(server.address) as raw:
        stream = await raw.open(request(CHAT), end=False)
        one: frames.Frame
        if kind == "ping":
            one = frames.PingFrame(0, opaque_data=b"12345678")
        elif kind == "settings":
            one = frames.SettingsFrame(0, settings={4: 65535})
        elif kind == "empty data":
            one = frames.DataFrame(stream)
        elif kind == "priority":
            one = frames.PriorityFrame(stream + 2, depends_on=0, stream_weight=3)
        else:
            first = frames.HeadersFrame(stream + 2)
            first.data = b""
            await raw.send(first.serialize())
            one = frames.ContinuationFrame(stream + 2)
            one.data = b"\x00\x01a\x7f\x81\x00" + bytes(255)  # a header of 255 zeros, without indexing
        before = rss()
        for _ in range(60):
            await raw.send(one.serialize() * 100)
            await asyncio.sleep(0)
            if raw.writer.is_closing():
                break
        if each_transport == "native":
            await ends(raw)
        await lives(server)
        assert rss() - before < 64 * MIB


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">HBBBI", 0, 5, 0, 0, 1) + b"short",
        bytes(range(256)) * 4,
    ],
    ids=["http 1", "tls", "frame too large", "data before settings", "noise"],
)
async def test_what_is_no_http2_ends_its_connection_only(garbage: bytes) -> None:
    async with serving(echo_service()) as server:
        async with connected(server.address, preface=False) as raw:
            raw.writer.write(garbage)
            reader: Any = raw._reader
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(15):
                    while await reader.read(65536):
                        pass
        await lives(server)


async def test_data_after_the_end_of_a_stream_hurts_nobody_else() -> None:
    async with serving(echo_service()) as server:
        async with connected(server.address) as raw:
            stream = await raw.open(request(), framed(HI))
            late = frames.DataFrame(stream)
            late.data = framed(HI)
            await raw.send(late.serialize())
            await raw.until(lambda: bool(raw.answers[stream].end))
        await lives(server)


async def test_a_slow_reader_slows_only_itself() -> None:
    """Streams whose answers nobody reads beside one that is read, on one connection, then beside another connection."""

    class Flood(EchoServicer):
        async def Expand(self, request: Any, _context: Any) -> AsyncIterator[Any]:
            for _ in range(request.count):
                yield Text(data=bytes(64 * 1024))

    service = echo_service(Flood(), direct={"Unary": echo})
    async with serving(service) as server, connected(server.address) as raw:
        raw.reads = False
        before = rss()
        much = framed(Text(count=10_000).SerializeToString())
        for _ in range(8):
            await raw.open(request("/test.echo.Echo/Expand"), much)
        # One stream's window is 64 KiB, and so is the connection's: eight of them get stuck at once.
        await raw.until(lambda: sum(len(answer.data) for answer in raw.answers.values()) >= 60_000)
        await lives(server)
        await asyncio.sleep(0.3)
        assert rss() - before < 96 * MIB
        raw.http.increment_flow_control_window(1 * MIB)
        answer = await raw.call(request(), [framed(HI)])
        assert (answer.status, answer.data) == (0, framed(HI))


async def test_a_direct_stream_whose_answers_nobody_reads_is_not_read_either(each_transport: str) -> None:
    seen = 0

    def big(calls: Sequence[DirectCall]) -> None:
        nonlocal seen
        for call in calls:
            seen += 1
            call.reply(Text(data=bytes(100_000)).SerializeToString())

    service = echo_service(direct={"Chat": big, "Unary": echo})
    async with serving(service) as server, connected(server.address) as raw:
        raw.reads = False
        stream = await raw.open(request(CHAT), end=False)
        before = rss()
        for _ in range(500):
            if raw.http.local_flow_control_window(stream) < 1000:
                break
            raw.http.send_data(stream, framed(HI))
        await raw.send()
        await raw.until(lambda: len(raw.answers[stream].data) >= 60_000)
        for _ in range(20):
            await lives(server)
        # Of 500 messages no more than the credit, and no more than a few bytes' worth.
        assert seen <= 64 + 2
        assert rss() - before < 64 * MIB


async def test_large_metadata_is_refused_and_small_is_not(each_transport: str) -> None:
    async with serving(echo_service()) as server, connected(server.address) as raw:
        small = ("x-small", "s" * 4000)
        assert (await raw.call(request("/test.echo.Echo/Unary", small), [framed(HI)])).status == 0
        large = [(f"x-large-{number}", "l" * 8000) for number in range(10)]
        answer = await raw.call(request("/test.echo.Echo/Unary", *large), [framed(HI)])
        assert answer.status == 8 if each_transport == "native" else answer.status in (0, 8)
        await lives(server)


async def test_a_bomb_within_the_bounds_of_a_frame() -> None:
    """4 KiB that become 4 MiB: refused by what comes out, not by what goes in."""
    async with serving(echo_service(), limits=Limits(message_bytes_max=MIB)) as server:
        async with connected(server.address) as raw:
            bomb = gzip.compress(Text(data=bytes(4 * MIB)).SerializeToString())
            answer = await raw.call(request("/test.echo.Echo/Unary", ("grpc-encoding", "gzip")), [framed(bomb, 1)])
            assert answer.status == 8
        await lives(server)


async def test_a_peer_that_goes_away_leaves_nothing() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hold(_: Any) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    service = echo_service(EchoServicer(hold))
    async with serving(service) as server:
        async with connected(server.address) as raw:
            await raw.open(request(), framed(HI))
            await begun.wait()
            raw.writer.transport.abort()
            async with asyncio.timeout(10):
                await ended.wait()
        async with asyncio.timeout(10):
            while server._gate.in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


async def test_the_clients_goodbye_lets_its_calls_end() -> None:
    release = asyncio.Event()

    async def hold(_: Any) -> None:
        await release.wait()

    async with serving(echo_service(EchoServicer(hold))) as server, connected(server.address) as raw:
        stream = await raw.open(request(), framed(HI))
        goaway = frames.GoAwayFrame(0, last_stream_id=0, error_code=0)
        await raw.send(goaway.serialize())
        release.set()
        answer = await raw.answer(stream)
        assert answer.status == 0
