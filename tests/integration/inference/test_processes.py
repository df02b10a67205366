"""Real processes: a registry, an inference process that follows it, and clients that notice nothing of what happens."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mlmesh.inference.v1 import control_pb2, control_pb2_grpc
from mlmesh.registry.v1 import registry_pb2
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from tests.support import onnx_models
from tests.support.inference import eventually, rows
from tests.support.publish import Publisher
from tests.support.server import Process, spawn

TIMEOUT_S = 20.0
State = control_pb2.ServedState


@contextlib.contextmanager
def registry(root: Path, listen: str = "127.0.0.1:0") -> Iterator[tuple[Process, str]]:
    env = {"MLMESH_LISTEN": listen, "MLMESH_DATA_DIR": str(root / "registry"), "MLMESH_REGISTRY_BOOKMARK_S": "1"}
    with spawn("-m", "mlmesh_registry", env=env) as process:
        yield process, process.listening()


@contextlib.contextmanager
def inference(root: Path, registry_address: str, serve: str = "*@stable", **env: str) -> Iterator[tuple[Process, str]]:
    settings = {
        "MLMESH_LISTEN": "127.0.0.1:0",
        "MLMESH_DATA_DIR": str(root / "inference"),
        "MLMESH_REGISTRY_TARGET": registry_address,
        "MLMESH_SERVE": serve,
    }
    with spawn("-m", "mlmesh_inference", env={**settings, **env}) as process:
        yield process, process.listening()


class Client:
    """Stubs to an inference process."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.oip: Any = stubs.GRPCInferenceServiceStub(channel)
        self.control: Any = control_pb2_grpc.InferenceControlServiceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    async def infer(self, model: str = "adder", version: str = "") -> tuple[str, float]:
        """(version that ran, what it added)."""
        message = pb.ModelInferRequest(
            model_name=model,
            model_version=version,
            inputs=[pb.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 4])],
            raw_input_contents=[rows(0.0).tobytes()],
        )
        response = await self.oip.ModelInfer(message, timeout=TIMEOUT_S)
        return response.model_version, float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])

    async def until(self, name: str, state: int, *, default: bool | None = None) -> control_pb2.ServedVersion:
        """Wait for a version's state; the version."""
        watch = self.control.WatchServedVersions(control_pb2.WatchServedVersionsRequest())
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async for message in watch:
                    served: control_pb2.ServedVersion = message.served_version
                    if served.name == name and served.state == state and default in (None, served.default_version):
                        return served
        finally:
            watch.cancel()
        raise AssertionError("the watch ended")

    async def serving(self, name: str = "") -> bool:
        """What health says."""
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextlib.asynccontextmanager
async def client(address: str) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield Client(channel)


async def test_a_version_is_served_swapped_under_load_and_survives_a_bad_one(tmp_path: Path) -> None:
    with registry(tmp_path) as (_, registry_address), inference(tmp_path, registry_address) as (process, address):
        async with client(address) as it, Publisher(registry_address) as publisher:
            signature = registry_pb2.ModelSignature(
                inputs=[registry_pb2.TensorSpec(name="x", datatype="FP32", shape=[-1, 4])],
                outputs=[registry_pb2.TensorSpec(name="y", datatype="FP32", shape=[-1, 4])],
            )
            first = await publisher.publish("adder", onnx_models.add(plus=1.0), signature=signature)
            await publisher.alias("adder", "stable", first)
            served = await it.until("models/adder/versions/1", State.SERVED_STATE_READY, default=True)
            assert (served.engine, served.fetched_bytes) == ("onnxruntime-cpu", served.total_bytes)
            assert await it.infer() == ("1", 1.0)
            assert await it.serving()
            assert await it.serving("model:adder")

            answers: list[tuple[str, float]] = []
            stop = False

            async def ask() -> None:
                while not stop:
                    answers.append(await it.infer())

            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(ask())
                second = await publisher.publish("adder", onnx_models.add(plus=100.0), signature=signature)
                await publisher.alias("adder", "stable", second)
                await it.until("models/adder/versions/1", State.SERVED_STATE_UNLOADED)
                bad = await publisher.publish("adder", b"this is no model")
                await publisher.alias("adder", "stable", bad)
                failed = await it.until("models/adder/versions/3", State.SERVED_STATE_FAILED)
                so_far = len(answers)
                await eventually(lambda: len(answers) > so_far + 20)
                stop = True
            assert "no well-formed ONNX model" in failed.error
            assert set(answers) == {("1", 1.0), ("2", 100.0)}
            assert answers[-1] == ("2", 100.0)
            assert not await it.serving("model:adder/3")
            assert await it.serving("model:adder")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


