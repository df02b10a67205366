"""Requests that lie, over real sockets, to a real process: each is refused by name, and nobody else notices."""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mlmesh_inference.oip.wire import varint
from mlmesh_runtime.errors import InvalidInput
from mlmesh_runtime.status import mesh_error
from open_inference import grpc_service_pb2 as pb
from tests.support.oip_server import TRANSPORTS, usable
from tests.support.server import Process, spawn

TIMEOUT_S = 30.0
UNARY = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
LARGEST = 16 << 20
"""Bytes of the largest message."""
Tensor = pb.ModelInferRequest.InferInputTensor


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest) -> Iterator[Process]:
    """A process that serves the model "echo"."""
    env = {"MLMESH_LISTEN": "127.0.0.1:0", "MLMESH_TRANSPORT": usable(request.param)}
    with spawn("tests/support/inference_process.py", env=env) as process:
        process.address = process.listening()  # type: ignore[attr-defined]
        process.fresh = memory(process, "VmRSS")  # type: ignore[attr-defined]
        yield process


class Client:
    """Calls of raw bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._unary = channel.unary_unary(UNARY)
        self.stream = channel.stream_stream(STREAM)

    async def infer(self, encoded: bytes) -> pb.ModelInferResponse:
        """One call."""
        return pb.ModelInferResponse.FromString(await self._unary(encoded, timeout=TIMEOUT_S))

    async def refused(self, encoded: bytes) -> tuple[grpc.StatusCode, Any]:
        """The status of a call that fails, and the error it stands for."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.infer(encoded)
        return caught.value.code(), mesh_error(caught.value)


@pytest.fixture
async def client(server: Process) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(server.address) as channel:  # type: ignore[attr-defined]
        yield Client(channel)


def good(value: float = 1.0, name: str = "") -> bytes:
    data = np.full((1, 4), value, np.float32).tobytes()
    tensor = Tensor(name="x", datatype="FP32", shape=[1, 4])
    message = pb.ModelInferRequest(model_name="echo", id=name, inputs=[tensor], raw_input_contents=[data])
    return bytes(message.SerializeToString())


def shaped(*dims: int, raw: bytes = bytes(16), name: str = "x", datatype: str = "FP32") -> bytes:
    tensor = Tensor(name=name, datatype=datatype, shape=dims)
    made = pb.ModelInferRequest(model_name="echo", inputs=[tensor], raw_input_contents=[raw])
    return bytes(made.SerializeToString())


def record(tag: int, payload: bytes) -> bytes:
    return b"".join((varint(tag), varint(len(payload)), payload))


def parameters(count: int) -> bytes:
    """A map's entries, each with a key of its own."""
    return b"".join(record(0x22, record(0x0A, b"%07d" % number)) for number in range(count))


