"""FP64 in a model: TensorRT has none, and its parser makes FP32 of it without an error. Here it is refused.

Single numbers in FP64, which exporters leave behind, are let through: what comes of them is compared anyway.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.onnx_wire import Span, fields, read_number, read_numbers, read_text

_DOUBLE: Final = 11  # TensorProto.DataType
_GRAPH, _INITIALIZER, _INPUT, _OUTPUT = 7, 5, 11, 12


def refuse_doubles(model: Path) -> None:
    """Raises EngineError that names the first input, output or weight in FP64. What is no model is passed over."""
    if model.stat().st_size == 0:
        return
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        try:
            name = _first(memory)
        except (IndexError, UnicodeDecodeError, ValueError):
            return  # the parser says what is wrong with it
    if name:
        raise EngineError(f"'{name}' is FP64, of which TensorRT would make FP32")


def _first(memory: mmap.mmap) -> str:
    for number, value in fields(memory, (0, len(memory))):
        if number == _GRAPH and isinstance(value, tuple):
            for part, span in fields(memory, value):
                if not isinstance(span, tuple):
                    continue
                if part == _INITIALIZER and _is_double_array(memory, span):
                    return _text(memory, span, 8) or "a weight"
                if part in (_INPUT, _OUTPUT) and _value_kind(memory, span) == _DOUBLE:
                    return _text(memory, span, 1) or "a tensor"
    return ""


def _is_double_array(memory: mmap.mmap, span: Span) -> bool:
    kind, dims = 0, list[int]()
    for number, value in fields(memory, span):
        if number == 1:
            dims += read_numbers(memory, value)
        elif number == 2:
            kind = read_number(value)
    return kind == _DOUBLE and math.prod(dims) > 1


def _value_kind(memory: mmap.mmap, span: Span) -> int:
    """TypeProto of a ValueInfoProto, its tensor_type, and the elem_type of that."""
    for number in (2, 1):
        found = next((value for place, value in fields(memory, span) if place == number), None)
        if not isinstance(found, tuple):
            return 0
        span = found
    return next((read_number(value) for number, value in fields(memory, span) if number == 1), 0)


def _text(memory: mmap.mmap, span: Span, number: int) -> str:
    return next((read_text(memory, value) for place, value in fields(memory, span) if place == number), "")
