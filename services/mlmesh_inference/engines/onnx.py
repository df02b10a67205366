"""ONNX Runtime, on the CPU and on NVIDIA GPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from mlmesh_inference.engines.base import Availability, EngineError, EngineFacts, EngineOptions, MemorySource
from mlmesh_inference.engines.cuda import gpu_name
from mlmesh_inference.engines.graph import read_graph
from mlmesh_inference.engines.memory import release_unused
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec, object_array

NAME: Final = "onnxruntime-cpu"
CUDA_NAME: Final = "onnxruntime-cuda"
_CUDA: Final = "CUDAExecutionProvider"

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
    precisions = ("fp32",)

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


class OnnxCudaKind:
    """Builds engines with ONNX Runtime's CUDA provider, which the distribution onnxruntime-gpu brings."""

    name = CUDA_NAME
    precisions = ("fp32",)

    def probe(self) -> Availability:
        """Look for the provider, a driver and a GPU."""
        try:
            import onnxruntime  # noqa: PLC0415
        except ImportError as error:
            return Availability(available=False, reason=f"onnxruntime cannot be imported: {error}")
        version = onnxruntime.__version__
        if _CUDA not in onnxruntime.get_available_providers():
            reason = "this onnxruntime has no CUDA provider; onnxruntime-gpu brings it"
            return Availability(available=False, reason=reason, version=version)
        try:
            gpu = gpu_name()
        except EngineError as error:
            return Availability(available=False, reason=str(error), version=version)
        return Availability(available=True, reason=f"ONNX Runtime's CUDA provider runs on {gpu}", version=version)

    def build(self, model: Path, options: EngineOptions) -> OnnxEngine:
        """Load an ONNX file for the first GPU; FP32 is computed in FP32, not in TF32."""
        return OnnxEngine(model, options, cuda=True)


class OnnxEngine:
    """One session. ONNX Runtime runs it from several threads at once, so concurrency costs no second copy.

    Measured with MiniLM on two cores, one session that two threads call does what two sessions do, and both beat one
    session with two threads of its own. Outputs that are allocated before and bound (IoBinding) gain nothing that shows
    on the CPU; batches of a shape not seen before would lose.
    """

    def __init__(self, model: Path, options: EngineOptions, *, cuda: bool = False) -> None:
        import onnxruntime as ort  # noqa: PLC0415

        self.name = CUDA_NAME if cuda else NAME
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.inter_op_num_threads = 1
        # Idle threads that spin take the CPU from the event loop and from the sidecar.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.log_severity_level = 3
        try:
            self._session = ort.InferenceSession(str(model), settings, providers=_providers(cuda))
            self.signature = Signature(
                inputs=tuple(_spec(node) for node in self._session.get_inputs()),
                outputs=tuple(_spec(node) for node in self._session.get_outputs()),
            )
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            text = str(error).replace(str(model), model.name)
            raise EngineError(f"ONNX Runtime cannot load it: {text}") from error
        if cuda and self._session.get_providers()[0] != _CUDA:  # it falls back without a word
            raise EngineError("ONNX Runtime's CUDA provider does not start; its log says why")
        self.concurrency = options.concurrency
        self._value = ort.OrtValue
        self._inputs = {spec.name: spec.datatype for spec in self.signature.inputs}
        self._outputs = {spec.name: spec.datatype for spec in self.signature.outputs}
        if _BYTES in self._inputs.values() and _BF16 in self._outputs.values():
            raise EngineError("ONNX Runtime takes no BYTES from Python in a run that gives BF16")
        graph = read_graph(model)
        self.facts = EngineFacts(
            # The CPU provider computes in the types of the file.
            precision=graph.precision or self.signature.outputs[0].datatype.name.lower(),
            device=f"cuda:0 {gpu_name()}" if cuda else "cpu",
            memory_bytes=graph.weight_bytes,
            memory_source=MemorySource.WEIGHTS,
        )

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """See Engine.run. Strings are UTF-8 in ONNX: other bytes are refused."""
        try:
            feed = {name: self._fed(name, array) for name, array in inputs.items()}
            kinds = [self._outputs[name] for name in outputs]
            if _BF16 in kinds:
                return self._run_values(feed, outputs)
            results: list[Array] = self._session.run(outputs, feed)
            if _BYTES in kinds:
                return [_plain(array) for array in results]
        except Exception as error:
            raise EngineError(f"ONNX Runtime: {error}") from error
        return results

    def _fed(self, name: str, array: Array) -> Any:
        """What ONNX Runtime takes: the array itself, but for the two datatypes that numpy has not got."""
        kind = self._inputs[name]
        if kind is _BYTES:
            return object_array([element.decode() for element in array.ravel()], array.shape)
        if kind is _BF16:
            return self._value.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), _ONNX_BFLOAT16)
        return array

    def _run_values(self, feed: Mapping[str, Any], outputs: Sequence[str]) -> list[Array]:
        """Run with OrtValues, the only way to get BF16 out."""
        values = {
            name: self._value.ortvalue_from_numpy(value) if isinstance(value, np.ndarray) else value
            for name, value in feed.items()
        }
        results = self._session.run_with_ort_values(list(outputs), values)
        return [
            _brain_floats(result) if result.element_type() == _ONNX_BFLOAT16 else _plain(result.numpy())
            for result in results
        ]

    def close(self) -> None:
        """Drop the session; its memory goes with it."""
        del self._session
        release_unused()


def _providers(cuda: bool) -> list[Any]:
    if not cuda:
        return ["CPUExecutionProvider"]
    # Its default computes FP32 in TF32 and doubles its memory whenever it needs more.
    return [(_CUDA, {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}), "CPUExecutionProvider"]


def _plain(array: Array) -> Array:
    """Strings as bytes, everything else as it is."""
    if not array.dtype.hasobject:
        return array
    return object_array([element.encode() for element in array.ravel()], array.shape)


def _spec(node: Any) -> TensorSpec:
    name = _TYPES.get(node.type)
    if name is None:
        raise EngineError(f"'{node.name}' is a {node.type}, which cannot be served")
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    return TensorSpec(name=node.name, datatype=DATATYPES[name], shape=shape)


def _brain_floats(result: Any) -> Array:
    size = result.tensor_size_in_bytes()
    if size == 0:
        return np.empty(tuple(result.shape()), _BF16.dtype)
    memory = (ctypes.c_char * size).from_address(result.data_ptr())
    return np.frombuffer(memory, _BF16.dtype).reshape(result.shape()).copy()
