"""One instance of a TensorRT engine: contexts, staging memory, a stream and CUDA graphs.

An instance is what one thread runs at a time: a stream, pinned staging memory and device memory for the largest shapes,
and scratch memory that all of its execution contexts share, because they never run at once. A request allocates
nothing. There is one context for each profile, and one for each shape that has a CUDA graph: a graph belongs to the
context that it was captured from, and to the shapes it had.

Batches are padded to the next power of two, so that few shapes come: rows beyond the request's are never looked at.
A shape runs plainly once before it is captured; where capturing fails, and for shapes beyond GRAPHS_MAX, it goes on to
run plainly. `tensorrt_rtx` captures by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import numpy as np

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.cuda import Device
from mlmesh_inference.engines.tensorrt_api import MESSAGES
from mlmesh_inference.engines.tensorrt_profiles import Profile, bucket, choose, show_profile
from mlmesh_inference.tensors import Array, Signature, TensorSpec, show
from mlmesh_runtime.errors import InvalidInput

_LOG = logging.getLogger(__name__)

GRAPHS_MAX: Final = 24
"""CUDA graphs of one instance; each holds a context. The longest unused goes first."""
CAPTURE_AFTER: Final = 2
"""Times that a shape comes before it is captured, where shapes are many; where only batches differ, once."""

_Shapes = tuple[tuple[int, ...], ...]


class ShapeNotCovered(InvalidInput, EngineError):  # noqa: N818  named by what is wrong
    """A request of a shape that the engine was not compiled for: the caller's to correct, not the engine's fault."""

    default_reason = "SHAPE_MISMATCH"


@dataclass(slots=True, kw_only=True)
class _Buffer:
    """Memory of one tensor on both sides, for its largest shape. `host` is a view of `pinned` in the tensor's dtype."""

    spec: TensorSpec
    size: int
    device: int
    pinned: int
    host: Array
    on_host: bool = False

    @property
    def address(self) -> int:
        """What the context reads or writes."""
        return self.pinned if self.on_host else self.device


@dataclass(slots=True, kw_only=True)
class _Lane:
    """A context with shapes set: those of its outputs, and its graph (0: it runs plainly)."""

    context: Any
    outputs: dict[str, tuple[int, ...]]
    graph: int = 0