NAME = record(0x0A, b"echo")
LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a product that overflows": (lambda: shaped(1 << 32, 1 << 32), "inputs[x].shape"),
    "2^63 - 1 rows": (lambda: shaped((1 << 63) - 1, 1), "inputs[x].shape"),
    "no elements of 2^62 columns": (lambda: shaped(0, 1 << 62, raw=b""), "inputs[x].shape"),
    "a negative dimension": (lambda: shaped(-1, -16), "inputs[x].shape"),
    "a million dimensions": (lambda: shaped(*[1] * 1_000_000), "inputs[x].shape"),
    "4 GiB that did not come": (lambda: shaped(1 << 28, 4), "inputs[x]"),
    "a million texts that did not come": (lambda: shaped(1_000_000, 1, name="t", datatype="BYTES"), "inputs[t]"),
    "a text of 4 GiB": (lambda: shaped(1, 1, raw=b"\xff\xff\xff\xffab", name="t", datatype="BYTES"), "inputs[t]"),
    "four million empty texts in a shape of one": (
        lambda: shaped(1, 1, raw=bytes(16_000_000), name="t", datatype="BYTES"),
        "inputs[t]",
    ),
    "a million empty inputs": (lambda: NAME + b"\x2a\x00" * 1_000_000, "inputs"),
    "a million empty outputs": (lambda: NAME + b"\x32\x00" * 1_000_000, "outputs"),
    "a million empty contents": (lambda: NAME + b"\x3a\x00" * 1_000_000, "raw_input_contents"),
    "a million fields that nobody knows": (lambda: NAME + b"\x40\x00" * 1_000_000, "8"),
    "a million parameters": (lambda: NAME + parameters(1_000_000), "parameters"),
    "two million texts": (
        lambda: shaped(2_000_000, 1, raw=bytes(8_000_000), name="t", datatype="BYTES"),
        "inputs[t].shape",
    ),
    "five million typed numbers": (
        lambda: (
            NAME
            + record(
                0x2A,
                Tensor(name="i", datatype="INT64", shape=[5_000_000, 1]).SerializeToString()
                + record(0x2A, record(0x1A, bytes(5_000_000))),
            )
        ),
        "inputs[i].contents",
    ),
    "a million parameters of an input": (lambda: NAME + record(0x2A, parameters(1_000_000)), "inputs[].parameters"),
    "two thousand parameters": (lambda: good() + parameters(2000), "parameters"),
    "a thousand inputs of one name": (lambda: NAME + record(0x2A, record(0x0A, b"x")) * 1000, "inputs"),
    "five million typed texts in a shape of one": (
        lambda: (
            NAME
            + record(
                0x2A,
                Tensor(name="t", datatype="BYTES", shape=[1, 1]).SerializeToString()
                + record(0x2A, b"\x42\x00" * 5_000_000),
            )
        ),
        "inputs[t]",
    ),
    "sixteen million typed numbers in a shape of one": (
        lambda: (
            NAME
            + record(
                0x2A,
                Tensor(name="i", datatype="INT64", shape=[1, 1]).SerializeToString()
                + record(0x2A, record(0x1A, bytes(16_000_000))),
            )
        ),
        "inputs[i]",
    ),
}


@functools.cache
def told(lie: str) -> bytes:
    """The message of a lie; some take long to write."""
    return LIES[lie][0]()


@pytest.mark.parametrize("lie", sorted(LIES))
async def test_a_lie_is_refused_by_name_and_others_are_answered(lie: str, client: Client) -> None:
    _, field = LIES[lie]
    refusal, *answers = await asyncio.gather(client.refused(told(lie)), *(client.infer(good(n)) for n in range(8)))
    code, error = refusal
    assert code is grpc.StatusCode.INVALID_ARGUMENT, error
    assert isinstance(error, InvalidInput)
    assert error.field == field
    assert [np.frombuffer(a.raw_output_contents[0], np.float32)[0] for a in answers] == list(range(8))


@pytest.mark.parametrize("metadata", [(), (("mlmesh-stream", "resumable"),)], ids=["plain", "moving"])
async def test_a_lie_on_a_stream_is_told_in_its_place_or_ends_it(
    metadata: tuple[tuple[str, str], ...], client: Client
) -> None:
    """What protobuf must not even parse ends the stream; after any other the stream goes on."""
    ended = 0
    for lie, (_, field) in LIES.items():
        call = client.stream(timeout=TIMEOUT_S, metadata=metadata)
        await call.write(told(lie))
        try:
            answer = pb.ModelStreamInferResponse.FromString(await call.read())
        except grpc.aio.AioRpcError as error:
            refusal: Any = mesh_error(error)
            assert (type(refusal), refusal.field) == (InvalidInput, field), lie
            ended += 1
            continue
        assert answer.error_message, lie
        await call.write(good(3.0, "after"))
        answer = pb.ModelStreamInferResponse.FromString(await call.read())
        assert (answer.error_message, answer.infer_response.id) == ("", "after"), lie
        call.cancel()
    assert ended == 6


@pytest.mark.parametrize(
    "encoded",
    [b"\x0b" * 60_000, good() + b"\x0b" * 5000, record(0x2A, record(0x2A, b"\x0b" * 200)), good()[:-1], b"\xff" * 64],
)
async def test_what_is_no_message_is_invalid(encoded: bytes, client: Client) -> None:
    code, error = await client.refused(encoded)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "MALFORMED_MESSAGE"
    await client.infer(good())


