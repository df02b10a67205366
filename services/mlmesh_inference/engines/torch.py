"""torch on the CPU (extra `torch`): an ONNX file, translated into torch functions; eager or compiled.

torch is imported when an engine is built, and takes some hundred MB with it; the probe only looks whether it is there.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from mlmesh_inference.engines.base import Availability, EngineError, EngineFacts, EngineOptions, MemorySource, no_rows
from mlmesh_inference.engines.graph import IntegerGuard, read_graph
from mlmesh_inference.engines.memory import release_unused
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec

NAME: Final = "torch"
COMPILED_NAME: Final = "torch-compiled"
_TYPES: Final = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    16: "BF16",
}


class TorchKind:
    """Builds engines with torch on the CPU.

    Args:
        compiled: by torch.compile, which needs a C++ compiler and takes a minute for MiniLM; so it runs only where a
            model declares it.
    """

    precisions = ("fp32", "bf16")

    def __init__(self, *, compiled: bool = False) -> None:
        self.name = COMPILED_NAME if compiled else NAME
        self.declared_only = compiled
        self._compiled = compiled

    def probe(self) -> Availability:
        """Available where torch and onnx are installed, and for the compiled one a C++ compiler."""
        missing = [name for name in ("torch", "onnx") if find_spec(name) is None]
        if missing:
            return Availability(available=False, reason=f"not installed (extra: torch): {', '.join(missing)}")
        try:
            found = version("torch")
        except PackageNotFoundError:
            found = "unknown"
        if self._compiled and shutil.which("c++") is None and shutil.which("g++") is None:
            return Availability(available=False, reason="torch.compile needs a C++ compiler", version=found)
        return Availability(available=True, reason=f"torch {found} is installed", version=found)

    def build(self, model: Path, options: EngineOptions) -> TorchEngine:
        """Translate an ONNX file. A compiled one compiles at its first run of one row, and of several."""
        return TorchEngine(model, options, compiled=self._compiled)


class TorchEngine:
    """One module, which any number of threads run at once; its weights are there once."""

    def __init__(self, model: Path, options: EngineOptions, *, compiled: bool = False) -> None:
        self.name = COMPILED_NAME if compiled else NAME
        self.concurrency = options.concurrency
        graph = read_graph(model)
        try:
            import onnx  # noqa: PLC0415  heavy, and only where it is used
            import torch  # noqa: PLC0415

            from mlmesh_inference.engines.translate import translate  # noqa: PLC0415

            self._torch = torch
            proto = onnx.load(str(model))
            self.signature = Signature(
                inputs=tuple(_spec(each) for each in proto.graph.input if each.name in graph.inputs),
                outputs=tuple(_spec(each) for each in proto.graph.output),
            )
            self._compute = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(options.precision)
            if self._compute is None:
                raise EngineError(f"torch is not asked for {options.precision} here")
            torch.set_num_threads(options.threads)
            module = translate(proto, compute=self._compute)
            self._bytes = sum(tensor.nbytes for tensor in module.buffers())
            self._module: Any = torch.compile(module, dynamic=True) if compiled else module
        except EngineError:
            raise
        except Exception as error:  # torch and onnx raise what they like
            raise EngineError(f"torch cannot load it: {str(error).replace(str(model), model.name)}") from error
        self._places = {spec.name: place for place, spec in enumerate(self.signature.outputs)}
        self._guard = IntegerGuard(graph, self.signature)
        self.facts = EngineFacts(
            precision=_precision(module, graph.precision or self.signature.outputs[0].datatype.name.lower()),
            memory_bytes=self._bytes,
            memory_source=MemorySource.WEIGHTS,
        )

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """See Engine.run."""
        if self.signature.batches and any(len(array) == 0 for array in inputs.values()):
            return [no_rows(self.signature.outputs[self._places[name]]) for name in outputs]
        self._guard.check(inputs)
        try:
            with self._torch.inference_mode():
                results = self._module(*(self._fed(spec, inputs[spec.name]) for spec in self.signature.inputs))
                return [self._taken(results[self._places[name]], name) for name in outputs]
        except Exception as error:
            raise EngineError(f"torch: {error}") from error

    def _fed(self, spec: TensorSpec, array: Array) -> Any:
        # torch warns of arrays that may not be written to, as requests' are.
        array = np.ascontiguousarray(array) if array.flags.writeable else array.copy()
        tensor = self._torch.from_numpy(array)
        if spec.datatype.name == "BF16":
            return tensor.view(self._torch.bfloat16)
        return tensor.to(self._compute) if spec.datatype.name == "FP32" else tensor

    def _taken(self, result: Any, name: str) -> Array:
        torch = self._torch
        spec = self.signature.outputs[self._places[name]]
        if not isinstance(result, torch.Tensor):
            result = torch.tensor(result)
        if spec.datatype.name == "BF16":
            result = result.view(torch.uint16)
        elif spec.datatype.name == "FP32":
            result = result.float()
        # A result may be an input or a weight itself.
        array: Array = result.numpy().copy()
        return array

    def close(self) -> None:
        """Drop the module with its weights."""
        self._module = None
        release_unused()


def _precision(module: Any, otherwise: str) -> str:
    """Of the weights that most is computed with; `otherwise` when there are none that tell."""
    elements: dict[str, int] = {}
    for tensor in module.buffers():
        if tensor.is_floating_point():
            elements[str(tensor.dtype)] = elements.get(str(tensor.dtype), 0) + tensor.numel()
    names = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float64": "fp64"}
    return names[max(elements, key=lambda name: elements[name])] if elements else otherwise


def _spec(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    if kind.elem_type not in _TYPES:
        raise EngineError(f"'{value.name}' has a type that torch is not given here")
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return TensorSpec(name=value.name, datatype=DATATYPES[_TYPES[kind.elem_type]], shape=shape)
