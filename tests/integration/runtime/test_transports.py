"""Both transports give the same answers to the same frames; and how one is chosen."""

import asyncio
import dataclasses
import gzip
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from mlmesh_runtime import errors, telemetry
from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.config import ConfigError, Settings, TlsFiles
from mlmesh_runtime.direct import DirectCall
from mlmesh_runtime.limits import Limits
from mlmesh_runtime.telemetry import REGISTRY
from mlmesh_runtime.transport import choose
from tests.support.echo import PROTOS, EchoServicer, Text, echo_service
from tests.support.raw_http2 import Answer, Headers, connected, framed, request
from tests.support.server import serving, settings

HI = Text(text="hi").SerializeToString()
ECHO = framed(HI)
LIE = struct.pack(">BI", 0, 2**31 - 1)
COLLECT, CHAT, EXPAND = (f"/test.echo.Echo/{name}" for name in ("Collect", "Chat", "Expand"))
SAME: dict[str, tuple[Headers, list[bytes]]] = {
    "plain": (request(), [ECHO]),
    "in crumbs": (request(), [ECHO[:3], ECHO[3:6], ECHO[6:]]),
    "end in a frame of its own": (request(), [ECHO, b""]),
    "two messages for one": (request(), [ECHO + ECHO]),
    "gzip": (request("/test.echo.Echo/Unary", ("grpc-encoding", "gzip")), [framed(gzip.compress(HI), 1)]),
    "deflate": (request("/test.echo.Echo/Unary", ("grpc-encoding", "deflate")), [framed(zlib.compress(HI), 1)]),
    "gzip said and not done": (request("/test.echo.Echo/Unary", ("grpc-encoding", "gzip")), [ECHO]),
    "not gzip": (request("/test.echo.Echo/Unary", ("grpc-encoding", "gzip")), [framed(b"what", 1)]),
    "compressed and not said": (request(), [framed(HI, 1)]),
    "no such method": (request("/test.echo.Echo/Nothing"), [ECHO]),
    "no such service": (request("/no.Such/Thing"), [ECHO]),
    "of another kind of message": (request(content_type="application/grpc+proto"), [ECHO]),
    "a timeout that is none": (request(grpc_timeout="5x"), [ECHO]),
    # What is waited for: of an answer at once and a deadline that is over, either may come first.
    "no time at all": (request(grpc_timeout="0S"), [framed(Text(text="wait").SerializeToString())]),
    "no deadline": (request(without="grpc-timeout"), [ECHO]),
    "too large": (request(), [framed(bytes(12_000))]),
    "a length that lies": (request(), [LIE + b"short"]),
    "malformed": (request(), [framed(b"\xff\xff")]),
    "raw metadata": (request("/test.echo.Echo/Unary", ("x-raw-bin", "AAEC/w")), [ECHO]),
    "raw metadata that is none": (request("/test.echo.Echo/Unary", ("x-raw-bin", "A$$A")), [ECHO]),
    "an error of the handler": (request(), [framed(Text(text="missing").SerializeToString())]),
    "a fault of the handler": (request(), [framed(Text(text="fault").SerializeToString())]),
    "a stream without messages": (request(CHAT), []),
    "a stream": (request(CHAT), [ECHO + ECHO[:4], ECHO[4:] + ECHO]),
    "a stream that lies": (request(CHAT), [ECHO + LIE]),
    "a stream with an error": (request(CHAT), [ECHO + framed(Text(text="missing").SerializeToString())]),
    "nothing to collect": (request(COLLECT), []),
    "collected": (request(COLLECT), [ECHO, ECHO]),
    "expanded": (request(EXPAND), [framed(Text(count=3, text="e").SerializeToString())]),
}
# Where grpcio does not do what the protocol asks: (grpcio, native), as grpc-status or what became of the stream.
OTHERWISE: dict[str, tuple[Headers, list[bytes], object, object]] = {
    "an unknown compression": (request("/test.echo.Echo/Unary", ("grpc-encoding", "snappy")), [framed(HI, 1)], 13, 12),
    "an unknown flag": (request(), [framed(HI, 7)], 0, 13),
    "a stream that is cut off": (request(CHAT), [ECHO + ECHO[:-1]], 0, 13),
    "another protocol": (request(content_type="text/plain"), [ECHO], 0, "415"),
    "another verb": (request(method="GET"), [ECHO], "reset 2", "405"),
    # grpcio waits for the rest until the deadline.
    "no message": (request(grpc_timeout="300m"), [], 4, 12),
    "cut off": (request(grpc_timeout="300m"), [ECHO[:-1]], 4, 13),
}


# Wording is everyone's own, and what is said of compression goes with the first headers, which these may be.
NOT_COMPARED = {"grpc-message", "grpc-accept-encoding"}


async def hook(message: Any) -> None:
    if message.text == "missing":
        raise errors.NotFound("no such text", reason="TEXT_UNKNOWN", metadata={"name": "missing"})
    if message.text == "fault":
        raise RuntimeError("secret")
    if message.text == "wait":
        await asyncio.Event().wait()


