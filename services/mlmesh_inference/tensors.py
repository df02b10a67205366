"""Tensors of the Open Inference Protocol as numpy arrays: datatypes, shapes, raw and typed contents. Pure numpy.

In memory BF16 is `uint16` (numpy has no such type) and BYTES is an object array of `bytes`; all others are the numpy
type of the same name, little-endian. Sizes are checked with Python integers before anything is allocated, so a shape
such as [2**31, 2**31] costs nothing but its refusal. Errors are InvalidInput (SHAPE_MISMATCH or INVALID_FIELD) and name
the tensor and both sizes, never its bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mlmesh_runtime.errors import InvalidInput

Array: TypeAlias = NDArray[Any]

RANK_MAX: Final = 16
"""Most dimensions of a tensor; the registry's signatures have the same bound."""
ELEMENTS_MAX: Final = 1 << 31
"""Most elements of a tensor: more cannot be carried by one message in any datatype."""

OBJECTS_MAX: Final = 1 << 20
"""Most elements of a BYTES tensor: each is an object of its own."""
CONVERTED_MAX: Final = 1 << 22
"""Most elements in typed contents that are converted one by one; there is no such bound for raw contents."""

_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Datatype:
    """A datatype of the protocol.

    Attributes:
        name: as requests spell it, such as "FP32".
        dtype: numpy type of the array in memory.
        itemsize: bytes of an element in raw contents; 0 for BYTES, whose elements carry their length.
        contents: field of InferTensorContents that holds it; "" for FP16 and BF16, which travel raw only.
    """

    name: str
    dtype: np.dtype[Any]
    itemsize: int
    contents: str


def _datatype(name: str, dtype: str, contents: str) -> Datatype:
    kind = np.dtype(dtype)
    return Datatype(name=name, dtype=kind, itemsize=0 if kind.hasobject else kind.itemsize, contents=contents)


DATATYPES: Final = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            _datatype("BOOL", "?", "bool_contents"),
            _datatype("UINT8", "u1", "uint_contents"),
            _datatype("UINT16", "<u2", "uint_contents"),
            _datatype("UINT32", "<u4", "uint_contents"),
            _datatype("UINT64", "<u8", "uint64_contents"),
            _datatype("INT8", "i1", "int_contents"),
            _datatype("INT16", "<i2", "int_contents"),
            _datatype("INT32", "<i4", "int_contents"),
            _datatype("INT64", "<i8", "int64_contents"),
            _datatype("FP16", "<f2", ""),
            _datatype("BF16", "<u2", ""),
            _datatype("FP32", "<f4", "fp32_contents"),
            _datatype("FP64", "<f8", "fp64_contents"),
            _datatype("BYTES", "O", "bytes_contents"),
        )
    }
)

# The message's own element type, where it is wider than the tensor's.
_WIDE = {"int_contents": np.dtype("<i4"), "uint_contents": np.dtype("<u4")}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """What a model says of one tensor: `shape` includes the batch dimension, -1 is variable."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Inputs and outputs of a model, in its own order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batches(self) -> bool:
        """Whether the first dimension of every tensor is a free batch dimension."""
        tensors = (*self.inputs, *self.outputs)
        return bool(self.inputs) and all(tensor.shape[:1] == (-1,) for tensor in tensors)


def datatype(name: str, *, tensor: str) -> Datatype:
    """Look a datatype up; `tensor` names the tensor in the error."""
    found = DATATYPES.get(name)
    if found is None:
        raise InvalidInput(
            f"input '{tensor}' has unknown datatype {name[:32]!r}, expected one of {', '.join(DATATYPES)}",
            field=f"inputs[{tensor}].datatype",
        )
    return found


def element_count(shape: Sequence[int], *, tensor: str) -> int:
    """Elements of a shape; 1 for a scalar, 0 where a dimension is 0.

    Refuses negative dimensions, more than RANK_MAX dimensions and more than ELEMENTS_MAX elements, which the other
    dimensions may not make either where one of them is 0.
    """
    field = f"inputs[{tensor}].shape"
    if len(shape) > RANK_MAX:
        message = f"input '{tensor}' has {len(shape)} dimensions, at most {RANK_MAX} are allowed"
        raise InvalidInput(message, field=field, reason="SHAPE_MISMATCH")
    for dim in shape:
        if dim < 0:
            message = f"input '{tensor}' has a negative dimension in shape {show(shape)}"
            raise InvalidInput(message, field=field, reason="SHAPE_MISMATCH")
    count = math.prod(shape)
    if count > ELEMENTS_MAX or (count == 0 and math.prod(dim for dim in shape if dim) > ELEMENTS_MAX):
        message = f"input '{tensor}' of shape {show(shape)} has more than {ELEMENTS_MAX} elements"
        raise InvalidInput(message, field=field, reason="SHAPE_MISMATCH")
    return count


def show(shape: Sequence[int]) -> str:
    """A shape as the protocol's error texts write it: [-1,16]."""
    return "[" + ",".join(map(str, shape)) + "]"


