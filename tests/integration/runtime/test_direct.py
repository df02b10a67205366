"""The direct lane: calls and messages answered in bursts, with everything around a call as for any other method."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
import pytest

from mlmesh_runtime.calls import CURRENT
from mlmesh_runtime.channel import open_channel
from mlmesh_runtime.direct import CREDIT, DirectCall
from mlmesh_runtime.errors import InvalidInput, MeshError, NotReady
from mlmesh_runtime.limits import Limits
from mlmesh_runtime.telemetry import REGISTRY
from tests.integration.runtime.test_calls import refused, requests
from tests.support.echo import PROTOS, EchoServicer, Text, echo_service
from tests.support.server import serving

pytestmark = pytest.mark.usefixtures("each_transport")


class Later:
    """A direct method that answers nothing by itself: the test looks at what came, and answers."""

    def __init__(self) -> None:
        self.calls: list[DirectCall] = []
        self._came = asyncio.Event()

    def __call__(self, calls: Sequence[DirectCall]) -> None:
        self.calls.extend(calls)
        self._came.set()

    async def came(self, count: int) -> list[DirectCall]:
        """Wait until this many came."""
        async with asyncio.timeout(30):
            while len(self.calls) < count:
                self._came.clear()
                await self._came.wait()
        return self.calls


def by_text(**actions: Callable[[DirectCall, Any], None]) -> Callable[[Sequence[DirectCall]], None]:
    """A direct method that does what the request's text names, and echoes what names nothing."""

    def method(calls: Sequence[DirectCall]) -> None:
        for call in calls:
            if call.done():
                continue
            request = Text.FromString(call.request)
            action = actions.get(request.text.partition(":")[0])
            if action is not None:
                action(call, request)
            else:
                call.reply(request.SerializeToString())

    return method


def fail(call: DirectCall, request: Any) -> None:
    call.fail(InvalidInput("text: not this one", field="text", reason="NOT_THIS"))


def generic(call: DirectCall, request: Any) -> None:
    call.generic()