def echo(calls: Sequence[DirectCall]) -> None:
    """Answers what it knows, and hands back the rest."""
    for call in calls:
        raw = call.request
        if raw == HI:
            call.reply(raw)
        elif raw == Text(text="missing").SerializeToString():
            call.fail(errors.NotFound("no such text", reason="TEXT_UNKNOWN", metadata={"name": "missing"}))
        else:
            call.generic()


def outcome(answer: Answer) -> object:
    """All that is told: status, reason, trailers' names, messages."""
    trailers = answer.headers[-1] if answer.headers else {}
    reason = ""
    if details := trailers.get("grpc-status-details-bin"):
        import base64

        status = status_pb2.Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
        info = error_details_pb2.ErrorInfo()
        status.details[0].Unpack(info)
        reason = info.reason
    return answer.status, reason, sorted(set(trailers) - NOT_COMPARED), len(answer.headers), answer.data, answer.end


@pytest.mark.parametrize("lane", ["ordinary", "direct"])
async def test_the_same_frames_have_the_same_answers(lane: str, each_transport: str) -> None:
    """grpcio's answers are the expectation; this runs beside it on each, so a mistake here shows on grpcio."""
    direct = {"Unary": echo, "Chat": echo} if lane == "direct" else {}
    service = echo_service(EchoServicer(hook), direct=direct)
    limits = Limits(message_bytes_max=10_000)
    async with (
        serving(service, limits=limits, transport="grpcio") as expected,
        serving(service, limits=limits, transport=each_transport) as server,
    ):
        for name, (headers, chunks) in SAME.items():
            if lane == "direct" and name == "a stream that lies":
                continue  # grpcio ends the call as soon as it sees the lie, before or after the answer
            found = []
            for address in (expected.address, server.address):
                async with connected(address) as raw:
                    found.append(outcome(await raw.call(headers, chunks)))
            assert found[1] == found[0], name


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("answered", [0, 1])
async def test_the_end_of_a_stream_waits_for_a_caller_that_still_sends(
    answered: int, direct: bool, each_transport: str
) -> None:
    """grpc.aio's client would tell of its own write that failed; and a caller that never ends its side is told too."""
    refused = asyncio.Event()

    async def refuse(message: Any) -> None:
        if message.text == "missing":
            refused.set()
            await hook(message)

    def refuse_direct(calls: Sequence[DirectCall]) -> None:
        echo(calls)
        if any(call.request != HI for call in calls):
            refused.set()

    bad = framed(Text(text="missing").SerializeToString())
    service = echo_service(EchoServicer(refuse), direct={"Chat": refuse_direct} if direct else {})
    async with serving(service, transport=each_transport) as server, connected(server.address) as raw:
        waited = False
        for _ in range(50):  # on a busy machine the moment may be over before this looks
            refused.clear()
            stream = await raw.open(request(CHAT), *[ECHO] * answered, bad, end=False)
            await refused.wait()
            ended = await raw.until(lambda found=raw.answers[stream]: bool(found.end), timeout_s=0.004)
            if not ended:
                raw.http.send_data(stream, ECHO, end_stream=True)
                await raw.send()
            answer = await raw.answer(stream)
            assert (answer.status, answer.data) == (grpc.StatusCode.NOT_FOUND.value[0], ECHO * answered)
            if waited := not ended:
                break
        assert waited
        answer = await raw.answer(await raw.open(request(CHAT), bad, end=False))
        assert answer.status == grpc.StatusCode.NOT_FOUND.value[0]


async def test_where_they_differ(each_transport: str) -> None:
    place = ["grpcio", "native"].index(each_transport)
    async with serving(echo_service(), transport=each_transport) as server:
        for name, (headers, chunks, *expected) in OTHERWISE.items():
            async with connected(server.address) as raw:
                answer = await raw.call(headers, chunks)
            told = answer.status if answer.status is not None else (answer.http_status or answer.end)
            if each_transport == "grpcio" and told == "":
                told = 4  # no answer at all
            assert told == expected[place], name


async def test_a_sampled_direct_call_has_its_span(each_transport: str) -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    seen: list[object] = []

    def look(calls: Sequence[DirectCall]) -> None:
        for call in calls:
            seen.append(telemetry.sampled())
            call.reply(call.request)

    exporter = InMemorySpanExporter()
    running = telemetry.Telemetry.start(Settings(service="test"), exporter=exporter)
    try:
        async with (
            serving(echo_service(direct={"Unary": look}), transport=each_transport) as server,
            open_channel(server.address) as channel,
        ):
            stub = PROTOS.stub(channel)
            for flags in ("00", "01"):
                parent = f"00-{'a' * 32}-{'b' * 16}-{flags}"
                await stub.Unary(Text(text="x"), metadata=(("traceparent", parent),))
        assert await asyncio.to_thread(running.flush)
        spans = exporter.get_finished_spans()
    finally:
        running.shutdown()
    assert seen == [False, True]
    assert [span.name for span in spans] == ["test.echo.Echo/Unary"]
    assert format(spans[0].parent.span_id, "x") == "b" * 16  # type: ignore[union-attr]


