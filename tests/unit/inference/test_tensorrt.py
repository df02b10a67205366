"""The TensorRT engine's own logic over a stand-in for GPU and bindings: staging, shapes, what is freed.

The stand-in keeps "device" memory in the process and adds one. Whether the real libraries agree is for tests/gpu.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlmesh_inference.engines.base import EngineError, EngineOptions
from mlmesh_inference.engines.tensorrt import TensorRTEngine
from tests.support.inference import rows

OPTIONS = EngineOptions(rows_max=8, rows_preferred=4)


class Device:
    """Memory that is counted."""

    def __init__(self, *, allocations_max: int = 100) -> None:
        self.blocks: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.closed = False
        self._left = allocations_max

    def enter(self) -> None:
        """Nothing to enter."""

    def allocate(self, size: int) -> int:
        if self._left == 0:
            raise EngineError("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY (2)")
        self._left -= 1
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        del self.blocks[address]

    allocate_host, free_host = allocate, free

    def stream(self) -> int:
        self.streams.add(7)
        return 7

    def destroy_stream(self, stream: int) -> None:
        self.streams.remove(stream)

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        ctypes.memmove(device, host, size)

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        ctypes.memmove(host, device, size)

    def synchronize(self, stream: int) -> None:
        """Everything is done at once."""

    def close(self) -> None:
        self.closed = True


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


class Context:
    """y = x + 1, FP32."""

    def __init__(self, output_shape: tuple[int, ...]) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self._output_shape = output_shape
        self.starts = True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 8

    def execute_async_v3(self, stream: int) -> bool:
        count = int(np.prod(self.shape))
        x = (ctypes.c_float * count).from_address(self.addresses["x"])
        y = (ctypes.c_float * count).from_address(self.addresses["y"])
        y[:] = [value + 1 for value in x]
        return self.starts

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], *self._output_shape[1:])


def bindings(*, output_shape: tuple[int, ...] = (-1, 4), kind: str = "FLOAT", refuses: bool = False) -> Any:
    shapes = {"x": (-1, 4), "y": output_shape}
    context = Context(output_shape)
    engine = SimpleNamespace(
        num_io_tensors=2,
        get_tensor_name=lambda number: "xy"[number],
        get_tensor_dtype=lambda _name: SimpleNamespace(name=kind),
        get_tensor_shape=lambda name: shapes[name],
        get_tensor_mode=lambda name: Mode.INPUT if name == "x" else Mode.OUTPUT,
        create_execution_context=lambda: context,
    )
    logger = type("Logger", (), {"WARNING": 1, "__init__": lambda self, level: None})
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: None if refuses else engine)
    return SimpleNamespace(
        Logger=logger, Runtime=lambda _logger: runtime, TensorIOMode=Mode, context=context, __hash__=object.__hash__
    )


class Bindings(SimpleNamespace):
    """Hashable, as a module is."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def build(device: Device, **changes: Any) -> tuple[TensorRTEngine, Context]:
    made = bindings(**changes)
    trt: Any = Bindings(**vars(made))
    return TensorRTEngine(trt, b"plan", device, OPTIONS), made.context  # type: ignore[arg-type]


def test_batches_of_every_size_get_their_rows_back() -> None:
    device = Device()
    engine, _ = build(device)
    assert engine.signature.batches
    kept = []
    for count in (1, 8, 3):
        (y,) = engine.run({"x": rows(*range(count))}, ["y"])
        assert y.tolist() == (rows(*range(count)) + 1).tolist()
        kept.append(y)
    assert kept[1].shape == (8, 4), "a result is the caller's, whatever ran since"
    assert kept[1][7, 0] == 8.0
    engine.close()
    assert device.blocks == {}
    assert device.streams == set()
    assert device.closed


def test_no_rows_do_not_reach_the_gpu() -> None:
    engine, context = build(Device())
    (y,) = engine.run({"x": rows()}, ["y"])
    assert y.shape == (0, 4)
    assert context.shape == ()


def test_rows_that_do_not_lie_in_order_in_memory_are_copied_right() -> None:
    engine, _ = build(Device())
    x = np.asfortranarray(np.arange(8, dtype=np.float32).reshape(2, 4))
    assert engine.run({"x": x}, ["y"])[0].tolist() == (x + 1).tolist()


def test_more_rows_than_were_reserved_are_refused() -> None:
    engine, _ = build(Device())
    with pytest.raises(EngineError, match="144 bytes, 128 were reserved"):
        engine.run({"x": rows(*range(9))}, ["y"])


def test_a_start_that_fails_is_an_error() -> None:
    engine, context = build(Device())
    context.starts = False
    with pytest.raises(EngineError, match="did not start"):
        engine.run({"x": rows(1.0)}, ["y"])


@pytest.mark.parametrize("allocations", [0, 1, 2, 3])
def test_a_full_gpu_leaves_nothing_behind(allocations: int) -> None:
    device = Device(allocations_max=allocations)
    with pytest.raises(EngineError, match="OUT_OF_MEMORY"):
        build(device)
    assert device.blocks == {}
    assert device.streams == set()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"output_shape": (-1, -1)}, "known only when it runs"),
        ({"kind": "FP8"}, "'x' is FP8, which cannot be served"),
        ({"refuses": True}, "refuses its own engine"),
    ],
)
def test_what_cannot_be_served_is_refused_when_built(changes: dict[str, Any], text: str) -> None:
    device = Device()
    with pytest.raises(EngineError, match=text):
        build(device, **changes)
    assert device.blocks == {}
