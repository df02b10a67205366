"""Traffic that moves while it flows, and what survives: routes, certificates, restarts, kills."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest

from mlmesh.local.v1 import local_pb2
from mlmesh_cli import samples
from open_inference import grpc_service_pb2 as oip
from open_inference import grpc_service_pb2_grpc as oip_grpc
from tests.integration.platform.conftest import WeightsFile
from tests.support.live_platform import HOST, ROOT, Platform

REQUESTS = 5000
IN_FLIGHT = 16


@pytest.fixture(scope="module")
def request_message() -> oip.ModelInferRequest:
    image = samples.load("mnist").images[:1]
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=image.shape)
    return oip.ModelInferRequest(
        model_name="mnist", inputs=[tensor], raw_input_contents=[np.ascontiguousarray(image).tobytes()]
    )


@contextlib.asynccontextmanager
async def inference(platform: Platform) -> AsyncIterator[oip_grpc.GRPCInferenceServiceAsyncStub]:
    options = [("grpc.default_authority", f"{HOST}:9000")]
    async with grpc.aio.insecure_channel(platform.outbound(), options) as channel:
        yield oip_grpc.GRPCInferenceServiceStub(channel)


class Load:
    """Unary calls by a fixed number of workers until stopped; counts answers by version, and failures."""

    def __init__(self, stub: Any, message: oip.ModelInferRequest) -> None:
        self._stub, self._message = stub, message
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stopped = False

    async def _worker(self) -> None:
        while not self._stopped:
            try:
                reply = await self._stub.ModelInfer(self._message, timeout=10)
                self.answers[reply.model_version] += 1
            except grpc.aio.AioRpcError as error:
                self.failures.append(f"{error.code().name}: {error.details()}")

    async def until(self, count: int) -> Counter[str]:
        """Answers since now, once there are `count` of them."""
        before = self.answers.copy()
        while sum(self.answers.values()) - sum(before.values()) < count:
            assert len(self.failures) < 100, self.failures[:3]
            await asyncio.sleep(0.01)
        return self.answers - before

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(IN_FLIGHT):
                tasks.create_task(self._worker())
            try:
                yield self
            finally:
                self._stopped = True


async def apply(platform: Platform, path: Any) -> None:
    await asyncio.to_thread(platform.mlmesh, "apply", "-f", path)


async def test_shift_with_no_failure(
    platform: Platform, weights: WeightsFile, request_message: oip.ModelInferRequest
) -> None:
    """100/0 → 90/10 → 0/100: nothing of at least 5,000 fails, the share is within 2 points of the configured one."""
    async with inference(platform) as stub, Load(stub, request_message).running() as load:
        seen = await load.until(500)
        assert set(seen) == {"1"}
        await apply(platform, weights(90, 10))
        seen = await load.until(REQUESTS)
        share = seen["2"] / seen.total()
        assert abs(share - 0.10) <= 0.02, seen
        await apply(platform, weights(0, 100))
        # What was in flight when the new routes were acknowledged may still come from the old version.
        await load.until(IN_FLIGHT)
        seen = await load.until(500)
        assert set(seen) == {"2"}
    assert load.failures == []


class Stream:
    """One open ModelStreamInfer: sends, and gives the reply."""

    def __init__(self, stub: Any, message: oip.ModelInferRequest) -> None:
        self._call = stub.ModelStreamInfer(timeout=120)
        self._message = message
        self._sent = 0

    async def ask(self) -> str:
        self._sent += 1
        self._message.id = str(self._sent)
        await self._call.write(self._message)
        reply = await asyncio.wait_for(self._call.read(), 10)
        assert reply is not grpc.aio.EOF, await self._call.code()
        assert reply.error_message == ""
        assert reply.infer_response.id == str(self._sent)
        version: str = reply.infer_response.model_version
        return version

    async def close(self) -> None:
        await self._call.done_writing()
        assert await self._call.read() is grpc.aio.EOF
        assert await self._call.code() is grpc.StatusCode.OK


async def test_open_stream_survives(
    platform: Platform, weights: WeightsFile, request_message: oip.ModelInferRequest
) -> None:
    """A route change, a certificate rotation and the other subset's restart; the stream stays where it was opened."""
    async with inference(platform) as stub:
        stream = Stream(stub, oip.ModelInferRequest.FromString(request_message.SerializeToString()))
        assert await stream.ask() == "1"
        await apply(platform, weights(0, 100))
        assert (await stub.ModelInfer(request_message, timeout=10)).model_version == "2"
        assert await stream.ask() == "1"
        await asyncio.to_thread(platform.mlmesh, "certs", "rotate")
        assert await stream.ask() == "1"
        restarted = platform.instance("inference-v2-0").application_pid
        os.kill(restarted, signal.SIGTERM)
        assert await stream.ask() == "1"
        await asyncio.to_thread(platform.wait, "v2 is back", lambda: _replaced(platform, "inference-v2-0", restarted))
        assert await stream.ask() == "1"
        await stream.close()


