"""The TensorRT engine's own logic over a stand-in for GPU and bindings: staging, padding, profiles, graphs, freeing.

The stand-in keeps "device" memory in the process, and its model adds one. Whether the real libraries agree is for
tests/gpu.
"""

from __future__ import annotations

import ctypes
import json
import weakref
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_instance import GRAPHS_MAX
from mlmesh_inference.engines.tensorrt_run import TensorRTEngine
from mlmesh_runtime.errors import InvalidInput
from tests.support.inference import rows

ROWS = ((1, 1), (2, 4), (5, 8))


class Device:
    """Memory that is counted, and streams that record."""

    def __init__(self, *, allocations_max: int = 100, captures: bool = True) -> None:
        self.blocks: dict[int, Any] = {}
        self.streams: set[int] = set()
        self.graphs: dict[int, Any] = {}
        self.launched = 0
        self.closed = False
        self.fails = False
        self.engine: weakref.ref[Any] | None = None
        self.left: Any = None
        self.recording: list[Any] | None = None
        self._left = allocations_max
        self._captures = captures

    def enter(self) -> None:
        """Nothing to enter."""

    def memory(self) -> tuple[int, int]:
        return 1 << 30, 1 << 30

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
        self.streams.add(7 + len(self.streams))
        return 6 + len(self.streams)

    def destroy_stream(self, stream: int) -> None:
        self.streams.remove(stream)

    def zero(self, device: int, size: int, stream: int) -> None:
        ctypes.memset(device, 0, size)

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        ctypes.memmove(device, host, size)

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        ctypes.memmove(host, device, size)

    def synchronize(self, stream: int) -> None:
        """Everything is done at once."""
        if self.fails:
            raise EngineError("cuStreamSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (700)")

    def begin_capture(self, stream: int) -> None:
        self.recording = []

    def end_capture(self, stream: int) -> int:
        recorded, self.recording = self.recording, None
        if not self._captures:
            raise EngineError("cuStreamEndCapture: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED (901)")
        self.graphs[len(self.graphs) + 1] = recorded
        return len(self.graphs)

    def launch(self, graph: int, stream: int) -> None:
        self.launched += 1
        for work in self.graphs[graph]:
            work()

    def destroy_graph(self, graph: int) -> None:
        self.graphs[graph] = None

    def close(self) -> None:
        self.closed = True
        self.left = self.engine() if self.engine is not None else None


class Mode(Enum):
    INPUT = 0
    OUTPUT = 1


class Place(Enum):
    DEVICE = 0
    HOST = 1


class Strategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class Context:
    """y = x + 1, FP32; profiles are ranges of rows."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.profile = -1
        self.scratch = 0

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = address

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.maker.ranges[self.profile]
        if not low <= shape[0] <= high:
            return False
        self.shape = tuple(shape)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        shape = self.shape

        def work() -> None:
            count = int(np.prod(shape))
            x = (ctypes.c_float * count).from_address(self.addresses["x"])
            y = (ctypes.c_float * count).from_address(self.addresses["y"])
            y[:] = [value + 1 for value in x]

        self.maker.shapes.append(shape)
        recording = self.maker.device.recording
        if recording is None:
            work()
        else:
            recording.append(work)
        return self.maker.starts

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        free = self.maker.output_shape
        return tuple(-1 if dim == -1 and place else self.shape[place] for place, dim in enumerate(free))


class Maker:
    """The bindings' module, the engine and what was done with it."""

    def __init__(self, device: Device, **changes: Any) -> None:
        self.device = device
        self.ranges = changes.get("ranges", ROWS)
        self.output_shape: tuple[int, ...] = changes.get("output_shape", (-1, 4))
        self.starts = True
        self.shapes: list[tuple[int, ...]] = []
        self.contexts: list[Context] = []
        self.refuses = changes.get("refuses", False)
        self.kind = changes.get("kind", "FLOAT")
        self.width = changes.get("width", 4)
        self.inspected = changes.get("inspected", "")

    def context(self, strategy: Strategy) -> Context:
        assert strategy is Strategy.USER_MANAGED
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def profile_shape(self, name: str, number: int) -> list[tuple[int, ...]]:
        low, high = self.ranges[number]
        width = (1, 64) if self.width == -1 else (self.width, self.width)
        return [(low, width[0]), (high, width[0]), (high, width[1])]

    def module(self) -> Any:
        shapes = {"x": (-1, self.width), "y": self.output_shape}
        engine = Bindings(
            num_io_tensors=2,
            num_optimization_profiles=len(self.ranges),
            device_memory_size_v2=512,
            get_tensor_profile_shape=self.profile_shape,
            get_tensor_location=lambda name: Place.DEVICE,
            get_tensor_name=lambda number: "xy"[number],
            get_tensor_dtype=lambda _name: SimpleNamespace(name=self.kind),
            get_tensor_shape=lambda name: shapes[name],
            get_tensor_mode=lambda name: Mode.INPUT if name == "x" else Mode.OUTPUT,
            create_execution_context=self.context,
            create_engine_inspector=lambda: SimpleNamespace(get_engine_information=lambda _form: self.inspected),
        )
        self.device.engine = weakref.ref(engine)
        made = [None if self.refuses else engine]
        del engine
        runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: made.pop())
        base = type("ILogger", (), {"Severity": SimpleNamespace(ERROR=1, INTERNAL_ERROR=2)})
        return Bindings(
            ILogger=base,
            Runtime=lambda _logger: runtime,
            LayerInformationFormat=SimpleNamespace(JSON=1),
            TensorIOMode=Mode,
            TensorLocation=Place,
            ExecutionContextAllocationStrategy=Strategy,
        )


