"""NVIDIA's own client, unchanged, against our server: unary and streams, sync and aio, every call it has."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import (
    InferenceServerException,
    np_to_triton_dtype,
    serialize_byte_tensor,
    triton_to_np_dtype,
)

from tests.support import onnx_models
from tests.support.inference import inference_server, onnx_engine, ready_model

KINDS = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64")


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    models = [
        ready_model(onnx_engine(tmp_path / "simple.onnx", onnx_models.add_sub()), name="simple"),
        ready_model(onnx_engine(tmp_path / "identity.onnx", onnx_models.identity([*KINDS, "BYTES"])), name="identity"),
        ready_model(onnx_engine(tmp_path / "bf16.onnx", onnx_models.identity(["BF16"])), name="bf16"),
        ready_model(
            onnx_engine(tmp_path / "classes.onnx", onnx_models.classes(3, 2)), name="classes", labels=("a", "b", "c")
        ),
    ]
    async with inference_server(*models) as server:
        yield server.address


def tensors(module: Any, first: Any, second: Any) -> list[Any]:
    result = []
    for name, array in (("INPUT0", first), ("INPUT1", second)):
        tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        result.append(tensor)
    return result


FIRST = np.arange(32, dtype=np.int32).reshape(2, 16)
SECOND = np.full((2, 16), 3, np.int32)


async def test_aio_unary(address: str) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        result = await client.infer("simple", tensors(triton_aio, FIRST, SECOND), request_id="7")
    assert np.array_equal(result.as_numpy("OUTPUT0"), FIRST + SECOND)
    assert np.array_equal(result.as_numpy("OUTPUT1"), FIRST - SECOND)
    assert result.get_response().id == "7"
    assert result.get_response().model_version == "1"


async def test_aio_stream(address: str) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(50):
            array = np.full((1, 16), number, np.int32)
            yield {"model_name": "simple", "inputs": tensors(triton_aio, array, SECOND[:1]), "request_id": str(number)}

    async with triton_aio.InferenceServerClient(address) as client:
        number = 0
        async for result, error in client.stream_infer(requests()):
            assert error is None
            assert result.get_response().id == str(number)
            assert result.as_numpy("OUTPUT0")[0, 0] == number + 3
            number += 1
    assert number == 50


async def test_aio_stream_errors_come_in_their_place(address: str) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for model in ("simple", "nope", "simple"):
            yield {"model_name": model, "inputs": tensors(triton_aio, FIRST, SECOND), "request_id": model}

    async with triton_aio.InferenceServerClient(address) as client:
        outcomes = [error and str(error) async for _, error in client.stream_infer(requests())]
    assert outcomes[0] is None
    assert outcomes[2] is None
    assert "Request for unknown model: 'nope' is not found" in outcomes[1]


async def test_sync_unary_async_and_stream(address: str) -> None:
    await asyncio.to_thread(_sync_calls, address)


def _sync_calls(address: str) -> None:
    client = triton.InferenceServerClient(address)
    try:
        result = client.infer("simple", tensors(triton, FIRST, SECOND), client_timeout=10)
        assert np.array_equal(result.as_numpy("OUTPUT0"), FIRST + SECOND)
        answers: queue.Queue[Any] = queue.Queue()
        client.async_infer("simple", tensors(triton, FIRST, SECOND), lambda result, error: answers.put((result, error)))
        result, error = answers.get(timeout=10)
        assert error is None
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(20):
            client.async_stream_infer("simple", tensors(triton, FIRST, SECOND), request_id=str(number))
        received = [answers.get(timeout=10) for _ in range(20)]
        assert [result.get_response().id for result, _ in received] == [str(number) for number in range(20)]
        assert np.array_equal(received[0][0].as_numpy("OUTPUT1"), FIRST - SECOND)
        client.stop_stream()
    finally:
        client.close()


async def test_every_datatype(address: str) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        inputs, expected = [], {}
        for kind in (*KINDS, "BYTES"):
            if kind == "BYTES":
                array = np.array([[b"", b"a\x00b"], ["grüß".encode(), b"x"]], object)
            else:
                array = np.array([[0, 1], [1, 0]]).astype(triton_to_np_dtype(kind))
            tensor = triton_aio.InferInput(f"in_{kind}", [2, 2], kind)
            tensor.set_data_from_numpy(array)
            inputs.append(tensor)
            expected[f"out_{kind}"] = array
        result = await client.infer("identity", inputs)
        for name, array in expected.items():
            assert result.as_numpy(name).tolist() == array.tolist(), name
        half = triton_aio.InferInput("in_BF16", [1, 3], "BF16")
        half.set_data_from_numpy(np.array([[0.5, -2.0, 3.0]], ml_dtypes.bfloat16))
        result = await client.infer("bf16", [half])
        assert result.as_numpy("out_BF16").tolist() == [[0.5, -2.0, 3.0]]


async def test_strings_are_serialized_as_the_client_does_it(address: str) -> None:
    array = np.array([[b"ab"], [b""]], object)
    assert serialize_byte_tensor(array).item() == b"\x02\x00\x00\x00ab\x00\x00\x00\x00"


async def test_classification(address: str) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        tensor = triton_aio.InferInput("x", [2, 2], "FP32")
        tensor.set_data_from_numpy(np.eye(2, dtype=np.float32))
        wanted = [triton_aio.InferRequestedOutput("scores", class_count=2)]
        result = (await client.infer("classes", [tensor], outputs=wanted)).as_numpy("scores")
        plain = (await client.infer("classes", [tensor])).as_numpy("scores")
    assert result.shape == (2, 2)
    for row in range(2):
        value, index, label = result[row, 0].decode().split(":")
        assert int(index) == int(plain[row].argmax())
        assert float(value) == pytest.approx(float(plain[row].max()), abs=1e-5)
        assert label == "abc"[int(index)]


async def test_requested_outputs_only(address: str) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        wanted = [triton_aio.InferRequestedOutput("OUTPUT1")]
        result = await client.infer("simple", tensors(triton_aio, FIRST, SECOND), outputs=wanted)
    assert result.as_numpy("OUTPUT0") is None
    assert np.array_equal(result.as_numpy("OUTPUT1"), FIRST - SECOND)


async def test_what_it_asks_about_server_and_models(address: str) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("simple", "1")
        assert not await client.is_model_ready("simple", "2")
        assert not await client.is_model_ready("nope")
        metadata = await client.get_server_metadata(as_json=True)
        assert metadata["name"] == "mlmesh"
        assert set(metadata["extensions"]) == {
            "binary_tensor_data",
            "classification",
            "model_configuration",
            "logging",
            "model_repository",
            "model_repository(unload_dependents)",
            "parameters",
            "schedule_policy",
            "sequence",
            "statistics",
            "trace",
        }
        model = await client.get_model_metadata("simple", as_json=True)
        assert model["inputs"][0] == {"name": "INPUT0", "datatype": "INT32", "shape": ["-1", "16"]}
        config = await client.get_model_config("simple", as_json=True)
        assert config["config"]["input"][0]["data_type"] == "TYPE_INT32"
        index = await client.get_model_repository_index(as_json=True)
        assert {entry["name"] for entry in index["models"]} == {"simple", "identity", "bf16", "classes"}
        statistics = await client.get_inference_statistics("simple", as_json=True)
        assert statistics["model_stats"][0]["name"] == "simple"


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"model_name": "nope"}, "NOT_FOUND", "Request for unknown model: 'nope' is not found"),
        ({"model_version": "3"}, "NOT_FOUND", "Request for unknown model: 'simple' version 3 is not found"),
        (
            {"inputs": tensors(triton_aio, FIRST, SECOND)[:1]},
            "INVALID_ARGUMENT",
            "missing required input(s) ['INPUT1']",
        ),
        (
            {"inputs": tensors(triton_aio, FIRST.astype(np.float32), SECOND)},
            "INVALID_ARGUMENT",
            "inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'",
        ),
        (
            {"inputs": tensors(triton_aio, FIRST[:, :8], SECOND)},
            "INVALID_ARGUMENT",
            "unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [2,8]",
        ),
        (
            {"outputs": [triton_aio.InferRequestedOutput("OUTPUT9")]},
            "INVALID_ARGUMENT",
            "unexpected inference output 'OUTPUT9' for model 'simple'",
        ),
        (
            {"outputs": [triton_aio.InferRequestedOutput("OUTPUT0")] * 2},
            "INVALID_ARGUMENT",
            "output 'OUTPUT0' already exists in request",
        ),
    ],
)
async def test_errors_read_as_they_do_elsewhere(change: dict[str, Any], code: str, text: str, address: str) -> None:
    call = {"model_name": "simple", "inputs": tensors(triton_aio, FIRST, SECOND), **change}
    async with triton_aio.InferenceServerClient(address) as client:
        with pytest.raises(InferenceServerException) as caught:
            await client.infer(**call)
    assert caught.value.status() == f"StatusCode.{code}"
    assert text in caught.value.message()


async def test_not_implemented_is_told_as_such(address: str) -> None:
    async with triton_aio.InferenceServerClient(address) as client:
        # System shared memory is off unless the server says otherwise.
        for call in (client.get_system_shared_memory_status, client.get_cuda_shared_memory_status):
            with pytest.raises(InferenceServerException) as caught:
                await call()
            assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
        settings = (await client.get_log_settings()).settings
        assert {name for name in settings if settings[name].WhichOneof("parameter_choice") == "bool_param"} == {
            "log_info",
            "log_warning",
            "log_error",
        }
        assert "OFF" in (await client.get_trace_settings()).settings["trace_level"].value