class Ordinary(EchoServicer):
    """Answers so that one sees that it was not the direct method."""

    async def Unary(self, request: Any, _context: Any) -> Any:
        self.calls += 1
        return Text(text=f"ordinary {request.text}")

    async def Chat(self, requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        self.calls += 1
        async for request in requests:
            yield Text(text=f"ordinary {request.text}")


def metric(name: str, method: str, **labels: str) -> float:
    kind = "unary" if method == "Unary" else "bidi_stream"
    labels = {"grpc_type": kind, "grpc_service": "test.echo.Echo", "grpc_method": method, **labels}
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_a_unary_call_is_answered_in_pieces_or_refused() -> None:
    def pieces(call: DirectCall, request: Any) -> None:
        raw = Text(text="in pieces", data=b"x" * 100_000).SerializeToString()
        call.reply(raw[:5], bytearray(raw[5:50_000]), memoryview(raw)[50_000:])

    async with (
        serving(echo_service(direct={"Unary": by_text(pieces=pieces, fail=fail)})) as server,
        open_channel(server.address) as channel,
    ):
        before = metric("grpc_server_handled_total", "Unary", grpc_code="OK")
        stub = PROTOS.stub(channel)
        assert (await stub.Unary(Text(text="plain"))).text == "plain"
        answer = await stub.Unary(Text(text="pieces"))
        assert (answer.text, len(answer.data)) == ("in pieces", 100_000)
        code, error = await refused(stub.Unary(Text(text="fail")))
        assert (code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NOT_THIS")
        assert metric("grpc_server_handled_total", "Unary", grpc_code="OK") == before + 2
        assert metric("grpc_server_handled_total", "Unary", grpc_code="INVALID_ARGUMENT") >= 1


async def test_a_stream_keeps_the_order_of_its_requests() -> None:
    later = Later()
    async with serving(echo_service(direct={"Chat": later})) as server, open_channel(server.address) as channel:
        stream = PROTOS.stub(channel).Chat(requests("a", "b", "c"))
        calls = await later.came(3)
        assert all(call.streaming and not call.done() for call in calls)
        calls[2].reply(Text(text="C").SerializeToString())
        calls[1].send(Text(text="B1").SerializeToString())
        calls[1].send(Text(text="B2").SerializeToString())
        calls[1].finish()
        calls[0].reply(Text(text="A").SerializeToString())
        assert [message.text async for message in stream] == ["A", "B1", "B2", "C"]
        assert calls[0].done()


async def test_a_failed_message_ends_the_stream_after_the_answers_before_it() -> None:
    later = Later()
    async with serving(echo_service(direct={"Chat": later})) as server, open_channel(server.address) as channel:
        stream = PROTOS.stub(channel).Chat(requests("a", "b", "c"))
        calls = await later.came(3)
        calls[1].fail(InvalidInput("wrong", reason="NOT_THIS"))
        calls[2].reply(Text(text="never").SerializeToString())
        calls[0].reply(Text(text="A").SerializeToString())
        assert (await stream.read()).text == "A"
        code, error = await refused(stream.read())
        assert (code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NOT_THIS")


async def test_what_is_handed_back_is_answered_by_the_ordinary_method() -> None:
    servicer = Ordinary()
    method = by_text(generic=generic)
    async with (
        serving(echo_service(servicer, direct={"Unary": method, "Chat": method})) as server,
        open_channel(server.address) as channel,
    ):
        stub = PROTOS.stub(channel)
        assert (await stub.Unary(Text(text="generic"))).text == "ordinary generic"
        answers = [m.text async for m in stub.Chat(requests("a", "b", "generic", "c", "d"))]
        assert answers == ["a", "b", "ordinary generic", "ordinary c", "ordinary d"]
        assert servicer.calls == 2


async def test_a_call_knows_its_metadata_deadline_and_peer() -> None:
    later = Later()
    method = {"Unary": later, "Chat": later}
    async with serving(echo_service(direct=method)) as server, open_channel(server.address) as channel:
        stub = PROTOS.stub(channel)
        metadata = (("x-one", "1"), ("x-two", "a"), ("x-two", "b"), ("x-raw-bin", b"\x00\xff"))
        unary = stub.Unary(Text(text="u"), timeout=20, metadata=metadata)
        call = (await later.came(1))[0]
        stream = stub.Chat(requests("s"), timeout=20, metadata=metadata)
        message = (await later.came(2))[1]
        for one in (call, message):
            assert (one.metadata("x-one"), one.metadata("x-two"), one.metadata("x-none")) == ("1", "b", None)
            context = one.context()
            assert ("x-raw-bin", b"\x00\xff") in context.metadata
            assert context.context.peer().startswith("ipv4:127.0.0.1:")
            assert context.deadline == pytest.approx(one.deadline_ns / 1e9, abs=0.1)
            assert 15e9 < one.deadline_ns - asyncio.get_running_loop().time() * 1e9 < 21e9
            one.reply(one.request)
        assert (await unary).text == "u"
        assert [m.text async for m in stream] == ["s"]
        assert CURRENT.get() is None


async def test_the_deadline_and_the_limits_hold() -> None:
    later = Later()
    service = echo_service(direct={"Unary": later, "Chat": later})
    async with (
        serving(service, limits=Limits(concurrent_rpcs_max=2)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stub = PROTOS.stub(channel)
        for call in (stub.Unary(Text()), stub.Chat(requests("a"))):
            _, error = await refused(call)
            assert error.reason == "DEADLINE_REQUIRED"
        first, second = stub.Unary(Text(text="1"), timeout=60), stub.Chat(requests("2"), timeout=60)
        taken = await later.came(2)
        for more in (stub.Unary(Text(), timeout=60), stub.Chat(requests("a"), timeout=60)):
            _, error = await refused(more)
            assert error.reason == "TOO_MANY_RPCS"
        later.calls[0 if later.calls[1].streaming else 1].reply(Text(text="1").SerializeToString())
        assert (await first).text == "1"
        code, _ = await refused(stub.Unary(Text(text="hasty"), timeout=0.2))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        for late in later.calls[2:]:  # none where the server was not reached in time
            while not late.done():  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            late.reply(b"too late")
        before = len(later.calls)
        third = stub.Unary(Text(text="3"), timeout=60)
        calls = await later.came(before + 1)
        calls[before].reply(calls[before].request)
        assert (await third).text == "3"
        second.cancel()
        streamed = next(call for call in taken if call.streaming)
        while not streamed.done():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        streamed.reply(b"nobody")


async def test_a_stream_gives_so_much_credit_and_no_more() -> None:
    later = Later()
    async with serving(echo_service(direct={"Chat": later})) as server, open_channel(server.address) as channel:
        stream = PROTOS.stub(channel).Chat(requests(*(str(n) for n in range(3 * CREDIT))))
        calls = await later.came(CREDIT)
        assert len(calls) == CREDIT
        for number in range(3 * CREDIT):
            assert len(calls) <= number + CREDIT
            call = (await later.came(number + 1))[number]
            call.reply(call.request)
        assert [m.text async for m in stream] == [str(n) for n in range(3 * CREDIT)]


async def test_draining_ends_a_stream_after_what_was_read() -> None:
    def farewell() -> MeshError:
        return NotReady("until next time", reason="FAREWELL")

    later = Later()
    service = echo_service(direct={"Chat": later}, going_away=farewell)
    async with serving(service) as server, open_channel(server.address) as channel:
        stream = PROTOS.stub(channel).Chat(timeout=20)
        await stream.write(Text(text="a"))
        call = (await later.came(1))[0]
        stopping = asyncio.ensure_future(server.stop(drain_s=0, grace_s=10))
        await server.draining.wait()
        await asyncio.sleep(0)
        call.reply(call.request)
        assert (await stream.read()).text == "a"
        code, error = await refused(stream.read())
        assert (code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "FAREWELL")
        await stopping


async def test_a_silent_stream_is_ended() -> None:
    later = Later()
    service = echo_service(direct={"Chat": later})
    async with (
        serving(service, limits=Limits(stream_idle_s=0.1)) as server,
        open_channel(server.address) as channel,
    ):
        stream = PROTOS.stub(channel).Chat(timeout=20)
        code, error = await refused(stream)
        assert (code, error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "STREAM_IDLE")


async def test_a_direct_method_that_raises_is_an_internal_error() -> None:
    def broken(calls: Sequence[DirectCall]) -> None:
        raise RuntimeError("secret")

    async with (
        serving(echo_service(direct={"Unary": broken, "Chat": broken})) as server,
        open_channel(server.address) as channel,
    ):
        stub = PROTOS.stub(channel)
        for call in (stub.Unary(Text()), stub.Chat(requests("a"))):
            code, error = await refused(call)
            assert code is grpc.StatusCode.INTERNAL
            assert "secret" not in error.message


def test_a_method_must_exist_and_stream_both_ways_or_not_at_all() -> None:
    from mlmesh_runtime.server import Server
    from tests.support.server import settings

    for name in ("Nothing", "Expand"):
        server = Server(settings(), [echo_service(direct={name: Later()})])
        with pytest.raises(ValueError, match=name):
            asyncio.run(server.__aenter__())