async def test_lies_cost_little_memory(server: Process, client: Client) -> None:
    """All of them, one after the other, above what the process took when it had served nothing.

    Typed numbers take eight bytes each, and half as much again while they are parsed; little of that may stay.
    """
    forget_peak(server)
    for lie in LIES:
        await client.refused(told(lie))
    fresh: int = server.fresh  # type: ignore[attr-defined]
    assert memory(server, "VmHWM") - fresh < 28 * LARGEST
    assert memory(server, "VmRSS") - fresh < 18 * LARGEST


def forget_peak(process: Process) -> None:
    """Let VmHWM begin anew."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5", "utf-8")


def memory(process: Process, name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


async def test_requests_of_one_batch_fail_alone(client: Client) -> None:
    """By an engine that fails on them, and by one that answers in a wrong shape."""
    values = [1.0, 666.0, 2.0, 667.0, 3.0] * 3
    results = await asyncio.gather(*(client.infer(good(value)) for value in values), return_exceptions=True)
    for value, result in zip(values, results, strict=True):
        if value > 600:
            assert isinstance(result, grpc.aio.AioRpcError)
            assert result.code() is grpc.StatusCode.INTERNAL
        else:
            assert isinstance(result, pb.ModelInferResponse)
            assert np.frombuffer(result.raw_output_contents[0], np.float32)[0] == value


def mutated(generator: random.Random) -> bytes:
    """A request in order, damaged here and there."""
    made = pb.ModelInferRequest.FromString(good(1.0, "7"))
    if generator.random() < 0.5:
        made.inputs.add(name="t", datatype="BYTES", shape=[1, 2])
        made.raw_input_contents.append(b"\x02\x00\x00\x00ab\x00\x00\x00\x00")
        made.outputs.add(name="y").parameters["classification"].int64_param = 2
        made.parameters["timeout"].int64_param = 10_000_000
    if generator.random() < 0.3:
        del made.raw_input_contents[:]
        made.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])
    raw = bytearray(made.SerializeToString())
    for _ in range(generator.randint(1, 4)):
        choice, place = generator.random(), generator.randrange(len(raw))
        if choice < 0.6:
            raw[place] = generator.randrange(256)
        elif choice < 0.8:
            del raw[place : place + generator.randint(1, 8)]
        else:
            raw[place:place] = raw[place : place + generator.randint(1, 30)]
        if not raw:
            break
    return bytes(raw)


ALLOWED = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    # A parameter may have become a timeout that is over at once, or a text that is a wish for something unknown.
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


async def test_mutated_calls(client: Client) -> None:
    seed = time.time_ns()
    generator = random.Random(seed)  # noqa: S311
    for _ in range(12):
        encoded = [mutated(generator) for _ in range(50)]
        results = await asyncio.gather(*(client.infer(raw) for raw in encoded), return_exceptions=True)
        for raw, result in zip(encoded, results, strict=True):
            if isinstance(result, BaseException):
                assert isinstance(result, grpc.aio.AioRpcError), (seed, raw.hex())
                assert result.code() in ALLOWED, (seed, raw.hex(), result.details())
        assert (await client.infer(good(5.0, "here"))).id == "here"


async def test_mutated_messages_of_a_stream(client: Client) -> None:
    """Each is answered in its place, or ends its stream because it is no message at all."""
    seed = time.time_ns()
    generator = random.Random(seed)  # noqa: S311
    for _ in range(20):
        call = client.stream(timeout=TIMEOUT_S)
        for raw in (mutated(generator) for _ in range(20)):
            # One after the other: gRPC's client may lose the status of a stream that ends while it writes.
            await call.write(raw)
            try:
                answer = await call.read()
            except grpc.aio.AioRpcError as error:
                assert mesh_error(error).reason == "MALFORMED_MESSAGE", (seed, raw.hex())  # noqa: PT017
                break
            pb.ModelStreamInferResponse.FromString(answer)
            await call.write(good(2.0, "between"))
            response = pb.ModelStreamInferResponse.FromString(await call.read())
            assert response.infer_response.id == "between", (seed, raw.hex())
            assert not response.error_message, (seed, raw.hex())
        else:
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