def decode_raw(kind: Datatype, shape: Sequence[int], raw: bytes | memoryview, *, tensor: str, model: str) -> Array:
    """Array over raw contents (row-major, little-endian, no padding), aligned.

    Without a copy, apart from BYTES and a memoryview that does not begin where the datatype must; over bytes read-only.
    """
    count = element_count(shape, tensor=tensor)
    if kind.itemsize == 0:
        return _decode_raw_bytes(shape, count, bytes(raw), tensor=tensor, model=model)
    expected = count * kind.itemsize
    if len(raw) != expected:
        raise InvalidInput(
            f"input byte size mismatch for input '{tensor}' for model '{model}'. Expected {expected}, got {len(raw)}",
            field=f"inputs[{tensor}]",
            reason="SHAPE_MISMATCH",
        )
    if count == 0:
        return np.empty(tuple(shape), kind.dtype)
    array = np.frombuffer(raw, kind.dtype).reshape(shape)
    return array if array.flags.aligned else array.copy()


def _decode_raw_bytes(shape: Sequence[int], count: int, raw: bytes, *, tensor: str, model: str) -> Array:
    """Each element is a four byte little-endian length and that many bytes, which may be none and may hold NUL."""
    _check_objects(count, tensor=tensor)
    size, place = len(raw), 0
    elements: list[bytes] = []
    # A count is believed only as far as the bytes can carry it: no element takes less than four.
    while place + 4 <= size and len(elements) <= count:
        (length,) = _LENGTH.unpack_from(raw, place)
        place += 4
        if length > size - place:
            raise InvalidInput(
                f"incomplete string data for inference input '{tensor}' for model '{model}': element {len(elements)} "
                f"of {length} bytes, {size - place} are left",
                field=f"inputs[{tensor}]",
                reason="SHAPE_MISMATCH",
            )
        elements.append(raw[place : place + length])
        place += length
    _check_strings(elements, count, tensor=tensor, model=model)
    if place != size:
        raise InvalidInput(
            f"incomplete string length indicator for inference input '{tensor}' for model '{model}', expecting 4 bytes "
            f"but only {size - place} bytes available",
            field=f"inputs[{tensor}]",
            reason="SHAPE_MISMATCH",
        )
    return object_array(elements, shape)


def _check_strings(elements: Sized, count: int, *, tensor: str, model: str) -> None:
    if len(elements) != count:
        raise InvalidInput(
            f"unexpected number of string elements {len(elements)} for inference input '{tensor}' for model "
            f"'{model}', expecting {count}",
            field=f"inputs[{tensor}]",
            reason="SHAPE_MISMATCH",
        )


def _check_objects(count: int, *, tensor: str) -> None:
    if count > OBJECTS_MAX:
        message = f"input '{tensor}' of BYTES has {count} elements, at most {OBJECTS_MAX} are allowed"
        raise InvalidInput(message, field=f"inputs[{tensor}].shape", reason="SHAPE_MISMATCH")


def object_array(elements: Sequence[object], shape: Sequence[int]) -> Array:
    """Array of Python objects; numpy would take nested sequences apart."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def decode_typed(kind: Datatype, shape: Sequence[int], values: Sequence[Any], *, tensor: str, model: str) -> Array:
    """Array from the typed field of InferTensorContents that `kind.contents` names. A value out of range is refused."""
    count = element_count(shape, tensor=tensor)
    if kind.itemsize == 0:
        _check_objects(count, tensor=tensor)
        _check_strings(values, count, tensor=tensor, model=model)
        return object_array(values, shape)
    if len(values) != count:
        raise InvalidInput(
            f"input byte size mismatch for input '{tensor}' for model '{model}'. Expected {count * kind.itemsize}, "
            f"got {len(values) * kind.itemsize}",
            field=f"inputs[{tensor}]",
            reason="SHAPE_MISMATCH",
        )
    if count > CONVERTED_MAX:
        raise InvalidInput(
            f"input '{tensor}' has {count} elements in typed contents, at most {CONVERTED_MAX} are allowed: send "
            "raw_input_contents",
            field=f"inputs[{tensor}].contents",
        )
    wide = _WIDE.get(kind.contents, kind.dtype)
    array = np.fromiter(values, wide, count)
    if wide != kind.dtype:
        narrow = array.astype(kind.dtype)
        if not np.array_equal(narrow, array):
            raise InvalidInput(
                f"input '{tensor}' for model '{model}' has a value out of the range of {kind.name}",
                field=f"inputs[{tensor}].contents",
            )
        array = narrow
    return array.reshape(shape)


def encode_raw(kind: Datatype, array: Array) -> bytes:
    """Raw contents of an array. The copy into bytes is the only one."""
    if kind.itemsize:
        return array.astype(kind.dtype, copy=False).tobytes()
    pieces: list[bytes] = []
    for element in array.ravel():
        pieces += (_LENGTH.pack(len(element)), element)
    return b"".join(pieces)


def encode_typed(array: Array) -> list[Any]:
    """Elements for the typed field of InferTensorContents, row-major."""
    elements: list[Any] = array.ravel().tolist()
    return elements


def classify(array: Array, classes: int, labels: Sequence[str], *, batched: bool) -> Array:
    """Turn scores into the `classes` best as BYTES "value:index[:label]", best first.

    Shape [rows, n] gives [rows, classes] when batched; otherwise all elements are one row and the shape is [classes].
    """
    rows = array.reshape(array.shape[0] if batched else 1, -1)
    classes = min(classes, rows.shape[1])
    number = "d" if array.dtype.kind in "iub" else "f"
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :classes]
    result = np.empty(best.shape, object)
    for row in range(best.shape[0]):
        for place, index in enumerate(best[row]):
            label = f":{labels[index]}" if index < len(labels) else ""
            result[row, place] = f"{rows[row, index]:{number}}:{index}{label}".encode()
    return result if batched else result[0]
