"""Three times as much as a server can do, for some seconds: it does what it can, in time, and refuses the rest at once.

The minute is `python -m benchmarks inference-overload`.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from tests.support.inference import rows
from tests.support.server import spawn

pytestmark = pytest.mark.usefixtures("each_transport")

DEADLINE_S = 1.5
OVERLOAD_S = 3.5
CALLERS = 24

REQUEST = pb.ModelInferRequest(
    model_name="timed",
    inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])],
    raw_input_contents=[rows(1.0).tobytes()],
)


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[Any]:
    """A stub of a server in a process of its own."""
    with spawn("tests/support/timed_process.py", env={"MLMESH_LISTEN": "127.0.0.1:0"}) as process:
        async with grpc.aio.insecure_channel(process.listening()) as channel:
            yield stubs.GRPCInferenceServiceStub(channel)


async def capacity(stub: Any, seconds: float) -> float:
    """Calls answered a second, when everybody waits for an answer before asking again."""
    answered, begun = 0, time.monotonic()

    async def caller() -> None:
        nonlocal answered
        while time.monotonic() < begun + seconds:
            await stub.ModelInfer(REQUEST, timeout=30)
            answered += 1

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return answered / (time.monotonic() - begun)


async def test_under_three_times_too_much_the_server_does_all_that_it_can_in_time() -> None:
    codes: Counter[str] = Counter()
    answered_at: list[float] = []
    latencies: list[float] = []
    refused_after: list[float] = []

    async def call(stub: Any) -> None:
        sent = time.monotonic()
        try:
            await stub.ModelInfer(REQUEST, timeout=DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            codes[error.code().name] += 1
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                refused_after.append(time.monotonic() - sent)
        else:
            answered_at.append(time.monotonic())
            latencies.append(time.monotonic() - sent)

    async with served() as stub:
        await capacity(stub, 0.5)
        able = await capacity(stub, 1.5)
        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(int(3 * able * OVERLOAD_S)):
                await asyncio.sleep(max(0.0, begun + number / (3 * able) - time.monotonic()))
                group.create_task(call(stub))
            offered_s = time.monotonic() - begun
    # Not the first second, in which the queue fills, nor what comes after the last call.
    in_time = [at for at in answered_at if begun + 1 <= at <= begun + offered_s]
    goodput = len(in_time) / (offered_s - 1) / able
    assert set(codes) <= {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert goodput >= 0.85, f"of what it can do; 0.95 on a quiet machine: {codes}"
    late = codes["DEADLINE_EXCEEDED"] / (codes["DEADLINE_EXCEEDED"] + len(answered_at))
    assert late <= 0.05, "what it took in it answered in time"
    assert sorted(latencies)[len(latencies) * 99 // 100] <= DEADLINE_S
    assert codes["RESOURCE_EXHAUSTED"] > len(answered_at) / 2
    assert statistics.median(refused_after) < DEADLINE_S / 5, "at once, not when its time was over"