def _replaced(platform: Platform, name: str, pid: int) -> bool:
    instance = platform.instance(name)
    return instance.state == local_pb2.INSTANCE_STATE_READY and instance.application_pid not in (0, pid)


async def test_killed_replica_is_hidden_by_retries(platform: Platform, request_message: oip.ModelInferRequest) -> None:
    """kill -9 of one of two replicas under load: no caller sees it, and it comes back."""
    victim = platform.instance("inference-v1-0").application_pid
    async with inference(platform) as stub, Load(stub, request_message).running() as load:
        await load.until(200)
        os.kill(victim, signal.SIGKILL)
        await load.until(1000)
        await asyncio.to_thread(
            platform.wait, "the replica is back", lambda: _replaced(platform, "inference-v1-0", victim)
        )
        await load.until(200)
    assert load.failures == []


@pytest.mark.parametrize("instance", ["registry-0", "training-0"])
async def test_accepted_work_survives_a_kill(platform: Platform, instance: str) -> None:
    """kill -9 of the registry or of training: what was accepted is there afterwards."""
    job = "jobs/" if instance == "training-0" else ""
    if job:
        submitted = platform.json(
            "train", "--recipe", "mlp", "--dataset", "digits", "--set", "epochs=30", "--model", "survivor", "--detach"
        )
        job = _find_name(submitted, "jobs/")
    victim = platform.instance(instance).application_pid
    os.kill(victim, signal.SIGKILL)
    await asyncio.to_thread(platform.wait, "it is back", lambda: _replaced(platform, instance, victim))
    assert "models/mnist/versions/2" in platform.mlmesh("models", "versions", "mnist", "-o", "json").stdout
    if job:
        ended = await asyncio.to_thread(platform.mlmesh, "train", "watch", job, "-o", "json", timeout_s=150)
        assert "SUCCEEDED" in ended.stdout.upper()
        assert "models/survivor/versions/1" in ended.stdout


def _find_name(value: Any, prefix: str) -> str:
    if isinstance(value, str) and value.startswith(prefix):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for item in items if (found := _find_name(item, prefix))), "")


def test_wrong_configuration_changes_nothing(platform: Platform, weights: WeightsFile) -> None:
    before = platform.status().config_version
    path = weights(50, 50)
    good = path.read_text()
    for broken, named in (
        (good.replace("weight: 50", "wieght: 50"), "spec.http[0].route[0].wieght"),
        (good.replace("weight: 50", "weight: -1"), "spec.http[0].route[0].weight"),
        (good.replace("weight: 50", "weight: 0"), "weight"),
        (good.replace("subset: v2", "subset: v3"), "v3"),
    ):
        path.write_text(broken)
        refused = platform.mlmesh("apply", "-f", path, check=False)
        assert refused.returncode == 1
        assert named in refused.stdout + refused.stderr
        assert path.name in refused.stdout + refused.stderr
    assert platform.status().config_version == before


def test_second_up_is_refused(platform: Platform) -> None:
    again = platform.mlmesh("up", "--gateway-address", "none", check=False)
    assert again.returncode == 1
    assert "already runs" in again.stderr
    assert str(platform.status().supervisor_pid) in again.stdout + again.stderr


def test_taken_port_is_named(platform: Platform) -> None:
    refused = platform.mlmesh(
        "up", "--state-dir", "other", "--manifests", ROOT / "manifests/base", "--istio", ROOT / "mesh/istio",
        "--gateway-address", platform.gateway, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert platform.gateway.rpartition(":")[2] in refused.stderr
    assert "--gateway-address" in refused.stderr