async def test_the_cache_serves_while_the_registry_is_away_and_what_was_missed_comes_later(tmp_path: Path) -> None:
    with registry(tmp_path) as (first_registry, registry_address):
        async with Publisher(registry_address) as publisher:
            await publisher.publish("adder", onnx_models.add(plus=1.0))
            await publisher.alias("adder", "stable", 1)
        with inference(tmp_path, registry_address) as (process, address):
            async with client(address) as it:
                await it.until("models/adder/versions/1", State.SERVED_STATE_READY, default=True)
            process.signal(signal.SIGKILL)
            process.wait()
        first_registry.signal(signal.SIGTERM)
        first_registry.wait()
    with inference(tmp_path, registry_address) as (_, address):
        async with client(address) as it:
            await it.until("models/adder/versions/1", State.SERVED_STATE_READY, default=True)
            assert await it.infer() == ("1", 1.0)
            assert await it.serving()
            with registry(tmp_path, registry_address):
                async with Publisher(registry_address) as publisher:
                    await publisher.publish("adder", onnx_models.add(plus=100.0))
                    await publisher.alias("adder", "stable", 2)
                    await it.until("models/adder/versions/2", State.SERVED_STATE_READY, default=True)
                    assert await it.infer() == ("2", 100.0)


async def test_stable_and_canary_are_two_processes(tmp_path: Path) -> None:
    with (
        registry(tmp_path) as (_, registry_address),
        inference(tmp_path / "v1", registry_address, "*@stable") as (_, stable_address),
        inference(tmp_path / "v2", registry_address, "*@canary") as (_, canary_address),
    ):
        async with client(stable_address) as stable, client(canary_address) as canary:
            async with Publisher(registry_address) as publisher:
                for number, plus in ((1, 1.0), (2, 100.0)):
                    await publisher.publish("adder", onnx_models.add(plus=plus))
                    await publisher.alias("adder", ("stable", "canary")[number - 1], number)
            await stable.until("models/adder/versions/1", State.SERVED_STATE_READY, default=True)
            await canary.until("models/adder/versions/2", State.SERVED_STATE_READY, default=True)
            assert await stable.infer() == ("1", 1.0)
            assert await canary.infer() == ("2", 100.0)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await canary.infer(version="1")
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_what_is_quarantined_or_deleted_is_not_served_and_data_sets_never(tmp_path: Path) -> None:
    first, ready = "models/adder/versions/1", State.SERVED_STATE_READY
    with registry(tmp_path) as (_, registry_address), inference(tmp_path, registry_address, "*") as (_, address):
        async with client(address) as it, Publisher(registry_address) as publisher:
            stub = publisher.stub
            kind = registry_pb2.MODEL_KIND_DATASET
            await stub.CreateModel(registry_pb2.CreateModelRequest(model_id="data", kind=kind), timeout=TIMEOUT_S)
            await publisher.publish("data", onnx_models.add(plus=7.0))
            await publisher.publish("adder", onnx_models.add(plus=1.0))
            await it.until(first, ready, default=True)
            stage = registry_pb2.SetModelVersionStageRequest(
                name=first, stage=registry_pb2.VERSION_STAGE_QUARANTINED, reason="biased"
            )
            await stub.SetModelVersionStage(stage, timeout=TIMEOUT_S)
            await _not_served(it)
            stage.stage = registry_pb2.VERSION_STAGE_ACTIVE
            await stub.SetModelVersionStage(stage, timeout=TIMEOUT_S)
            await it.until(first, ready, default=True)
            await stub.DeleteModel(registry_pb2.DeleteModelRequest(name="models/adder", force=True), timeout=TIMEOUT_S)
            await _not_served(it)
            await stub.UndeleteModel(registry_pb2.UndeleteModelRequest(name="models/adder"), timeout=TIMEOUT_S)
            await it.until(first, ready, default=True)
            assert await it.infer() == ("1", 1.0)
            assert await _code(it.infer("data")) == "NOT_FOUND"


async def test_the_repository_rpcs_load_and_unload_by_hand(tmp_path: Path) -> None:
    with registry(tmp_path) as (_, registry_address), inference(tmp_path, registry_address) as (_, address):
        async with client(address) as it, Publisher(registry_address) as publisher:
            await publisher.publish("adder", onnx_models.add(plus=1.0))
            load = pb.RepositoryModelLoadRequest(model_name="adder")
            # The watch may not have told the process of the model yet; then it does not know it.
            async with asyncio.timeout(TIMEOUT_S):
                while (code := await _code(it.oip.RepositoryModelLoad(load, timeout=TIMEOUT_S))) != "OK":
                    assert code == "NOT_FOUND"
                    await asyncio.sleep(0.05)
            assert await it.infer() == ("1", 1.0)
            await it.oip.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="adder"), timeout=TIMEOUT_S)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await it.infer()
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def _not_served(it: Client) -> None:
    """Wait until the model is not known any more."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            if await _code(it.infer()) == "NOT_FOUND":
                return
            await asyncio.sleep(0.02)


async def _code(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"MLMESH_SERVE": "Nope!"}, "MLMESH_SERVE: 'Nope!' is none of"),
        ({"MLMESH_BATCH_ROWS_MAX": "none"}, "MLMESH_BATCH_ROWS_MAX: expected a number"),
        ({"MLMESH_REGISTRY_TARGET": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(env: dict[str, str], text: str, tmp_path: Path) -> None:
    settings = {"MLMESH_LISTEN": "127.0.0.1:0", "MLMESH_DATA_DIR": str(tmp_path)}
    with spawn("-m", "mlmesh_inference", env={**settings, **env}) as process:
        assert process.wait() == 2
        (line,) = process.lines
        assert text in line
