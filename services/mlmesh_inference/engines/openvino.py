"""OpenVINO on the CPU (extra `openvino`).

Its own default on a CPU with the instructions for it is BF16. Here it computes in the precision it is asked for, FP32
unless BF16 was declared, and what it says of itself afterwards is what is shown.

It computes in integers of 32 bits whatever the model says, and looks up indexes beyond a table without a word. So
models that give integers of 64 bits are refused, and integers of a request are looked at before they go in.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from mlmesh_inference.engines.base import Availability, EngineError, EngineFacts, EngineOptions, MemorySource, no_rows
from mlmesh_inference.engines.graph import IntegerGuard, read_graph
from mlmesh_inference.engines.memory import release_unused
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec

NAME: Final = "openvino"
_HINTS: Final = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_READ_BACK: Final = {"f32": "fp32", "f16": "fp16", "u8": "int8", "i8": "int8"}
_TYPES: Final = {
    "boolean": "BOOL",
    "u8": "UINT8",
    "u16": "UINT16",
    "i8": "INT8",
    "i16": "INT16",
    "i32": "INT32",
    "i64": "INT64",
    "f16": "FP16",
    "bf16": "BF16",
    "f32": "FP32",
}
_OUTPUTS_REFUSED: Final = frozenset({"INT64"})
_SHAPES_KEPT: Final = 32
"""Compiled shapes that are kept of each operator; its own default is 5000."""


_KERNELS_KEPT: Final = 64
"""Compiled kernels that are kept by the whole process."""


class OpenVinoKind:
    """Builds engines with OpenVINO's CPU plugin."""

    name = NAME
    precisions = ("fp32", "bf16")

    def probe(self) -> Availability:
        """Available where the package is installed; it is imported only when it is used."""
        if find_spec("openvino") is None:
            return Availability(available=False, reason="the package openvino is not installed (extra: openvino)")
        try:
            found = version("openvino")
        except PackageNotFoundError:
            found = "unknown"
        return Availability(available=True, reason=f"OpenVINO {found} is installed", version=found)

    def build(self, model: Path, options: EngineOptions) -> OpenVinoEngine:
        """Compile an ONNX file for the CPU; takes about a second for MiniLM."""
        return OpenVinoEngine(model, options)


@cache
def _core(openvino: Any) -> Any:
    """One a process: it holds the plugins.

    The library below it keeps compiled kernels by shape, 1024 of them for the process, unloaded models' among them; it
    reads how many from the environment, and only once. Measured: 64 cost no speed and end the growth.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS_KEPT))
    return openvino.Core()


class OpenVinoEngine:
    """One compiled model with a stream, and a request object, for every `run` at once.

    Its streams have threads of their own. They are not bound to cores, which is its default: that made no difference
    that could be measured, and beside a sidecar and an event loop a bound thread waits while another core is free.
    """

    name = NAME

    def __init__(self, model: Path, options: EngineOptions) -> None:
        graph = read_graph(model)
        try:
            self._openvino = importlib.import_module("openvino")
            core = _core(self._openvino)
            compiled = core.compile_model(core.read_model(str(model)), "CPU", _properties(options))
            self.signature = Signature(
                inputs=tuple(_spec(port, "input") for port in compiled.inputs),
                outputs=tuple(_spec(port, "output") for port in compiled.outputs),
            )
            self._requests = [compiled.create_infer_request() for _ in range(options.concurrency)]
        except EngineError:
            raise
        except Exception as error:  # the bindings raise RuntimeError, ImportError and what Python has
            text = str(error).replace(str(model), model.name)
            raise EngineError(f"OpenVINO cannot load it: {text}") from error
        self.concurrency = options.concurrency
        self._compiled = compiled
        self._places = {spec.name: place for place, spec in enumerate(self.signature.outputs)}
        self._brains = frozenset(spec.name for spec in self.signature.inputs if spec.datatype.name == "BF16")
        self._guard = IntegerGuard(graph, self.signature)
        self.facts = EngineFacts(
            precision=_precision(compiled) or graph.precision or self.signature.outputs[0].datatype.name.lower(),
            memory_bytes=graph.weight_bytes,
            memory_source=MemorySource.WEIGHTS,
        )

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """See Engine.run. Inputs are read where they lie; results are copied out of the request's own memory."""
        if self.signature.batches and any(len(array) == 0 for array in inputs.values()):
            return [no_rows(self.signature.outputs[self._places[name]]) for name in outputs]
        self._guard.check(inputs)
        request = self._requests.pop()
        try:
            feed = {name: self._fed(name, array) for name, array in inputs.items()}
            request.infer(feed, share_inputs=True, share_outputs=True)
            return [self._taken(request, name) for name in outputs]
        except Exception as error:
            raise EngineError(f"OpenVINO: {error}") from error
        finally:
            self._requests.append(request)

    def _fed(self, name: str, array: Array) -> Any:
        array = np.ascontiguousarray(array)
        if name not in self._brains:
            return array
        return self._openvino.Tensor(array, array.shape, self._openvino.Type.bf16)

    def _taken(self, request: Any, name: str) -> Array:
        place = self._places[name]
        tensor = request.get_output_tensor(place)
        kind = self.signature.outputs[place].datatype
        data: Array = tensor.data
        return data.view(kind.dtype).copy() if data.dtype.itemsize == kind.dtype.itemsize else data.astype(kind.dtype)

    def close(self) -> None:
        """Drop the compiled model with its streams."""
        self._requests.clear()
        self._compiled = None
        release_unused()


def _properties(options: EngineOptions) -> dict[str, Any]:
    if options.precision not in OpenVinoKind.precisions:
        raise EngineError(f"OpenVINO's CPU plugin is not asked for {options.precision} here")
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[options.precision],
        "NUM_STREAMS": options.concurrency,
        "INFERENCE_NUM_THREADS": options.concurrency * options.threads,
        "ENABLE_CPU_PINNING": False,
        "CPU_RUNTIME_CACHE_CAPACITY": _SHAPES_KEPT,
    }


def _precision(compiled: Any) -> str:
    """What most multiplications run in, read from the graph that was compiled; "" when it has none."""
    counts: dict[str, int] = {}
    for operator in compiled.get_runtime_model().get_ordered_ops():
        info = operator.get_rt_info()
        if "layerType" in info and info["layerType"].astype(str) in ("FullyConnected", "MatMul", "Convolution"):
            said = info["runtimePrecision"].astype(str)
            counts[said] = counts.get(said, 0) + 1
    if not counts:
        return ""
    most = max(counts, key=lambda name: counts[name])
    return _READ_BACK.get(most, most)


def _spec(port: Any, side: str) -> TensorSpec:
    name = _TYPES.get(port.element_type.get_type_name())
    if name is None or (side == "output" and name in _OUTPUTS_REFUSED):
        raise EngineError(
            f"{side} '{port.any_name}' is {port.element_type.get_type_name()}, which it does not compute in"
        )
    shape = tuple(-1 if dim.is_dynamic else dim.get_length() for dim in port.partial_shape)
    return TensorSpec(name=port.any_name, datatype=DATATYPES[name], shape=shape)
