"""NVIDIA TensorRT: `tensorrt` 10 and 11 and `tensorrt_rtx`, through what all of them have in common.

Precision is what the ONNX file says (the network is strongly typed). One optimisation profile covers batches of 1 to
the largest, tuned for the usual one. Each engine has one execution context, a stream of its own and pinned staging
memory for the largest batch, made once: a request allocates nothing on the GPU. Built engines are not kept between
starts.

A model with a free dimension beside the batch, or an output whose size depends on the data, is refused, and the next
engine takes it.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from mlmesh_inference.engines.base import Availability, EngineError, EngineFacts, EngineOptions
from mlmesh_inference.engines.cuda import Device, gpu_name
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec

NAME: Final = "tensorrt"
_MODULES: Final = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_TYPES: Final = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "BF16": "BF16",
    "INT8": "INT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "UINT8": "UINT8",
    "BOOL": "BOOL",
}


class TensorRTKind:
    """Builds engines where there is an NVIDIA GPU and one of the packages."""

    name = NAME
    precisions = ("fp32",)

    def probe(self) -> Availability:
        """Look for a driver, a GPU and a package, in this order of cost."""
        try:
            gpu = gpu_name()
        except EngineError as error:
            return Availability(available=False, reason=str(error))
        try:
            trt = load_module()
        except EngineError as error:
            return Availability(available=False, reason=f"{gpu} is here, but {error}")
        return Availability(available=True, reason=f"{trt.__name__} runs on {gpu}", version=trt.__version__)

    def build(self, model: Path, options: EngineOptions) -> TensorRTEngine:
        """Compile an ONNX file for the first GPU; takes seconds to minutes."""
        trt = load_module()
        device = Device()
        try:
            device.enter()
            return TensorRTEngine(trt, compile_plan(trt, model, options), device, options)
        except EngineError:
            device.close()
            raise
        except Exception as error:  # bindings raise what they like; another engine may still take the model
            device.close()
            raise EngineError(f"TensorRT: {error}") from error


def load_module() -> ModuleType:
    """The first of the packages that can be imported. Raises EngineError."""
    problems = []
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            problems.append(f"{name}: {error}")
    raise EngineError("no TensorRT package can be imported: " + "; ".join(problems))


@cache
def _logger(trt: ModuleType) -> Any:
    """One logger a process: TensorRT uses the first and ignores others."""
    return trt.Logger(trt.Logger.WARNING)


def compile_plan(trt: ModuleType, model: Path, options: EngineOptions) -> Any:
    """Serialized engine of an ONNX file, with one profile for batches of 1 to rows_max. Raises EngineError."""
    builder = trt.Builder(_logger(trt))
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, _logger(trt))
    if not parser.parse_from_file(str(model)):
        problems = [parser.get_error(number).desc() for number in range(min(parser.num_errors, 3))]
        raise EngineError(f"TensorRT cannot read it: {'; '.join(problems)}")
    if network.num_outputs == 0:  # some bytes that are no model parse as an empty one
        raise EngineError("TensorRT cannot read it: it has no outputs")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    free = False
    for number in range(network.num_inputs):
        tensor = network.get_input(number)
        shape = tuple(tensor.shape)
        if -1 not in shape:
            continue
        free = True
        if -1 in shape[1:]:
            raise EngineError(f"input '{tensor.name}' {list(shape)} has a free dimension beside the batch")
        profile.set_shape(
            tensor.name,
            (1, *shape[1:]),
            (options.rows_preferred, *shape[1:]),
            (options.rows_max, *shape[1:]),
        )
    if free and config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT refuses batches of 1 to {options.rows_max} rows")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError("TensorRT cannot build it; the log says why")
    return plan


def _network_flags(trt: ModuleType) -> int:
    """Strong typing must be asked for in TensorRT 10 and is the only way from 11 on."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


@dataclass(slots=True, kw_only=True)
class _Buffer:
    """Memory of one tensor on both sides, for the largest batch. `host` is a view of `pinned` in the tensor's dtype."""

    spec: TensorSpec
    size: int
    device: int
    pinned: int
    host: Array


