"""What happens around a call: deadlines, errors, malformed and oversized messages, limits, on a real server."""

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from mlmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from mlmesh_runtime import calls, errors
from mlmesh_runtime.channel import NO_DEADLINE, mesh_error, open_channel
from mlmesh_runtime.limits import Limits
from mlmesh_runtime.server import Service
from tests.support.echo import PROTOS, EchoServicer, Text, echo_service
from tests.support.server import serving

pytestmark = pytest.mark.usefixtures("each_transport")

BOMB_BYTES = 64 * 1024 * 1024
# grpc-timeout travels with few digits, rounded up: in whole seconds from about 100 s.
ROUNDING_S = 1.0


async def finished(call: Any) -> None:
    """Wait for the end of a call of any kind."""
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


async def refused(call: Any) -> tuple[grpc.StatusCode, errors.MeshError]:
    """The status and typed error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finished(call)
    return caught.value.code(), mesh_error(caught.value)


async def requests(*texts: str) -> AsyncIterator[Any]:
    for text in texts:
        yield Text(text=text)


def every_kind(stub: Any, **kwargs: Any) -> dict[str, Any]:
    """One call of each of the four kinds."""
    return {
        "Unary": stub.Unary(Text(text="a"), **kwargs),
        "Collect": stub.Collect(requests("a"), **kwargs),
        "Expand": stub.Expand(Text(text="a", count=1), **kwargs),
        "Chat": stub.Chat(requests("a"), **kwargs),
    }


async def test_all_four_kinds_answer() -> None:
    async with serving(echo_service()) as server, open_channel(server.address) as channel:
        stub = PROTOS.stub(channel)
        assert (await stub.Unary(Text(text="hello"))).text == "hello"
        assert (await stub.Collect(requests("a", "b", "c"))).text == "abc"
        assert [m.count async for m in stub.Expand(Text(count=3))] == [0, 1, 2]
        assert [m.text async for m in stub.Chat(requests("x", "y"))] == ["x", "y"]


async def test_handlers_may_read_and_write_by_themselves() -> None:
    class Writer(EchoServicer):
        async def Chat(self, _requests: Any, context: Any) -> None:  # type: ignore[override]
            while (request := await context.read()) is not grpc.aio.EOF:
                await context.write(Text(text=request.text.upper()))
            context.set_trailing_metadata((("x-end", "yes"),))

    async with serving(echo_service(Writer())) as server, open_channel(server.address) as channel:
        call = PROTOS.stub(channel).Chat(requests("x", "y"))
        assert [m.text async for m in call] == ["X", "Y"]
        assert ("x-end", "yes") in tuple(await call.trailing_metadata())


async def test_a_deadline_is_required_of_every_kind_but_watches() -> None:
    servicer = EchoServicer()
    async with serving(echo_service(servicer)) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = PROTOS.stub(channel)
        for call in every_kind(stub).values():
            code, error = await refused(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert error.reason == "DEADLINE_REQUIRED"
        assert servicer.calls == 0
        assert [m.text async for m in stub.Watch(Text(text="w"))] == ["w"]


async def test_a_public_protocols_method_may_come_without_a_deadline() -> None:
    service = echo_service(deadline_exempt=set(), deadline_optional={"Unary", "Chat"})
    async with serving(service) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = PROTOS.stub(channel)
        assert (await stub.Unary(Text(text="no hurry"))).text == "no hurry"
        assert [m.text async for m in stub.Chat(requests("a"))] == ["a"]
        _, error = await refused(stub.Watch(Text()))
        assert error.reason == "DEADLINE_REQUIRED"


async def test_an_outgoing_call_has_at_most_what_its_caller_has_left() -> None:
    left: dict[str, float | None] = {}

    async def inner(request: Any) -> None:
        left[request.text] = calls.remaining_s()

    async with serving(echo_service(EchoServicer(inner))) as second, open_channel(second.address) as onward:

        async def outer(request: Any) -> None:
            stub = PROTOS.stub(onward)
            await stub.Unary(Text(text="default"))
            await stub.Unary(Text(text="longer"), timeout=100)
            await stub.Unary(Text(text="shorter"), timeout=10)
            await stub.Unary(Text(text="endless"), timeout=NO_DEADLINE)
            with calls.detached():
                await stub.Unary(Text(text="detached"), timeout=100)

        async with (
            serving(echo_service(EchoServicer(outer))) as first,
            open_channel(first.address, default_deadline_s=50) as channel,
        ):
            await PROTOS.stub(channel).Unary(Text(text="x"), timeout=25)
    for name in ("default", "longer", "endless"):
        assert 15 < (left[name] or 0) <= 25 + ROUNDING_S, name
    assert 1 < (left["shorter"] or 0) <= 10.1
    assert 90 < (left["detached"] or 0) <= 100 + ROUNDING_S


async def test_a_call_without_timeout_gets_the_default() -> None:
    left: list[float | None] = []

    async def look(_: Any) -> None:
        left.append(calls.remaining_s())

    async with (
        serving(echo_service(EchoServicer(look))) as server,
        open_channel(server.address, default_deadline_s=70) as channel,
    ):
        await PROTOS.stub(channel).Unary(Text())
        [_ async for _ in PROTOS.stub(channel).Chat(requests("a"))]
    assert all(60 < (seconds or 0) <= 70 + ROUNDING_S for seconds in left)
    assert len(left) == 2


@pytest.mark.parametrize("kind", ["Unary", "Collect", "Expand", "Chat"])
async def test_an_unexpected_error_tells_nothing_but_a_log_id(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def leak(_: Any) -> None:
        raise RuntimeError("password=hunter2")

    async with serving(echo_service(EchoServicer(leak))) as server, open_channel(server.address) as channel:
        with caplog.at_level(logging.ERROR):
            call = every_kind(PROTOS.stub(channel))
            code, error = await refused(call[kind])
            for other in call.values():
                other.cancel()
    assert code is grpc.StatusCode.INTERNAL
    assert error.reason == "INTERNAL"
    assert error.message == f"internal error; log id {error.metadata['log_id']}"
    entry = next(r for r in caplog.records if getattr(r, "log_id", "") == error.metadata["log_id"])
    assert entry.exc_info is not None
    assert "hunter2" in str(entry.exc_info[1])


@pytest.mark.parametrize("kind", ["Unary", "Collect", "Expand", "Chat"])
async def test_a_domain_error_is_told_with_reason_and_details(kind: str) -> None:
    async def missing(_: Any) -> None:
        raise errors.NotFound("no model mnist", reason="MODEL_NOT_FOUND", metadata={"model": "mnist"})

    async with serving(echo_service(EchoServicer(missing))) as server, open_channel(server.address) as channel:
        call = every_kind(PROTOS.stub(channel))
        code, error = await refused(call[kind])
        for other in call.values():
            other.cancel()
    assert code is grpc.StatusCode.NOT_FOUND
    assert (error.reason, error.message, dict(error.metadata)) == (
        "MODEL_NOT_FOUND",
        "no model mnist",
        {"model": "mnist"},
    )


async def test_an_error_out_of_a_task_group_is_the_error_itself() -> None:
    async def fail() -> None:
        raise errors.Conflict("somebody was faster", reason="ETAG_MISMATCH")

    async def in_group(_: Any) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(60))
            group.create_task(fail())

    async with serving(echo_service(EchoServicer(in_group))) as server, open_channel(server.address) as channel:
        code, error = await refused(PROTOS.stub(channel).Unary(Text()))
    assert (code, error.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")


async def test_a_leaked_cancellation_is_an_error_not_silence(caplog: pytest.LogCaptureFixture) -> None:
    async def leak(_: Any) -> None:
        raise asyncio.CancelledError

    async with serving(echo_service(EchoServicer(leak))) as server, open_channel(server.address) as channel:
        code, _ = await refused(PROTOS.stub(channel).Unary(Text(), timeout=20))
    assert code is grpc.StatusCode.INTERNAL


async def test_abort_of_a_handler_passes_as_it_is() -> None:
    class Aborting(EchoServicer):
        async def Unary(self, _request: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not you")

    async with serving(echo_service(Aborting())) as server, open_channel(server.address) as channel:
        code, error = await refused(PROTOS.stub(channel).Unary(Text()))
    assert (code, error.message) == (grpc.StatusCode.PERMISSION_DENIED, "not you")


async def test_a_method_not_written_is_unimplemented() -> None:
    service = Service(
        add=registry_pb2_grpc.add_ModelRegistryServiceServicer_to_server,
        servicer=registry_pb2_grpc.ModelRegistryServiceServicer(),
        descriptor=registry_pb2.DESCRIPTOR.services_by_name["ModelRegistryService"],
    )
    async with serving(service) as server, open_channel(server.address) as channel:
        stub: Any = registry_pb2_grpc.ModelRegistryServiceStub(channel)
        code, error = await refused(stub.GetModel(registry_pb2.GetModelRequest(name="models/m")))
        assert (code, error.reason) == (grpc.StatusCode.UNIMPLEMENTED, "METHOD_NOT_IMPLEMENTED")
        code, error = await refused(stub.GetModel(registry_pb2.GetModelRequest(name="nonsense")))
        assert (code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert isinstance(error, errors.InvalidInput)
        assert error.field == "name"
        code, _ = await refused(channel.unary_unary("/no.Such/Method")(b""))
        assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_wrong_response_is_our_fault_and_tells_nothing() -> None:
    class Wrong(EchoServicer):
        async def Unary(self, _request: Any, _context: Any) -> str:
            return "secret, and not a message"

    async with serving(echo_service(Wrong())) as server, open_channel(server.address) as channel:
        code, error = await refused(PROTOS.stub(channel).Unary(Text()))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in error.message


async def test_malformed_messages_are_refused_before_the_handler() -> None:
    servicer = EchoServicer()

    async def garbage() -> AsyncIterator[bytes]:
        yield b"\xff\xff\xffpassword"

    async with serving(echo_service(servicer)) as server, open_channel(server.address) as channel:
        for name in ("Unary", "Expand"):
            code, error = await refused(PROTOS.raw(channel, name)(b"\xff\xff\xffpassword"))
            assert (code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")
            assert "password" not in error.message
        assert servicer.calls == 0
        for name in ("Collect", "Chat"):
            code, error = await refused(PROTOS.raw(channel, name)(garbage()))
            assert (code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE")


async def test_oversized_messages_and_bombs_are_refused_before_the_handler() -> None:
    servicer = EchoServicer()
    limits = Limits(message_bytes_max=1024 * 1024)
    async with (
        serving(echo_service(servicer), limits=limits) as server,
        grpc.aio.insecure_channel(server.address, options=[("grpc.max_send_message_length", -1)]) as channel,
    ):
        stub = PROTOS.stub(channel)
        code, _ = await refused(stub.Unary(Text(data=bytes(2 * 1024 * 1024)), timeout=20))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        bomb = Text(data=bytes(BOMB_BYTES))
        assert len(gzip.compress(bomb.SerializeToString(), 1)) < limits.message_bytes_max
        code, _ = await refused(stub.Unary(bomb, timeout=20, compression=grpc.Compression.Gzip))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert servicer.calls == 0
        assert (await stub.Unary(Text(text="still here"), timeout=20)).text == "still here"


async def test_a_client_that_goes_frees_everything_at_once() -> None:
    ended = asyncio.Event()

    class Holding(EchoServicer):
        def Expand(self, request: Any, _context: Any) -> AsyncIterator[Any]:
            self.kept = self.produce()  # a generator that nobody collects must be closed by its caller
            return self.kept

        async def produce(self) -> AsyncIterator[Any]:
            try:
                while True:
                    yield Text(data=bytes(100_000))
            finally:
                await asyncio.sleep(0)
                ended.set()

    limits = Limits(streams_per_peer_max=1)
    async with serving(echo_service(Holding()), limits=limits) as server, open_channel(server.address) as channel:
        call = PROTOS.stub(channel).Expand(Text(), timeout=60)
        await call.read()
        call.cancel()
        await asyncio.wait_for(ended.wait(), 30)
        # Its place is given back as well: with a bound of one the next stream is let in.
        assert [m.text async for m in PROTOS.stub(channel).Chat(requests("next"))] == ["next"]


async def test_a_missed_deadline_cancels_the_handler() -> None:
    cancelled = asyncio.Event()

    async def hang(_: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with serving(echo_service(EchoServicer(hang))) as server, open_channel(server.address) as channel:
        code, error = await refused(PROTOS.stub(channel).Unary(Text(), timeout=0.1))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert isinstance(error, errors.TimedOut)
        await asyncio.wait_for(cancelled.wait(), 30)


async def test_a_full_server_refuses_at_once_and_still_answers_health() -> None:
    release, begun = asyncio.Event(), asyncio.Semaphore(0)

    async def hold(_: Any) -> None:
        begun.release()
        await release.wait()

    limits = Limits(concurrent_rpcs_max=2, retry_after_s=0.5)
    async with (
        serving(echo_service(EchoServicer(hold)), limits=limits) as server,
        open_channel(server.address) as channel,
    ):
        stub = PROTOS.stub(channel)
        held = [asyncio.ensure_future(_await(stub.Unary(Text(text="held")))) for _ in range(2)]
        for _ in held:
            await begun.acquire()
        code, error = await refused(stub.Unary(Text(text="one too many")))
        assert (code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_RPCS")
        assert error.retry_after_s == 0.5
        health = await channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
        assert health == b"\x08\x01"
        release.set()
        assert [(await call).text for call in held] == ["held", "held"]
        assert (await stub.Unary(Text(text="again"))).text == "again"


async def _await(call: Any) -> Any:
    return await call


async def test_streams_of_one_peer_are_bounded_and_given_back() -> None:
    async with (
        serving(echo_service(), limits=Limits(streams_per_peer_max=2)) as server,
        open_channel(server.address) as channel,
    ):
        stub = PROTOS.stub(channel)
        held = [stub.Chat() for _ in range(2)]
        for call in held:
            await call.write(Text(text="open"))
            await call.read()
        code, error = await refused(stub.Chat(requests("third")))
        assert (code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_STREAMS")
        assert (await stub.Unary(Text(text="no stream"))).text == "no stream"
        for call in held:
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        assert [m.text async for m in stub.Chat(requests("now"))] == ["now"]


async def test_an_idle_request_stream_is_ended_and_a_lively_one_is_not() -> None:
    async with (
        serving(echo_service(), limits=Limits(stream_idle_s=0.2)) as server,
        open_channel(server.address) as channel,
    ):
        stub = PROTOS.stub(channel)
        loop = asyncio.get_running_loop()
        lively, began = stub.Chat(), loop.time()
        while loop.time() - began < 0.6:
            await lively.write(Text(text="tick"))
            assert (await lively.read()).text == "tick"
            await asyncio.sleep(0.02)  # the pace of the stream, not a wait for a state
        await lively.done_writing()
        assert await lively.code() is grpc.StatusCode.OK
        silent = stub.Chat()
        await silent.write(Text(text="once"))
        assert (await silent.read()).text == "once"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await silent.read()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert mesh_error(caught.value).reason == "STREAM_IDLE"
