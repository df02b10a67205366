"""What `tensorrt` 10 and 11 and `tensorrt_rtx` have in common: the module, its logger, and how it names things.

Whatever only one of them has is asked for by `hasattr`, so that one backend serves all.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import deque
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any, Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.tensors import DATATYPES, TensorSpec

MODULES: Final = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
TYPES: Final = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "BF16": "BF16",
    "INT8": "INT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "UINT8": "UINT8",
    "BOOL": "BOOL",
}
_PRECISIONS: Final = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "FP8": "fp8",
    "INT8": "int8",
    "INT4": "int4",
    "FP4": "fp4",
}
_QUANTISED: Final = frozenset({"int8", "int4", "fp8", "fp4"})
_WORDS: Final = re.compile(r"\b(FP32|FP16|BF16|Float|Half|BFloat16|FP8|Int8|INT8|Int4|INT4|FP4)\b")
_SPELLINGS: Final = {"float": "fp32", "half": "fp16", "bfloat16": "bf16"}
_ORDER: Final = ("fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4", "int4")
_MESSAGES_MAX: Final = 8


def load_module() -> ModuleType:
    """The first of the packages that can be imported. Raises EngineError."""
    problems = []
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            problems.append(f"{name}: {error}")
    raise EngineError("no TensorRT package can be imported: " + "; ".join(problems))


def flavour(trt: ModuleType) -> str:
    """The name "tensorrt" or "tensorrt_rtx": what a plan belongs to, beside the version."""
    return "tensorrt_rtx" if trt.__name__.startswith("tensorrt_rtx") else "tensorrt"


class Messages:
    """The last errors that TensorRT told: the only place where it says why something failed."""

    def __init__(self) -> None:
        self._kept: deque[str] = deque(maxlen=_MESSAGES_MAX)

    def add(self, message: str) -> None:
        """Keep one."""
        self._kept.append(" ".join(message.split())[:500])

    def take(self, otherwise: str) -> str:
        """All since the last time, in order, or the other text when there was none."""
        text = "; ".join(self._kept)
        self._kept.clear()
        return text or otherwise


MESSAGES: Final = Messages()


@cache
def logger(trt: ModuleType) -> Any:
    """One logger a process: TensorRT uses the first and ignores others. It keeps errors and drops the rest."""
    severities = trt.ILogger.Severity

    class _Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (severities.ERROR, severities.INTERNAL_ERROR):
                MESSAGES.add(message)

    return _Logger()


def signature_of(trt: ModuleType, engine: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an engine. Raises EngineError for a type that cannot be served."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for number in range(engine.num_io_tensors):
        name = engine.get_tensor_name(number)
        kind = engine.get_tensor_dtype(name).name
        spec = TensorSpec(
            name=name, datatype=DATATYPES[datatype(name, kind)], shape=tuple(engine.get_tensor_shape(name))
        )
        (inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs).append(spec)
    return tuple(inputs), tuple(outputs)


def datatype(tensor: str, kind: str) -> str:
    """The protocol's name of a datatype of TensorRT's. Raises EngineError for one that cannot be served."""
    if kind not in TYPES:
        raise EngineError(f"'{tensor}' is {kind}, which cannot be served")
    return TYPES[kind]


def precisions_of_network(network: Any) -> tuple[str, ...]:
    """Precisions of the arithmetic, as the strongly typed graph has them.

    Types of 8 bits and fewer count where a layer quantises to them; elsewhere they are data.
    """
    found: set[str] = set()
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        quantises = "QUANTIZE" in layer.type.name
        for place in range(layer.num_outputs):
            name = _PRECISIONS.get(layer.get_output(place).dtype.name, "")
            if name and (quantises or name not in _QUANTISED):
                found.add(name)
    return sort_precisions(found)


def precisions_of_engine(trt: ModuleType, engine: Any) -> tuple[str, ...]:
    """Precisions as the engine's inspector tells them; empty when this build does not tell."""
    try:
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        layers = json.loads(text).get("Layers", [])
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return ()
    found: set[str] = set()
    for layer in layers:
        if isinstance(layer, dict):
            for tensor in (*layer.get("Inputs", ()), *layer.get("Outputs", ())):
                said = str(tensor.get("Format/Datatype", "")) + " " + str(tensor.get("Datatype", ""))
                found |= {_SPELLINGS.get(word.lower(), word.lower()) for word in _WORDS.findall(said)}
    return sort_precisions(found)


def with_tf32(found: Iterable[str]) -> tuple[str, ...]:
    """With FP32 called what it is multiplied in, where that was allowed; neither graph nor inspector tells."""
    return sort_precisions("tf32" if name == "fp32" else name for name in found)


def sort_precisions(found: Iterable[str]) -> tuple[str, ...]:
    """Widest first."""
    return tuple(sorted(set(found), key=_ORDER.index))
