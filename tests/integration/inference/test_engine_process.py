"""A real inference process with a declared engine: what it says of it, and that it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mlmesh.inference.v1 import control_pb2, control_pb2_grpc
from mlmesh_inference.engines.openvino import OpenVinoKind
from open_inference import grpc_service_pb2 as pb
from open_inference import grpc_service_pb2_grpc as stubs
from tests.support import network_models
from tests.support.publish import Publisher
from tests.support.server import spawn

pytestmark = pytest.mark.skipif(not OpenVinoKind().probe().available, reason=OpenVinoKind().probe().reason)
TIMEOUT_S = 60.0


async def test_a_declared_engine_serves_and_its_trials_are_told(tmp_path: Path) -> None:
    registry = {"MLMESH_LISTEN": "127.0.0.1:0", "MLMESH_DATA_DIR": str(tmp_path / "registry")}
    with spawn("-m", "mlmesh_registry", env=registry) as first:
        address = first.listening()
        inference = {
            "MLMESH_LISTEN": "127.0.0.1:0",
            "MLMESH_DATA_DIR": str(tmp_path / "inference"),
            "MLMESH_REGISTRY_TARGET": address,
            "MLMESH_SERVE": "*@stable",
            "MLMESH_ENGINE": "openvino",
            "MLMESH_PRECISION": "bf16",
            "MLMESH_ENGINE_TUNING": "load",
        }
        async with Publisher(address) as publisher:
            version = await publisher.publish("net", network_models.perceptron(features=256, hidden=256))
            await publisher.alias("net", "stable", version)
        with spawn("-m", "mlmesh_inference", env=inference) as second:
            async with grpc.aio.insecure_channel(second.listening()) as channel:
                served = await _ready(control_pb2_grpc.InferenceControlServiceStub(channel))
                assert (served.engine, served.precision) == ("openvino", "bf16")
                assert "openvino is declared" in served.engine_reason
                trials = {trial.engine: trial for trial in served.trials}
                assert trials["openvino"].chosen
                assert 0 < trials["openvino"].error_max < 0.1
                assert [each.rows for each in trials["openvino"].batch_times] == [1, 2, 4, 8, 16, 32, 64]
                assert trials["onnxruntime-cpu"].error_max == 0
                assert served.batch_size_preferred >= 1
                assert served.memory_bytes > 0
                await _answers(stubs.GRPCInferenceServiceStub(channel))
            second.popen.terminate()
            assert second.wait() == 0


async def _ready(control: Any) -> control_pb2.ServedVersion:
    async for change in control.WatchServedVersions(control_pb2.WatchServedVersionsRequest(), timeout=TIMEOUT_S):
        served = change.served_version
        assert served.state != control_pb2.SERVED_STATE_FAILED, served.error
        if served.state == control_pb2.SERVED_STATE_READY:
            return served
    raise AssertionError("the watch ended")


async def _answers(inference: Any) -> None:
    request = pb.ModelInferRequest(model_name="net")
    tensor = request.inputs.add(name="x", datatype="FP32")
    tensor.shape.extend([2, 256])
    request.raw_input_contents.append(np.ones((2, 256), np.float32).tobytes())
    response = await inference.ModelInfer(request, timeout=TIMEOUT_S)
    assert list(response.outputs[0].shape) == [2, 10]
