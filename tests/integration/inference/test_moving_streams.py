"""What a server says on streams that can move, byte for byte: for whoever writes a client of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from mlmesh.inference.v1 import control_pb2, control_pb2_grpc
from mlmesh_cli.app import app
from mlmesh_inference.catalog import Catalog, ReadyModel
from mlmesh_inference.oip import stream as streams
from mlmesh_inference.oip.stream import Streaming
from mlmesh_inference.tokens import Tokens
from mlmesh_runtime.server import Server
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from tests.support.inference import GatedEngine, eventually, inference_server, open_streams, ready_model, rows
from tests.support.special_models import Repeating, repeating_model

pytestmark = pytest.mark.usefixtures("each_transport")
TIMEOUT_S = 20.0
ANNOUNCED = (streams.ANNOUNCED,)


def request(number: int, *, version: str = "") -> pb.ModelInferRequest:
    return pb.ModelInferRequest(
        model_name="m",
        model_version=version,
        id=str(number),
        inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])],
        raw_input_contents=[rows(float(number)).tobytes()],
    )


def token_of(message: pb.ModelStreamInferResponse) -> str:
    """The token of a message that asks to move; "" of any other."""
    parameters = message.infer_response.parameters
    return parameters[streams.RESUME].string_param if streams.RESUME in parameters else ""


class Served:
    def __init__(self, server: Server, channel: grpc.aio.Channel, streaming: Streaming) -> None:
        self.server, self.streaming = server, streaming
        self.stub: Any = stubs.GRPCInferenceServiceStub(channel)
        self.control: Any = control_pb2_grpc.InferenceControlServiceStub(channel)

    def open(self, *, metadata: Any = ANNOUNCED) -> Any:
        return self.stub.ModelStreamInfer(metadata=metadata, timeout=TIMEOUT_S)

    async def move(self, **fields: Any) -> tuple[int, int, int]:
        answer = await self.control.MoveStreams(control_pb2.MoveStreamsRequest(**fields), timeout=TIMEOUT_S)
        return answer.stream_count, answer.asked_count, answer.pinned_count

    async def stream_counts(self) -> dict[str, int]:
        listed = await self.control.ListServedVersions(control_pb2.ListServedVersionsRequest(), timeout=TIMEOUT_S)
        return {served.name: served.stream_count for served in listed.served_versions}


@contextlib.asynccontextmanager
async def served(*models: ReadyModel, **changes: Any) -> AsyncIterator[Served]:
    catalog = Catalog()
    streaming = Streaming(catalog=catalog, open=open_streams(), tokens=Tokens())
    async with (
        inference_server(*models, catalog=catalog, streaming=streaming, **changes) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield Served(server, channel, streaming)


async def test_a_stream_that_is_asked_answers_what_it_took_and_drops_the_rest() -> None:
    engine = GatedEngine()
    async with served(ready_model(engine, admission=False, limiter=False)) as it:
        call = it.open()
        await call.write(request(1))
        await engine.begun()
        assert await it.stream_counts() == {"models/m/versions/1": 1}
        assert await it.move(parent="models/m/versions/2") == (0, 0, 0)
        assert await it.move(parent="models/m") == (1, 1, 0)
        # Read from now on, and dropped: the client sends them again elsewhere.
        await call.write(request(2))
        await call.write(request(3))
        engine.open()
        answered = await call.read()
        assert answered.infer_response.id == "1"
        told = await call.read()
        assert token_of(told)
        assert (told.error_message, told.infer_response.id, len(told.infer_response.outputs)) == ("", "", 0)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        assert sum(map(len, engine.batches)) == 1
        await eventually(lambda: len(it.streaming.open) == 0)
        again = it.open()
        first = request(2)
        first.parameters[streams.RESUME].string_param = token_of(told)
        await again.write(first)
        assert (await again.read()).infer_response.id == "2"


async def test_a_stream_that_already_ended_its_side_is_not_asked_to_move() -> None:
    engine = GatedEngine()
    async with served(ready_model(engine, admission=False)) as it:
        call = it.open()
        await call.write(request(1))
        await call.done_writing()
        await engine.begun()
        assert (await it.move())[1] == 1
        engine.open()
        assert (await call.read()).infer_response.id == "1"
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_streams_that_cannot_move_stay_and_end_with_a_status_when_the_server_does() -> None:
    async with served(ready_model(GatedEngine(is_open=True)), repeating_model()) as it:
        # A stream of a decoupled model goes the same way in the server, but its client did not say that it can move.
        call = it.open(metadata=())
        await call.write(repeat(1))
        assert (await call.read()).infer_response.id == "r"
        assert await it.move() == (1, 0, 1)
        await call.write(repeat(1))
        assert (await call.read()).infer_response.id == "r"
        stopping = asyncio.create_task(it.server.stop(drain_s=0))
        assert await read_to_end(call) == (grpc.StatusCode.UNAVAILABLE, [])
        await stopping


async def read_to_end(call: Any) -> tuple[grpc.StatusCode, list[pb.ModelStreamInferResponse]]:
    found: list[pb.ModelStreamInferResponse] = []
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            found.append(message)
    except grpc.aio.AioRpcError as error:
        return error.code(), found
    return await call.code(), found


def repeat(count: int, **parameters: bool) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(
        model_name="repeat",
        id="r",
        inputs=[pb.ModelInferRequest.InferInputTensor(name="n", datatype="INT32", shape=[1, 1])],
        raw_input_contents=[np.array([[count]], np.int32).tobytes()],
    )
    for name, value in parameters.items():
        message.parameters[name].bool_param = value
    return message


async def test_errors_in_their_place_tell_code_and_reason_to_who_can_move() -> None:
    async with served(ready_model(GatedEngine(is_open=True))) as it:
        call = it.open()
        await call.write(request(1, version="9"))
        told = (await call.read()).infer_response.parameters
        assert told["mlmesh_code"].string_param == "NOT_FOUND"
        assert told["mlmesh_reason"].string_param == "MODEL_NOT_FOUND"
        wrong = request(2)
        del wrong.inputs[0].shape[:]
        await call.write(wrong)
        told = (await call.read()).infer_response.parameters
        assert told["mlmesh_code"].string_param == "INVALID_ARGUMENT"
        assert told["mlmesh_field"].string_param == "inputs[x].shape"


async def test_a_token_that_is_refused_hurts_nobody() -> None:
    async with served(ready_model(GatedEngine(is_open=True))) as it:
        for token in ("", "nonsense", "A" * 1000):
            call = it.open()
            first = request(1)
            first.parameters[streams.RESUME].string_param = token
            await call.write(first)
            assert (await call.read()).infer_response.id == "1"
            call.cancel()


async def test_grpc_errors_end_a_stream_of_the_generic_path_too() -> None:
    async with served(repeating_model()) as it:
        call = it.open(metadata=(("triton_grpc_error", "true"),))
        await call.write(repeat(-1))
        assert (await read_to_end(call))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_answers_of_a_decoupled_model_interleave_and_end_as_asked() -> None:
    runner = Repeating()
    runner.allow = asyncio.Semaphore(0)
    async with served(repeating_model(runner), ready_model(GatedEngine(is_open=True))) as it:
        call = it.open()
        await call.write(repeat(2, triton_enable_empty_final_response=True))
        await call.write(request(7))
        # The other model's answer does not wait for the first request's.
        assert (await call.read()).infer_response.id == "7"
        runner.allow.release()
        runner.allow.release()
        parts = [(await call.read()).infer_response for _ in range(3)]
        assert [part.parameters["triton_final_response"].bool_param for part in parts] == [False, False, True]
        assert [len(part.outputs) for part in parts] == [1, 1, 0]
        assert {part.id for part in parts} == {"r"}
        await call.write(repeat(0))
        await call.done_writing()
        assert await read_to_end(call) == (grpc.StatusCode.OK, [])


async def test_a_reader_that_does_not_read_holds_up_only_its_own_stream() -> None:
    runner = Repeating()
    async with served(repeating_model(runner), ready_model(GatedEngine(is_open=True))) as it:
        slow, quick = it.open(), it.open()
        await slow.write(repeat(1_000_000))
        for number in range(50):
            await quick.write(request(number))
            assert (await quick.read()).infer_response.id == str(number)
        before = runner.given
        slow.cancel()
        await eventually(lambda: runner.withdrawn == 1)
        assert before < 1_000_000


async def test_a_cancelled_stream_withdraws_what_waits() -> None:
    engine = GatedEngine()
    model = ready_model(engine, admission=False, limiter=False, rows_preferred=1)
    async with served(model) as it:
        call = it.open()
        for number in range(5):
            await call.write(request(number))
        await engine.begun()
        await eventually(lambda: model.runner.depth == 4)
        call.cancel()
        await eventually(lambda: len(it.streaming.open) == 0)
        engine.open()
        await eventually(lambda: model.runner.depth == 0)
        assert len(engine.batches) == 1


async def test_streams_are_listed_and_moved_from_the_command_line_without_a_laptop_mesh() -> None:
    def mlmesh(*arguments: str) -> Any:
        done = CliRunner().invoke(app, ["streams", *arguments, "-o", "json"])
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    async with served(ready_model(GatedEngine(is_open=True))) as it:
        call = it.open()
        await call.write(request(1))
        await call.read()
        at = ("--address", it.server.address)
        (process,) = (await asyncio.to_thread(mlmesh, "list", *at))["processes"]
        assert process["streams"] == {"models/m/versions/1": 1}
        assert (await asyncio.to_thread(mlmesh, "move", "m/2", *at))["asked"] == 0
        assert (await asyncio.to_thread(mlmesh, "move", "m/1", "--spread", "0", *at))["asked"] == 1
        assert token_of(await call.read())
        await call.done_writing()
        assert await read_to_end(call) == (grpc.StatusCode.OK, [])