class TensorRTEngine:
    """One engine, one context, one stream. `run` is called by one thread at a time."""

    name = NAME
    concurrency = 1
    facts = EngineFacts(device="cuda:0")

    def __init__(self, trt: ModuleType, plan: Any, device: Device, options: EngineOptions) -> None:
        self._device = device
        self._stream = 0
        self._buffers: dict[str, _Buffer] = {}
        self._runtime = trt.Runtime(_logger(trt))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError("TensorRT refuses its own engine on this GPU; the log says why")
        inputs, outputs = _signature(trt, self._engine)
        self.signature = Signature(inputs=inputs, outputs=outputs)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError("TensorRT cannot make an execution context; is the GPU's memory full?")
        try:
            self._stream = device.stream()
            for spec in (*inputs, *outputs):
                self._buffers[spec.name] = self._allocate(spec, options.rows_max)
                if not self._context.set_tensor_address(spec.name, self._buffers[spec.name].device):
                    raise EngineError(f"TensorRT refuses the memory of '{spec.name}'")
        except BaseException:
            self.close()
            raise

    def _allocate(self, spec: TensorSpec, rows_max: int) -> _Buffer:
        shape = tuple(rows_max if place == 0 and dim == -1 else dim for place, dim in enumerate(spec.shape))
        if -1 in shape:
            raise EngineError(f"the size of '{spec.name}' {list(spec.shape)} is known only when it runs")
        size = max(math.prod(shape) * spec.datatype.itemsize, spec.datatype.itemsize)
        device = self._device.allocate(size)
        try:
            pinned = self._device.allocate_host(size)
        except EngineError:
            self._device.free(device)
            raise
        memory = memoryview((ctypes.c_char * size).from_address(pinned)).cast("B")
        host = np.frombuffer(memory, spec.datatype.dtype)
        return _Buffer(spec=spec, size=size, device=device, pinned=pinned, host=host)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """See Engine.run. One copy into pinned memory, one out of it."""
        if any(array.size == 0 for array in inputs.values()):
            return [self._empty(name) for name in outputs]
        self._device.enter()
        for name, array in inputs.items():
            self._upload(self._buffers[name], array)
        if not self._context.execute_async_v3(self._stream):
            raise EngineError("TensorRT did not start the batch; the log says why")
        shapes = [self._download(self._buffers[name]) for name in outputs]
        self._device.synchronize(self._stream)
        return [
            self._buffers[name].host[: math.prod(shape)].reshape(shape).copy()
            for name, shape in zip(outputs, shapes, strict=True)
        ]

    def _upload(self, buffer: _Buffer, array: Array) -> None:
        if array.nbytes > buffer.size:
            raise EngineError(f"input '{buffer.spec.name}' has {array.nbytes} bytes, {buffer.size} were reserved")
        np.copyto(buffer.host[: array.size].reshape(array.shape), array)
        self._device.to_device(buffer.device, buffer.pinned, array.nbytes, self._stream)
        if not self._context.set_input_shape(buffer.spec.name, array.shape):
            raise EngineError(f"TensorRT refuses shape {list(array.shape)} of input '{buffer.spec.name}'")

    def _download(self, buffer: _Buffer) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(buffer.spec.name))
        size = math.prod(shape) * buffer.spec.datatype.itemsize
        if min(shape, default=0) < 0 or size > buffer.size:
            raise EngineError(f"output '{buffer.spec.name}' has shape {list(shape)}, {buffer.size} bytes were reserved")
        self._device.to_host(buffer.pinned, buffer.device, size, self._stream)
        return shape

    def _empty(self, name: str) -> Array:
        spec = self._buffers[name].spec
        return np.empty((0, *spec.shape[1:]), spec.datatype.dtype)

    def close(self) -> None:
        """Give GPU and pinned memory back. Safe after a failed start."""
        self._device.enter()
        if self._stream:
            self._device.synchronize(self._stream)
        self._context = None
        self._engine = None
        self._runtime = None
        for buffer in self._buffers.values():
            self._device.free(buffer.device)
            self._device.free_host(buffer.pinned)
        self._buffers.clear()
        if self._stream:
            self._device.destroy_stream(self._stream)
            self._stream = 0
        self._device.close()


def _signature(trt: ModuleType, engine: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        kind = engine.get_tensor_dtype(name).name
        if kind not in _TYPES:
            raise EngineError(f"'{name}' is {kind}, which cannot be served")
        spec = TensorSpec(name=name, datatype=DATATYPES[_TYPES[kind]], shape=tuple(engine.get_tensor_shape(name)))
        (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(spec)
    return tuple(inputs), tuple(outputs)