class Instance:
    """One stream and all that it works with."""

    def __init__(
        self,
        trt: ModuleType,
        engine: Any,
        device: Device,
        signature: Signature,
        profiles: Sequence[Profile],
        *,
        graphs: bool,
    ) -> None:
        self._trt, self._engine, self._device = trt, engine, device
        self._signature, self._profiles = signature, profiles
        self._own_graphs = hasattr(trt, "CudaGraphStrategy")
        self._captures = graphs and not self._own_graphs
        self._graphs_wanted = graphs
        self._pads = signature.batches and all(spec.shape[:1] == (-1,) for spec in signature.outputs)
        self._bounded = all(-1 not in spec.shape[1:] for spec in signature.inputs) and self._pads
        self._stream = 0
        self._scratch = 0
        self._buffers: dict[str, _Buffer] = {}
        self._plain: dict[int, _Lane] = {}
        self._set: dict[int, _Shapes] = {}
        self._lanes: OrderedDict[tuple[int, _Shapes], _Lane] = OrderedDict()
        self._seen: OrderedDict[tuple[int, _Shapes], int] = OrderedDict()
        try:
            self._stream = device.stream()
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        """Scratch and staging memory for the largest shapes of every profile, and a context for each."""
        size = int(self._engine.device_memory_size_v2)
        self._scratch_bytes = size
        if size:
            self._scratch = self._device.allocate(size)
        largest = {spec.name: 1 for spec in (*self._signature.inputs, *self._signature.outputs)}
        for number, profile in enumerate(self._profiles):
            lane = self._plain[number] = self._context(number)
            shapes = {spec.name: profile[spec.name].high for spec in self._signature.inputs}
            self._shape(lane, shapes)
            for name, shape in {**shapes, **lane.outputs}.items():
                largest[name] = max(largest[name], math.prod(shape))
        for spec in (*self._signature.inputs, *self._signature.outputs):
            self._buffers[spec.name] = self._allocate(spec, largest[spec.name])
        for lane in self._plain.values():
            self._bind(lane)

    def _context(self, profile: int) -> _Lane:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._own_graphs:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            kinds = self._trt.CudaGraphStrategy
            config.cuda_graph_strategy = kinds.WHOLE_GRAPH_CAPTURE if self._graphs_wanted else kinds.DISABLED
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        if context is None:
            why = MESSAGES.take("is the GPU's memory full?")
            raise EngineError(f"TensorRT cannot make an execution context: {why}")
        if self._scratch:
            context.set_device_memory(self._scratch, self._scratch_bytes)
        if not context.set_optimization_profile_async(profile, self._stream):
            raise EngineError(f"TensorRT refuses its own profile {profile}")
        self._device.synchronize(self._stream)
        return _Lane(context=context, outputs={})

    def _bind(self, lane: _Lane) -> None:
        for name, buffer in self._buffers.items():
            if not lane.context.set_tensor_address(name, buffer.address):
                raise EngineError(f"TensorRT refuses the memory of '{name}'")

    def _allocate(self, spec: TensorSpec, count: int) -> _Buffer:
        size = max(count, 1) * spec.datatype.itemsize
        on_host = self._engine.get_tensor_location(spec.name) == self._trt.TensorLocation.HOST
        device = self._device.allocate(size)
        try:
            pinned = self._device.allocate_host(size)
        except EngineError:
            self._device.free(device)
            raise
        # What pads a batch is read by the GPU too: it must be numbers, not what was in memory before.
        ctypes.memset(pinned, 0, size)
        memory = memoryview((ctypes.c_char * size).from_address(pinned)).cast("B")
        host = np.frombuffer(memory, spec.datatype.dtype)
        buffer = _Buffer(spec=spec, size=size, device=device, pinned=pinned, host=host, on_host=on_host)
        self._device.zero(device, size, self._stream)
        return buffer

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """One batch."""
        self._device.enter()
        number, shapes, rows = self._place(inputs)
        for name, array in inputs.items():
            self._upload(self._buffers[name], array)
        key = (number, tuple(shapes[spec.name] for spec in self._signature.inputs))
        lane, capture = self._lane(key, shapes)
        if lane.graph:
            self._device.launch(lane.graph, self._stream)
        else:
            self._enqueue(lane)
        kept = [(self._buffers[name], self._kept(lane.outputs[name], rows)) for name in outputs]
        for buffer, shape in kept:
            self._download(buffer, shape)
        self._device.synchronize(self._stream)
        results = [buffer.host[: math.prod(shape)].reshape(shape).copy() for buffer, shape in kept]
        if capture:
            self._capture(key)
        return results

    def _place(self, inputs: Mapping[str, Array]) -> tuple[int, dict[str, tuple[int, ...]], int]:
        """Profile, shapes with padding, and how many rows are real (0: all)."""
        shapes = {name: array.shape for name, array in inputs.items()}
        number = choose(self._profiles, shapes)
        if number < 0:
            asked = ", ".join(f"{name} {show(shape)}" for name, shape in shapes.items())
            known = "; ".join(map(show_profile, self._profiles))
            raise ShapeNotCovered(f"no profile of this engine covers {asked}: it has {known}", field="inputs")
        if not self._pads:
            return number, shapes, 0
        rows = next(iter(shapes.values()))[0]
        most = min(bounds.high[0] for bounds in self._profiles[number].values())
        padded = bucket(rows, most)
        return number, {name: (padded, *shape[1:]) for name, shape in shapes.items()}, rows

    def _upload(self, buffer: _Buffer, array: Array) -> None:
        if array.nbytes > buffer.size:
            raise EngineError(f"input '{buffer.spec.name}' has {array.nbytes} bytes, {buffer.size} were reserved")
        np.copyto(buffer.host[: array.size].reshape(array.shape), array)
        if not buffer.on_host:
            self._device.to_device(buffer.device, buffer.pinned, array.nbytes, self._stream)

    def _lane(self, key: tuple[int, _Shapes], shapes: Mapping[str, tuple[int, ...]]) -> tuple[_Lane, bool]:
        """The context for these shapes, and whether it is to be captured after it ran."""
        ready = self._lanes.get(key)
        if ready is not None:
            self._lanes.move_to_end(key)
            return ready, False
        lane = self._plain[key[0]]
        if self._set.get(key[0]) != key[1]:
            self._set.pop(key[0], None)
            self._shape(lane, shapes)
            self._set[key[0]] = key[1]
        if not self._captures:
            return lane, False
        self._seen[key] = self._seen.get(key, 0) + 1
        self._seen.move_to_end(key)
        while len(self._seen) > 4 * GRAPHS_MAX:
            self._seen.popitem(last=False)
        return lane, self._seen[key] >= (1 if self._bounded else CAPTURE_AFTER)

    def _shape(self, lane: _Lane, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in shapes.items():
            if not lane.context.set_input_shape(name, shape):
                raise EngineError(f"TensorRT refuses shape {show(shape)} of input '{name}'")
        for spec in self._signature.outputs:
            found = tuple(lane.context.get_tensor_shape(spec.name))
            if min(found, default=0) < 0:
                raise EngineError(f"the size of '{spec.name}' {show(found)} is known only when it has run")
            lane.outputs[spec.name] = found

    def _enqueue(self, lane: _Lane) -> None:
        if not lane.context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT did not start the batch: {MESSAGES.take('it does not say why')}")

    def _kept(self, shape: tuple[int, ...], rows: int) -> tuple[int, ...]:
        return (rows, *shape[1:]) if rows else shape

    def _download(self, buffer: _Buffer, shape: tuple[int, ...]) -> None:
        size = math.prod(shape) * buffer.spec.datatype.itemsize
        if size > buffer.size:
            raise EngineError(f"output '{buffer.spec.name}' has shape {show(shape)}, {buffer.size} bytes were reserved")
        if size and not buffer.on_host:
            self._device.to_host(buffer.pinned, buffer.device, size, self._stream)

    def _capture(self, key: tuple[int, _Shapes]) -> None:
        """Record the batch that just ran as a graph of a context of its own. Failing is no error."""
        try:
            lane = self._context(key[0])
            self._bind(lane)
            self._shape(lane, dict(zip((spec.name for spec in self._signature.inputs), key[1], strict=True)))
            # Once plainly with these shapes: what it does only the first time must not be in the graph.
            self._enqueue(lane)
            self._device.synchronize(self._stream)
            self._device.begin_capture(self._stream)
            started = False
            try:
                started = bool(lane.context.execute_async_v3(self._stream))
            finally:
                graph = self._device.end_capture(self._stream)
            if not started:
                self._device.destroy_graph(graph)
                raise EngineError(MESSAGES.take("it did not start"))
            lane.graph = graph
        except (EngineError, RuntimeError) as error:
            _LOG.info("no CUDA graph for a shape", extra={"shapes": str(key[1]), "why": str(error)})
            self._captures = False
            return
        self._lanes[key] = lane
        self._seen.pop(key, None)
        while len(self._lanes) > GRAPHS_MAX:
            _, old = self._lanes.popitem(last=False)
            self._device.destroy_graph(old.graph)

    @property
    def graphs(self) -> int:
        """CUDA graphs that are ready."""
        return len(self._lanes)

    def close(self) -> None:
        """Give everything back, contexts before the memory that they use. A GPU that fails gives back what it can."""
        device, stream = self._device, self._stream
        if stream:
            _try(device.synchronize, stream)
        for lane in self._lanes.values():
            _try(device.destroy_graph, lane.graph)
        self._lanes.clear()
        self._plain.clear()
        self._engine = None
        for buffer in self._buffers.values():
            _try(device.free, buffer.device)
            _try(device.free_host, buffer.pinned)
        self._buffers.clear()
        if self._scratch:
            _try(device.free, self._scratch)
        if stream:
            _try(device.destroy_stream, stream)
        self._scratch = self._stream = 0


def _try(act: Callable[[int], None], what: int) -> None:
    with contextlib.suppress(EngineError):
        act(what)
