"""Tensors of the Open Inference Protocol from and to numpy.

BYTES are object arrays of `bytes` (given as `str`, they are sent as UTF-8). BF16 arrives as `ml_dtypes.bfloat16` where
that package is installed, as `uint16` with the same bits where it is not; it is sent from either, or rounded from FP32.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlmesh_client.errors import InferenceError, ServerError, invalid
from open_inference import grpc_service_pb2 as pb

Array: TypeAlias = NDArray[Any]

_BYTES: Final = "BYTES"
_BF16: Final = "BF16"
_LENGTH: Final = struct.Struct("<I")
DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""numpy types of the datatypes that have one."""
_CONTENTS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    _BYTES: "bytes_contents",
}


def _bfloat16() -> np.dtype[Any] | None:
    try:
        module: Any = importlib.import_module("ml_dtypes")
    except ImportError:
        return None
    found: np.dtype[Any] = np.dtype(module.bfloat16)
    return found


BFLOAT16: Final = _bfloat16()
"""numpy's bfloat16, where ml_dtypes is installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What a model says of one tensor: `shape` includes the batch dimension, -1 is any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.datatype}{show(self.shape)}"


def show(shape: Sequence[int]) -> str:
    """A shape as text: [-1,16]."""
    return "[" + ",".join(map(str, shape)) + "]"


def datatype_of(array: Array, name: str) -> str:
    """The datatype of an array by itself. Raises InvalidInput where there is none."""
    if array.dtype.kind in "OSU":
        return _BYTES
    if array.dtype == BFLOAT16:
        return _BF16
    for datatype, dtype in DTYPES.items():
        if array.dtype == dtype:
            return datatype
    raise invalid(f"input '{name}' is {array.dtype}, which has no datatype", f"inputs[{name}].datatype")


def convert(value: Any, spec: TensorSpec) -> Array:
    """What a caller gave, as an array of the model's datatype. Raises InvalidInput that says what does not fit.

    Integers become floats, floats of one size those of another; a value that would change (a fraction for an integer, a
    number out of range) is refused.
    """
    array = _array(value, spec)
    if len(array.shape) != len(spec.shape) or any(
        want not in (dim, -1) for dim, want in zip(array.shape, spec.shape, strict=False)
    ):
        hint = ""
        if len(array.shape) == len(spec.shape) - 1 and spec.shape[0] == -1:
            hint = "; the first dimension is the batch: give x[None]"
        raise invalid(
            f"input '{spec.name}' takes shape {show(spec.shape)}, got {show(array.shape)}{hint}",
            f"inputs[{spec.name}].shape",
        )
    return array


def _array(value: Any, spec: TensorSpec) -> Array:
    if spec.datatype == _BYTES:
        return _strings(value, spec)
    if spec.datatype != _BF16 and spec.datatype not in DTYPES:
        raise invalid(f"input '{spec.name}' is of unknown datatype {spec.datatype}", f"inputs[{spec.name}].datatype")
    try:
        given = np.asarray(value)
    except ValueError as error:
        raise invalid(f"input '{spec.name}' is no tensor: {error}", f"inputs[{spec.name}]") from None
    if spec.datatype == _BF16:
        return _to_bf16(given, spec)
    wanted = DTYPES[spec.datatype]
    if given.dtype == wanted:
        return given
    if not given.size:
        return given.astype(wanted)
    return _cast(given, wanted, spec)


def _cast(given: Array, wanted: np.dtype[Any], spec: TensorSpec) -> Array:
    kinds = {"b": "biuf", "i": "iuf", "u": "iuf", "f": "f"}
    if wanted.kind not in kinds.get(given.dtype.kind, "") or (wanted.kind == "b" and given.dtype.kind != "b"):
        raise invalid(f"input '{spec.name}' takes {spec.datatype}, got {given.dtype}", f"inputs[{spec.name}].datatype")
    with np.errstate(over="ignore", invalid="ignore"):
        cast: Array = given.astype(wanted)
    changed = (
        not np.array_equal(cast, given) if wanted.kind in "iu" else bool(np.any(np.isinf(cast) & ~np.isinf(given)))
    )
    if changed:
        raise invalid(
            f"input '{spec.name}' takes {spec.datatype}, got a {given.dtype} out of its range", f"inputs[{spec.name}]"
        )
    return cast


def _strings(value: Any, spec: TensorSpec) -> Array:
    if isinstance(value, str | bytes):
        given = np.empty((), object)
        given[()] = value
    else:
        given = value if isinstance(value, np.ndarray) else np.array(value, dtype=object)
    elements = [element.encode() if isinstance(element, str) else element for element in given.ravel().tolist()]
    for element in elements:
        if not isinstance(element, bytes):
            kind = type(element).__name__
            message = f"input '{spec.name}' takes BYTES, got {kind}: give bytes or str, all of one shape"
            raise invalid(message, f"inputs[{spec.name}].datatype")
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(given.shape)


def _to_bf16(given: Array, spec: TensorSpec) -> Array:
    """uint16 with the bits."""
    if given.dtype == BFLOAT16:
        return given.view(np.uint16)
    if given.dtype == np.uint16:
        return given
    bits = _cast(given, np.dtype("<f4"), spec).view(np.uint32)
    # To the nearest, to even where it is halfway; NaN stays NaN.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def raw(array: Array, datatype: str) -> bytes:
    """Raw contents: row-major, little-endian, strings with their lengths."""
    if datatype != _BYTES:
        return array.tobytes()
    pieces: list[bytes] = []
    for element in array.ravel():
        pieces += (_LENGTH.pack(len(element)), element)
    return b"".join(pieces)


def outputs(response: pb.ModelInferResponse) -> dict[str, Array]:
    """Tensors of an answer by name, raw or typed. Numbers in raw contents are views of them: read-only, without a copy.

    Raises ServerError for an answer that is not in order.
    """
    found: dict[str, Array] = {}
    contents = response.raw_output_contents
    for place, tensor in enumerate(response.outputs):
        try:
            if place < len(contents):
                array = _from_raw(contents[place], tensor.datatype, tuple(tensor.shape))
            else:
                array = _from_typed(tensor)
        except (ValueError, TypeError, KeyError, struct.error) as error:
            raise ServerError(
                f"the answer's tensor '{tensor.name}' {tensor.datatype}{show(tensor.shape)} cannot be read: {error}",
                code="INTERNAL",
            ) from None
        found[tensor.name] = array
    return found


def _from_raw(data: bytes, datatype: str, shape: tuple[int, ...]) -> Array:
    if datatype == _BYTES:
        return _object_array(_split(data), shape)
    array: Array = np.frombuffer(data, np.dtype("<u2") if datatype == _BF16 else DTYPES[datatype]).reshape(shape)
    return array.view(BFLOAT16) if datatype == _BF16 and BFLOAT16 is not None else array


def _split(data: bytes) -> list[bytes]:
    elements, place = [], 0
    while place < len(data):
        (length,) = _LENGTH.unpack_from(data, place)
        place += 4
        if length > len(data) - place:
            raise ValueError("a string is cut off")
        elements.append(data[place : place + length])
        place += length
    return elements


def _from_typed(tensor: pb.ModelInferResponse.InferOutputTensor) -> Array:
    values = list(getattr(tensor.contents, _CONTENTS[tensor.datatype]))
    if tensor.datatype == _BYTES:
        return _object_array(values, tuple(tensor.shape))
    return np.array(values, DTYPES[tensor.datatype]).reshape(tuple(tensor.shape))


def _object_array(elements: Sequence[bytes], shape: tuple[int, ...]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


__all__ = ["BFLOAT16", "DTYPES", "Array", "InferenceError", "TensorSpec", "convert", "outputs", "raw", "show"]