async def test_large_messages_pass_whole(each_transport: str) -> None:
    def pieces(calls: Sequence[DirectCall]) -> None:
        for call in calls:
            raw = call.request
            view = memoryview(raw)
            call.reply(raw[:100], bytearray(raw[100:50_000]), view[50_000:3_000_000], view[3_000_000:])

    data = bytes(range(256)) * (15 * 4096)
    async with (
        serving(echo_service(direct={"Unary": pieces, "Chat": pieces}), transport=each_transport) as server,
        open_channel(server.address) as channel,
    ):
        stub = PROTOS.stub(channel)
        assert (await stub.Unary(Text(data=data))).data == data
        stream = stub.Chat(iter_of(Text(data=data), 3))
        assert [answer.data == data for answer in [a async for a in stream]] == [True] * 3


async def iter_of(message: Any, count: int) -> Any:
    for _ in range(count):
        yield message


async def test_the_choice_is_told(caplog: pytest.LogCaptureFixture, each_transport: str) -> None:
    with caplog.at_level("INFO", logger="mlmesh_runtime.server"):
        async with serving(echo_service(), transport=each_transport):
            pass
    listening: Any = next(record for record in caplog.records if record.message == "listening")
    assert listening.transport == each_transport
    labels = {"transport": each_transport, "reason": "asked for"}
    assert REGISTRY.get_sample_value("mlmesh_server_transport_info", labels) == 1


TLS = TlsFiles(cert=Path("c"), key=Path("k"), ca=Path("a"))


@pytest.mark.parametrize(
    ("transport", "installed", "changes", "expected"),
    [
        ("grpcio", True, {}, "grpcio"),
        ("native", True, {}, "native"),
        ("native", False, {}, r"MLMESH_TRANSPORT: native needs the module mlmesh_front"),
        ("native", True, {"tls": TLS}, r"MLMESH_TRANSPORT: native has no TLS"),
        ("auto", True, {}, "native"),
        ("auto", False, {}, "grpcio"),
        ("auto", True, {"tls": TLS}, "grpcio"),
        ("auto", True, {"listen": "unix:/tmp/x"}, "grpcio"),
    ],
)
def test_which_transport_serves(transport: str, installed: bool, changes: dict[str, Any], expected: str) -> None:
    wanted = dataclasses.replace(settings(), transport=transport, **changes)
    if expected.startswith("MLMESH"):
        with pytest.raises(ConfigError, match=expected):
            choose(wanted, installed=lambda: installed)
        return
    choice = choose(wanted, installed=lambda: installed)
    assert choice.name == expected
    assert choice.reason


def test_many_observations_are_what_single_ones_are() -> None:
    from prometheus_client import CollectorRegistry, Histogram

    registry = CollectorRegistry()
    bounds = (0.1, 1.0, 10.0)
    one = Histogram("one", "One by one.", buckets=bounds, registry=registry)
    many = Histogram("many", "All at once.", buckets=bounds, registry=registry)
    for value in (0.1, 0.5, 0.7, 20.0):
        one.observe(value)
    telemetry.observe_many(many, [1, 2, 0, 1], 21.3)
    for suffix in ("_sum", "_count"):
        assert registry.get_sample_value(f"many{suffix}") == pytest.approx(registry.get_sample_value(f"one{suffix}"))
    for bound in ("0.1", "1.0", "10.0", "+Inf"):
        found = [registry.get_sample_value(f"{name}_bucket", {"le": bound}) for name in ("one", "many")]
        assert found[0] == found[1]


def test_the_native_histogram_is_the_runtimes() -> None:
    front = pytest.importorskip("mlmesh_front", reason="the native transport is not built (make front)")
    assert [*front.BUCKETS, float("inf")] == list(telemetry.RPC_SECONDS._upper_bounds or telemetry.RPC_SECONDS._kwargs)


async def test_codes_are_grpcs(each_transport: str) -> None:
    """Every status that a handler may set arrives as it is."""

    class Coded(EchoServicer):
        async def Unary(self, request: Any, context: Any) -> Any:
            code = next(code for code in grpc.StatusCode if code.value[0] == request.count)
            context.set_trailing_metadata((("x-text", "é is not ascii".encode().hex()), ("x-raw-bin", b"\x00\xff")))
            await context.abort(code, "a text: ü, %, and \n")

    async with (
        serving(echo_service(Coded()), transport=each_transport) as server,
        open_channel(server.address) as channel,
    ):
        for code in list(grpc.StatusCode)[1:]:
            call = PROTOS.stub(channel).Unary(Text(count=code.value[0]))
            assert await call.code() is code
            assert await call.details() == "a text: ü, %, and \n"
            assert ("x-raw-bin", b"\x00\xff") in tuple(await call.trailing_metadata())
