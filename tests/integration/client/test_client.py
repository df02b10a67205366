"""The client library against a real server, on every transport: calls, errors, retries, streams, rows, moving."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from mlmesh_client import (
    AioClient,
    Client,
    InvalidInput,
    NotFound,
    Overloaded,
    Result,
    RetryPolicy,
    ServerError,
    TimedOut,
    Tls,
    Unavailable,
    Unsupported,
)
from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.oip.stream import Streaming
from mlmesh_inference.tokens import Tokens
from mlmesh_runtime.errors import Overloaded as OverloadedHere
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from tests.support import onnx_models
from tests.support.inference import (
    GatedEngine,
    eventually,
    inference_server,
    onnx_engine,
    open_streams,
    ready_model,
    rows,
)
from tests.support.pki import SERVER_NAME, Authority
from tests.support.special_models import Repeating, repeating_model, summing_model

pytestmark = pytest.mark.usefixtures("each_transport")
TIMEOUT_S = 20.0


class Served:
    """A server in this process, and how its streams are moved."""

    def __init__(self, address: str, streaming: Streaming) -> None:
        self.address = address
        self.streaming = streaming

    @contextlib.asynccontextmanager
    async def client(self, **options: Any) -> AsyncIterator[AioClient]:
        async with AioClient(self.address, timeout=TIMEOUT_S, **options) as client:
            yield client


@contextlib.asynccontextmanager
async def served(*models: ReadyModel, tokens: Tokens | None = None, **changes: Any) -> AsyncIterator[Served]:
    catalog = Catalog()
    streaming = Streaming(catalog=catalog, open=open_streams(), tokens=tokens or Tokens())
    async with inference_server(*models, catalog=catalog, streaming=streaming, **changes) as server:
        yield Served(server.address, streaming)


def value(result: Result) -> float:
    return float(result["y"].ravel()[0])


async def blocking(work: Callable[[Client], Any], address: str, **options: Any) -> Any:
    """Run what blocks in a thread, with a client of its own."""

    def run() -> Any:
        with Client(address, timeout=TIMEOUT_S, **options) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def test_tensors_of_every_datatype_go_there_and_back(tmp_path: Path) -> None:
    kinds = [kind for kind in onnx_models.DATATYPES if kind not in {"BF16", "BYTES"}]
    engine = onnx_engine(tmp_path / "model.onnx", onnx_models.identity([*kinds, "BYTES"]))
    given: dict[str, Any] = {f"in_{kind}": [[1, 0]] for kind in kinds if kind != "BOOL"}
    given |= {"in_BOOL": [[True, False]], "in_BYTES": [["é", b"\0"]]}
    async with served(ready_model(engine)) as it, it.client() as client:
        for result in (await client.infer("m", given), await blocking(lambda c: c.infer("m", given), it.address)):
            assert {name: result[name].tolist() for name in result if name != "out_BYTES"} == {
                f"out_{kind}": [[1, 0]] for kind in kinds
            }
            assert result["out_BYTES"].tolist() == [["é".encode(), b"\0"]]
        some = await client.infer("m", given, outputs=["out_INT8"], id="mine")
        assert (list(some), some.id, some.model_version) == (["out_INT8"], "mine", "1")
        with pytest.raises(KeyError, match="no output 'y'"):
            some["y"]


async def test_a_server_and_its_models_are_described() -> None:
    engine = GatedEngine(is_open=True)

    def look(client: Client) -> list[Any]:
        return [
            client.live(),
            client.ready(),
            client.ready("m"),
            client.ready("m", version="9"),
            client.server().name,
            client.model("m"),
            client.config("m").name,
            [item.name for item in client.statistics()],
        ]

    async with served(ready_model(engine)) as it, it.client() as client:
        seen = await blocking(look, it.address)
        assert seen[:5] == [True, True, True, False, "mlmesh"]
        assert seen[6:] == ["m", ["m"]]
        model = await client.model("m")
        assert model == seen[5]
        assert [str(spec) for spec in model.inputs] == ["x FP32[-1,4]"]
        assert (model.rows_max, model.decoupled, model.batches) == (64, False, True)
        assert (await client.server()).name == "mlmesh"
        assert (await client.config("m")).max_batch_size == 64
        assert await client.live()
        assert repr(client) == f"<AioClient {it.address}>"


async def test_errors_say_what_is_wrong_and_where() -> None:
    engine = GatedEngine(is_open=True)
    engine.fail_on = 13.0
    async with served(ready_model(engine, rows_max=2)) as it, it.client() as client:
        with pytest.raises(NotFound) as missing:
            await client.infer("nope", [1.0])
        assert (missing.value.reason, missing.value.code) == ("MODEL_NOT_FOUND", "NOT_FOUND")
        with pytest.raises(InvalidInput) as many:
            await client.infer("m", rows(1, 2, 3))
        assert (many.value.reason, many.value.field) == ("SHAPE_MISMATCH", "inputs")
        with pytest.raises(ServerError) as failed:
            await client.infer("m", rows(13))
        assert failed.value.reason == "ENGINE_FAILED"
        with pytest.raises(InvalidInput, match="takes shape"):
            await client.infer("m", [[1.0]])

        def same(blocking_client: Client) -> None:
            with pytest.raises(NotFound):
                blocking_client.infer("nope", [1.0])
            with pytest.raises(InvalidInput):
                blocking_client.infer("m", rows(1, 2, 3))

        await blocking(same, it.address)


async def test_a_model_that_changed_is_asked_about_again_before_anything_is_refused() -> None:
    async with served(ready_model(GatedEngine(is_open=True))) as it, it.client() as client:
        await client.infer("m", rows(1))
        key = ("m", "", ())
        known = client._models
        known._known = {name: (at_s - 10, model) for name, (at_s, model) in known._known.items()}
        catalog = it.streaming.catalog
        catalog.install(ready_model(GatedEngine(width=2, is_open=True), version=2), engine="", engine_reason="")
        catalog.point("m", default=2, aliases={})
        assert (await client.infer("m", rows(3, width=2))).model_version == "2"
        assert known.get(*key) is not None


async def test_deadlines_hold() -> None:
    engine = GatedEngine()
    async with served(ready_model(engine, admission=False)) as it, it.client() as client:
        with pytest.raises(TimedOut):
            await client.infer("m", rows(1), timeout=0.2)

        def same(blocking_client: Client) -> None:
            with pytest.raises(TimedOut):
                blocking_client.infer("m", rows(1), timeout=0.2)

        await blocking(same, it.address)
        engine.open()


async def test_nobody_there_is_unavailable_and_not_live() -> None:
    policy = RetryPolicy(attempts=2, first_s=0.001)
    async with AioClient("127.0.0.1:1", timeout=5, retry=policy, chance=random.Random(1)) as client:  # noqa: S311
        with pytest.raises(Unavailable):
            await client.infer("m", rows(1))
        assert not await client.live()
        assert not await client.ready("m")


class Moody(stubs.GRPCInferenceServiceServicer):
    """Refuses as it is told, then answers; knows no configuration, as other servers of the protocol."""

    def __init__(self, *refusals: tuple[grpc.StatusCode, str | None]) -> None:
        self.refusals = list(refusals)
        self.calls = 0

    def ModelMetadata(self, request: Any, context: Any) -> Any:
        reply = pb.ModelMetadataResponse(name=request.name)
        reply.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
        return reply

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.refusals:
            code, pushback = self.refusals.pop(0)
            if pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", pushback),))
            context.abort(code, "refused")
        return pb.ModelInferResponse(model_name=request.model_name, id=request.id)


@contextlib.contextmanager
def moody(*refusals: tuple[grpc.StatusCode, str | None]) -> Any:
    servicer = Moody(*refusals)
    server = grpc.server(ThreadPoolExecutor(2))
    stubs.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield address, servicer
    finally:
        server.stop(None).wait(5)


BUSY, AWAY = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("refusals", "calls"),
    [
        (((AWAY, None), (AWAY, None)), 3),
        (((BUSY, "1"), (AWAY, "1")), 3),
        (((BUSY, None),), 1),
        (((AWAY, "-1"),), 1),
        (((BUSY, "100000"),), 1),
        (((grpc.StatusCode.INTERNAL, None),), 1),
    ],
    ids=["away", "hints", "no hint", "not again", "too late", "internal"],
)
async def test_calls_are_tried_again_where_it_is_safe_and_helps(refusals: Any, calls: int) -> None:
    policy = RetryPolicy(first_s=0.001)
    with moody(*refusals) as (address, servicer):
        async with AioClient(address, timeout=5, retry=policy) as client:
            with contextlib.nullcontext() if calls > 1 else pytest.raises((Overloaded, Unavailable, ServerError)):
                await client.infer("m", rows(1))
        assert servicer.calls == calls
    with moody(*refusals) as (address, servicer):
        fails = contextlib.nullcontext() if calls > 1 else pytest.raises((Overloaded, Unavailable, ServerError))
        with Client(address, timeout=5, retry=policy) as blocking_client, fails:
            await asyncio.to_thread(blocking_client.infer, "m", rows(1))
        assert servicer.calls == calls


async def test_a_full_servers_hint_reaches_the_caller() -> None:
    engine = GatedEngine()
    never = RetryPolicy(attempts=1)
    model = ready_model(engine, queue_items_max=1, admission=False, limiter=False, rows_preferred=1)
    async with served(model) as it, it.client(retry=never) as client:
        first = asyncio.create_task(client.infer("m", rows(1)))
        await engine.begun()
        second = asyncio.create_task(client.infer("m", rows(2)))
        await eventually(lambda: model.runner.depth == 1)
        with pytest.raises(Overloaded) as full:
            await client.infer("m", rows(3))
        assert full.value.reason == "QUEUE_FULL"
        assert full.value.retry_after_s is not None
        engine.open()
        await asyncio.gather(first, second)


async def test_a_stream_comes_back_to_a_full_server_when_it_said() -> None:
    engine = GatedEngine()
    model = ready_model(engine, queue_items_max=1, admission=False, limiter=False, rows_preferred=1)
    async with served(model) as it, it.client() as client, client.stream("m", in_flight=8) as stream:
        for number in range(4):
            await stream.send(rows(float(number)))
        # Answers keep their order on the wire: what was refused is told after what is waited for.
        await eventually(lambda: model.statistics.fail.count == 2)
        engine.open()
        assert [value(await stream.receive(timeout=TIMEOUT_S)) for _ in range(4)] == [0, 2, 4, 6]
        assert stream.resent >= 1


async def test_mutual_tls_and_names(tmp_path: Path, each_transport: str) -> None:
    if each_transport != "grpcio":
        pytest.skip("TLS is grpcio's, whatever the transport")
    authority = Authority()
    leaf = authority.leaf("spiffe://cluster.local/ns/mlmesh/sa/inference")
    files = leaf.write(tmp_path, authority.pem)
    tls = Tls(ca=files.ca, cert=files.cert, key=files.key, server_name=SERVER_NAME)
    async with served(ready_model(GatedEngine(is_open=True)), tls=files) as it:
        async with it.client(tls=tls) as client:
            assert value(await client.infer("m", rows(4))) == 8
        assert await blocking(lambda c: value(c.infer("m", rows(4))), it.address, tls=tls) == 8
        async with it.client(tls=Tls(ca=files.ca, server_name=SERVER_NAME)) as stranger:
            with pytest.raises(Unavailable):
                await stranger.infer("m", rows(4), timeout=20)
    with pytest.raises(ValueError, match="both cert and key"):
        Tls(cert=b"c").credentials()


# Streams.


async def test_results_of_a_stream_come_in_order_with_errors_in_their_place() -> None:
    engine = GatedEngine(is_open=True)
    engine.fail_on = 0.5
    async with served(ready_model(engine)) as it, it.client() as client, client.stream("m", in_flight=8) as stream:
        with pytest.raises(InvalidInput):
            await stream.send([[1.0]])
        numbers = [0.5 if n == 40 else float(n) for n in range(100)]
        results = [result async for result in stream.map(rows(n) for n in numbers)]
        assert [result.id for result in results] == [str(n) for n in range(1, 101)]
        failed = results.pop(40)
        assert isinstance(failed.error, ServerError)
        assert failed.error.reason == "ENGINE_FAILED"
        with pytest.raises(ServerError):
            failed["y"]
        assert [value(result) for result in results] == [2 * n for n in numbers if n != 0.5]
        assert (stream.connections, stream.moves, stream.waiting) == (1, 0, 0)


async def test_a_blocking_stream_does_the_same() -> None:
    engine = GatedEngine(is_open=True)

    def work(client: Client) -> list[Result]:
        with client.stream("m", in_flight=4) as stream:
            results = list(stream.map(rows(float(n)) for n in range(50)))
            assert repr(stream) == "<Stream m open, 0 waiting, 1 connections>"
            return results

    async with served(ready_model(engine)) as it:
        results = await blocking(work, it.address)
    assert [value(result) for result in results] == [2.0 * n for n in range(50)]


async def test_sending_and_receiving_are_bounded() -> None:
    engine = GatedEngine()
    async with served(ready_model(engine, admission=False)) as it:
        async with it.client() as client, client.stream("m", in_flight=2) as stream:
            await stream.send(rows(1), id="a")
            await stream.send(rows(2), id="b")
            with pytest.raises(TimedOut, match="in another task"):
                await stream.send(rows(3), timeout=0.05)
            with pytest.raises(TimedOut, match="no result"):
                await stream.receive(timeout=0.05)
            engine.step()
            engine.step()
            assert (await stream.receive(timeout=TIMEOUT_S)).id == "a"
            await stream.send(rows(3), id="c", timeout=0.05)
            engine.open()
            assert [(await stream.receive()).id, (await stream.receive()).id] == ["b", "c"]

        def same(blocking_client: Client) -> None:
            with blocking_client.stream("m", in_flight=1) as blocking_stream:
                blocking_stream.send(rows(1))
                with pytest.raises(TimedOut):
                    blocking_stream.send(rows(2), timeout=0.05)
                assert value(blocking_stream.receive(timeout=TIMEOUT_S)) == 2
                with pytest.raises(TimedOut):
                    blocking_stream.receive(timeout=0.05)
                blocking_stream.done_sending()
                assert list(blocking_stream) == []
                with pytest.raises(RuntimeError, match="no more requests"):
                    blocking_stream.send(rows(2))

        await blocking(same, it.address)


async def test_streams_move_and_lose_nothing() -> None:
    engine = GatedEngine(is_open=True)
    count = 600
    async with served(ready_model(engine)) as it, it.client() as client, client.stream("m", in_flight=16) as stream:
        moved = 0
        seen = []
        async for result in stream.map(rows(float(n)) for n in range(count)):
            seen.append(value(result))
            if len(seen) % 100 == 50:
                moved += it.streaming.open.move(model="m").asked_count
        assert seen == [2.0 * n for n in range(count)]
        assert stream.moves == moved >= 5
        assert stream.connections == moved + 1


async def test_blocking_streams_move_and_lose_nothing() -> None:
    engine = GatedEngine(is_open=True)
    count = 300
    loop = asyncio.get_running_loop()

    async with served(ready_model(engine)) as it:

        def work(client: Client) -> tuple[list[float], int]:
            seen = []
            with client.stream("m", in_flight=16) as stream:
                for result in stream.map(rows(float(n)) for n in range(count)):
                    seen.append(value(result))
                    if len(seen) % 100 == 50:
                        loop.call_soon_threadsafe(it.streaming.open.move)
                return seen, stream.moves

        seen, moves = await blocking(work, it.address)
    assert seen == [2.0 * n for n in range(count)]
    assert moves >= 2


async def test_a_stream_goes_on_at_another_server_when_its_own_drains() -> None:
    first = inference_server(ready_model(GatedEngine(is_open=True)))
    async with first as server:
        address = server.address
        async with AioClient(address, timeout=TIMEOUT_S) as client, client.stream("m", in_flight=4) as stream:
            await stream.send(rows(1))
            assert (await stream.receive()).model_version == "1"
            await server.stop(drain_s=0)
            # The same port, another server, another version: as behind a mesh.
            async with inference_server(ready_model(GatedEngine(is_open=True), version=2), listen=address):
                await stream.send(rows(2))
                result = await stream.receive(timeout=TIMEOUT_S)
                assert (value(result), result.model_version) == (4, "2")
            assert stream.connections >= 2


async def test_decoupled_models_answer_as_often_as_they_like() -> None:
    async with served(repeating_model()) as it, it.client() as client:
        assert (await client.model("repeat")).decoupled
        async with client.stream("repeat", in_flight=4) as stream:
            for count in (3, 0, -1):
                await stream.send([[count]], id=str(count))
            stream.done_sending()
            results = [result async for result in stream]
        by_id = {name: [r for r in results if r.id == name] for name in ("3", "0", "-1")}
        assert [r["y"].item() for r in by_id["3"][:-1]] == [0, 1, 2]
        assert [r.final for r in by_id["3"]] == [False] * 3 + [True]
        assert [(len(r), r.final) for r in by_id["0"]] == [(0, True)]
        assert isinstance(by_id["-1"][0].error, InvalidInput)
        with pytest.raises(Unsupported):
            await client.infer("repeat", [[1]])


async def test_a_decoupled_answer_that_moves_is_given_once() -> None:
    runner = Repeating()
    async with served(repeating_model(runner)) as it, it.client() as client, client.stream("repeat") as stream:
        await stream.send([[5]])
        first = await stream.receive()
        assert first["y"].item() == 0
        it.streaming.open.move()
        rest = [await stream.receive() for _ in range(5)]
        assert [r["y"].item() for r in rest[:-1]] == [1, 2, 3, 4]
        assert rest[-1].final


async def test_a_sequence_goes_on_elsewhere_with_its_state() -> None:
    from mlmesh_client import SequencePlace

    key = Tokens(b"a key of sixteen bytes or more")
    place = {
        "start": SequencePlace(id=5, start=True),
        "middle": SequencePlace(id=5),
        "end": SequencePlace(id=5, end=True),
    }
    async with served(summing_model(), tokens=key) as it, it.client() as client, client.stream("sum") as stream:
        await stream.send([[1.0]], sequence=place["start"])
        assert value(await stream.receive()) == 1
        # Asked to move, it stays until the sequence has ended; a server that drains sends the state along.
        assert it.streaming.open.move().asked_count == 1
        await stream.send([[10.0]], sequence=place["middle"])
        assert (value(await stream.receive()), stream.moves) == (11, 0)
        it.streaming.open.drain()
        it.streaming.open._draining = False  # the next connection finds a server that does not
        await eventually(lambda: stream.moves == 1)
        await stream.send([[100.0]], sequence=place["end"])
        assert value(await stream.receive()) == 111
        assert stream.connections == 2


async def test_a_sequence_whose_server_is_gone_is_lost_and_says_so() -> None:
    from mlmesh_client import SequenceLost, SequencePlace

    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(inference_server(summing_model()))
        client = await stack.enter_async_context(AioClient(first.address, timeout=TIMEOUT_S))
        stream = await stack.enter_async_context(client.stream("sum"))
        await stream.send([[1.0]], sequence=SequencePlace(id="s", start=True))
        assert value(await stream.receive()) == 1
        await first.stop(drain_s=0, grace_s=0)
        await stack.enter_async_context(inference_server(summing_model(), listen=first.address))
        await eventually(lambda: not stream._session.leaving)
        await stream.send([[1.0]], sequence=SequencePlace(id="s"))
        lost = await stream.receive(timeout=TIMEOUT_S)
        assert isinstance(lost.error, SequenceLost)
        await stream.send([[7.0]], sequence=SequencePlace(id="s", start=True))
        assert value(await stream.receive(timeout=TIMEOUT_S)) == 7


async def test_many_rows_go_in_few_messages_and_come_back_in_order() -> None:
    engine = GatedEngine(is_open=True)

    async def source() -> AsyncIterator[Any]:
        for n in range(300):
            yield rows(float(n))[0]

    async with served(ready_model(engine)) as it, it.client() as client:
        seen = [result async for result in client.infer_many("m", source(), rows_per_message=32)]
        assert [(result.id, float(result["y"][0])) for result in seen] == [(str(n), 2.0 * n) for n in range(300)]
        assert sum(map(len, engine.batches)) == 300
        assert len(engine.batches) <= 10
        engine.batches.clear()

        def same(blocking_client: Client) -> list[float]:
            return [float(r["y"][0]) for r in blocking_client.infer_many("m", (rows(float(n))[0] for n in range(300)))]

        assert await blocking(same, it.address) == [2.0 * n for n in range(300)]

        def wrong() -> Any:
            yield rows(1.0)[0]
            yield [1.0]

        with pytest.raises(InvalidInput, match=r"takes shape \[4\]"):
            async for _ in client.infer_many("m", wrong()):
                pass


async def test_one_blocking_client_serves_many_threads() -> None:
    engine = GatedEngine(is_open=True)
    failures: list[Exception] = []

    def work(client: Client) -> None:
        def one(number: int) -> None:
            try:
                for n in range(20):
                    assert value(client.infer("m", rows(number * 100.0 + n))) == 2 * (number * 100.0 + n)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    async with served(ready_model(engine)) as it:
        await blocking(work, it.address)
    assert failures == []


async def test_a_stream_that_may_not_be_fails_at_once() -> None:
    engine = GatedEngine(is_open=True)
    async with served(ready_model(engine)) as it, it.client() as client:
        with pytest.raises(NotFound):
            async with client.stream("nope"):
                pass
        assert OverloadedHere is not Overloaded
        catalog = it.streaming.catalog
        async with client.stream("m") as stream:
            catalog.withdraw("m", 1)
            await stream.send(rows(1))
            result = await stream.receive()
            assert isinstance(result.error, Unavailable)
            assert result.error.reason == "MODEL_NOT_READY"
