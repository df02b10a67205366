"""ONNX Runtime on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mlmesh_inference.engines.base import Availability, EngineError, EngineOptions
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec, object_array

NAME: Final = "onnxruntime-cpu"

_TYPES: Final = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
_BF16: Final = DATATYPES["BF16"]
_BYTES: Final = DATATYPES["BYTES"]
_ONNX_BFLOAT16: Final = 16  # onnx.TensorProto.BFLOAT16


class OnnxKind:
    """Builds engines with ONNX Runtime's CPU provider."""

    name = NAME

    def probe(self) -> Availability:
        """Available wherever onnxruntime is installed."""
        try:
            import onnxruntime  # noqa: PLC0415  the only place that needs it
        except ImportError as error:
            return Availability(available=False, reason=f"onnxruntime cannot be imported: {error}")
        return Availability(available=True, reason="ONNX Runtime runs on any CPU", version=onnxruntime.__version__)

    def build(self, model: Path, options: EngineOptions) -> OnnxEngine:
        """Load an ONNX file; files it refers to must lie beside it."""
        return OnnxEngine(model, options)


class OnnxEngine:
    """One session. ONNX Runtime runs it from several threads at once, so concurrency costs no second copy."""

    name = NAME

    def __init__(self, model: Path, options: EngineOptions) -> None:
        import onnxruntime as ort  # noqa: PLC0415

        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        # Idle threads that spin take the CPU from the event loop and from the sidecar.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(model), settings, providers=["CPUExecutionProvider"])
            self.signature = Signature(
                inputs=tuple(_spec(node) for node in self._session.get_inputs()),
                outputs=tuple(_spec(node) for node in self._session.get_outputs()),
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            text = str(error).replace(str(model), model.name)
            raise EngineError(f"ONNX Runtime cannot load it: {text}") from error
        self.concurrency = options.concurrency
        self._ort = ort
        tensors = (*self.signature.inputs, *self.signature.outputs)
        self._brain_floats = any(spec.datatype is _BF16 for spec in tensors)
        self._strings = frozenset(spec.name for spec in self.signature.inputs if spec.datatype is _BYTES)
        self._string_outputs = frozenset(spec.name for spec in self.signature.outputs if spec.datatype is _BYTES)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """See Engine.run. Strings are UTF-8 in ONNX: other bytes are refused."""
        try:
            feed = {name: _text(array) if name in self._strings else array for name, array in inputs.items()}
            if self._brain_floats:
                return self._run_values(feed, outputs)
            results: list[Array] = self._session.run(outputs, feed)
        except Exception as error:
            raise EngineError(f"ONNX Runtime: {error}") from error
        if self._string_outputs:
            return [
                _bytes(array) if name in self._string_outputs else array
                for name, array in zip(outputs, results, strict=True)
            ]
        return results

    def _run_values(self, feed: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run with OrtValues, which know BF16 as numpy does not."""
        value = self._ort.OrtValue
        kinds = {spec.name: spec.datatype for spec in self.signature.inputs}
        values = {
            name: value.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), _ONNX_BFLOAT16)
            if kinds[name] is _BF16
            else value.ortvalue_from_numpy(array)
            for name, array in feed.items()
        }
        results = self._session.run_with_ort_values(list(outputs), values)
        return [
            _brain_floats(result) if result.element_type() == _ONNX_BFLOAT16 else self._plain(result)
            for result in results
        ]

    @staticmethod
    def _plain(result: Any) -> Array:
        array: Array = result.numpy()
        return _bytes(array) if array.dtype.hasobject else array

    def close(self) -> None:
        """Drop the session; its memory goes with it."""
        del self._session


def _spec(node: Any) -> TensorSpec:
    name = _TYPES.get(node.type)
    if name is None:
        raise EngineError(f"'{node.name}' is a {node.type}, which cannot be served")
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    return TensorSpec(name=node.name, datatype=DATATYPES[name], shape=shape)


def _text(array: Array) -> Array:
    return object_array([element.decode() for element in array.ravel()], array.shape)


def _bytes(array: Array) -> Array:
    return object_array([element.encode() for element in array.ravel()], array.shape)


def _brain_floats(result: Any) -> Array:
    size = result.tensor_size_in_bytes()
    if size == 0:
        return np.empty(tuple(result.shape()), _BF16.dtype)
    memory = (ctypes.c_char * size).from_address(result.data_ptr())
    return np.frombuffer(memory, _BF16.dtype).reshape(result.shape()).copy()