class Bindings(SimpleNamespace):
    """Hashable, as a module is."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def build(device: Device, *, instances: int = 1, graphs: bool = True, **changes: Any) -> tuple[TensorRTEngine, Maker]:
    made = Maker(device, **changes)
    engine = TensorRTEngine(
        made.module(),
        b"plan",
        device,
        instances=instances,
        graphs=graphs,
        said=("fp32",),  # type: ignore[arg-type]
    )
    return engine, made


def test_batches_of_every_size_get_their_rows_back_and_nothing_is_left() -> None:
    device = Device()
    engine, _ = build(device)
    assert engine.signature.batches
    kept = []
    for _ in range(3):  # plain, then from a graph
        for count in range(1, 9):
            (y,) = engine.run({"x": rows(*range(count))}, ["y"])
            assert y.tolist() == (rows(*range(count)) + 1).tolist()
            kept.append(y)
    assert kept[7].shape == (8, 4), "a result is the caller's, whatever ran since"
    assert kept[7][7, 0] == 8.0
    engine.close()
    assert device.blocks == {}
    assert device.streams == set()
    assert set(device.graphs.values()) == {None}
    assert device.closed


def test_batches_are_padded_to_the_next_power_of_two_within_their_profile() -> None:
    engine, made = build(Device(), graphs=False, ranges=((1, 1), (2, 6), (7, 12)))
    made.shapes.clear()
    for count in (1, 2, 3, 4, 5, 6, 7, 9):
        engine.run({"x": rows(*range(count))}, ["y"])
    assert [shape[0] for shape in made.shapes] == [1, 2, 4, 4, 6, 6, 8, 12]


def test_a_shape_runs_plainly_once_and_from_its_graph_afterwards() -> None:
    device = Device()
    engine, made = build(device)
    engine.run({"x": rows(1.0, 2.0, 3.0)}, ["y"])
    assert (device.launched, engine.graphs) == (0, 1)
    enqueued = len(made.shapes)
    for count in (3, 4):
        (y,) = engine.run({"x": rows(*range(count))}, ["y"])
        assert y[count - 1, 0] == float(count)
    assert device.launched == 2
    assert len(made.shapes) == enqueued, "a graph asks TensorRT nothing"


def test_a_graph_has_a_context_of_its_own_on_the_same_scratch_memory() -> None:
    engine, made = build(Device())
    before = len(made.contexts)
    for count in (1, 2, 4, 8):
        engine.run({"x": rows(*range(count))}, ["y"])
    assert len(made.contexts) == before + 4 == len(ROWS) + 4
    assert len({context.scratch for context in made.contexts}) == 1


def test_where_capturing_fails_it_goes_on_plainly() -> None:
    device = Device(captures=False)
    engine, _ = build(device)
    for _ in range(3):
        assert engine.run({"x": rows(1.0, 2.0)}, ["y"])[0].tolist() == rows(2.0, 3.0).tolist()
    assert (device.launched, engine.graphs) == (0, 0)


def test_many_shapes_are_captured_when_they_come_again_and_the_longest_unused_goes() -> None:
    device = Device()
    engine, _ = build(device, width=-1, output_shape=(-1, 4), ranges=((1, 8),))
    # The stand-in's output is 4 wide whatever comes in; only which shapes are captured is looked at.
    widths = range(1, GRAPHS_MAX + 4)
    for width in widths:
        engine.run({"x": rows(1.0, width=width)}, ["y"])
    assert engine.graphs == 0
    for width in widths:
        engine.run({"x": rows(1.0, width=width)}, ["y"])
    assert engine.graphs == GRAPHS_MAX
    assert list(device.graphs.values()).count(None) == len(widths) - GRAPHS_MAX


def test_instances_have_memory_of_their_own() -> None:
    device = Device()
    engine, made = build(device, instances=2)
    assert engine.concurrency == 2
    assert len({context.scratch for context in made.contexts}) == 2
    engine.close()
    assert device.blocks == {}


def test_what_tensorrt_made_is_gone_before_the_device_is() -> None:
    device = Device()
    engine, _ = build(device, instances=2)
    engine.run({"x": rows(1.0)}, ["y"])
    assert device.engine is not None
    assert device.engine() is not None
    engine.close()
    assert device.closed
    assert device.left is None


def test_a_gpu_that_fails_is_given_back_all_the_same() -> None:
    device = Device()
    engine, _ = build(device)
    engine.run({"x": rows(1.0)}, ["y"])
    device.fails = True
    with pytest.raises(EngineError, match="ILLEGAL_ADDRESS"):
        engine.run({"x": rows(1.0)}, ["y"])
    engine.close()
    assert device.blocks == {}
    assert device.streams == set()
    assert device.closed


def test_no_rows_do_not_reach_the_gpu() -> None:
    engine, made = build(Device())
    made.shapes.clear()
    (y,) = engine.run({"x": rows()}, ["y"])
    assert y.shape == (0, 4)
    assert made.shapes == []


def test_rows_that_do_not_lie_in_order_in_memory_are_copied_right() -> None:
    engine, _ = build(Device())
    x = np.asfortranarray(np.arange(8, dtype=np.float32).reshape(2, 4))
    assert engine.run({"x": x}, ["y"])[0].tolist() == (x + 1).tolist()


def test_shapes_that_no_profile_covers_are_refused_and_the_profiles_told() -> None:
    engine, _ = build(Device())
    with pytest.raises(EngineError, match=r"no profile of this engine covers x \[9,4\].*x \[5,4\]..\[8,4\]") as caught:
        engine.run({"x": rows(*range(9))}, ["y"])
    assert isinstance(caught.value, InvalidInput)
    assert caught.value.reason == "SHAPE_MISMATCH"
    assert engine.run({"x": rows(1.0)}, ["y"])[0][0, 0] == 2.0, "the instance is free again"


def test_a_start_that_fails_is_an_error() -> None:
    engine, made = build(Device())
    made.starts = False
    with pytest.raises(EngineError, match="did not start"):
        engine.run({"x": rows(1.0)}, ["y"])


@pytest.mark.parametrize("allocations", range(5))
def test_a_full_gpu_leaves_nothing_behind(allocations: int) -> None:
    device = Device(allocations_max=allocations)
    with pytest.raises(EngineError, match="OUT_OF_MEMORY"):
        build(device)
    assert device.blocks == {}
    assert device.streams == set()
    assert device.closed


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"output_shape": (-1, -1)}, r"the size of 'y' \[1,-1\] is known only when it has run"),
        ({"kind": "FP8"}, "'x' is FP8, which cannot be served"),
        ({"refuses": True}, "refuses the engine"),
    ],
)
def test_what_cannot_be_served_is_refused_when_built(changes: dict[str, Any], text: str) -> None:
    device = Device()
    with pytest.raises(EngineError, match=text):
        build(device, **changes)
    assert device.blocks == {}


def inspected(*formats: str) -> str:
    """What the inspector of TensorRT says of an engine with one layer."""
    outputs = [{"Name": "y", "Dimensions": [1, 4], "Format/Datatype": each} for each in formats]
    return json.dumps({"Layers": [{"Name": "conv", "Inputs": [], "Outputs": outputs}], "Bindings": ["x", "y"]})


@pytest.mark.parametrize(
    ("text", "said", "precisions"),
    [
        (inspected("Row major linear FP32"), (), ("fp32",)),
        (inspected("Channel major FP16 format where channel % 8 == 0", "Row major linear FP32"), (), ("fp32", "fp16")),
        (inspected("BFloat16", "Int32", "Bool"), (), ("bf16",)),
        (inspected("Row major Int8 format", "Half"), ("fp32",), ("fp16", "int8")),
        (inspected("Float"), ("tf32",), ("tf32",)),
        (json.dumps({"Layers": ["conv", "relu"]}), ("fp16",), ("fp16",)),
        ("no json", ("fp32",), ("fp32",)),
    ],
)
def test_the_precision_is_what_was_read_back(text: str, said: tuple[str, ...], precisions: tuple[str, ...]) -> None:
    """And what the graph said only where the engine does not tell."""
    made = Maker(Device(), inspected=text)
    engine = TensorRTEngine(made.module(), b"plan", made.device, said=said)  # type: ignore[arg-type]
    assert engine.precisions == precisions
    assert engine.facts.precision == precisions[-1], "the narrowest"
    assert engine.facts.device == "cuda:0"
