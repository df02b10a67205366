"""The protocol's messages as bytes: cut apart, bounded and put together without protobuf.

`split` cuts an encoded ModelInferRequest into what one client's requests repeat (the header: everything but `id` and
the contents) and what differs. It only ever cuts what it understands in full, so a header stands for the same
fields of the message whatever ids and contents were cut out of it: protobuf merges records of one field in their order,
and does not care for the order between fields.

The native front may offer the same function (`mlmesh_front.split`); its contract is this module's `split_python`, byte
for byte, and a test holds the two together. Where it is not installed the Python one is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from mlmesh_inference.tensors import Array, Datatype
from mlmesh_runtime.errors import InvalidInput

HEADER_BYTES_MAX: Final = 4096
"""Longest header that `split` gives; a longer one is hardly one that repeats."""
CONTENTS_MAX: Final = 64
"""Most contents that `split` gives."""
UNCHECKED_BYTES_MAX: Final = 1 << 16
"""A message of this size costs little whatever it holds; a larger one is looked over before protobuf parses it."""
RECORDS_MAX: Final = 8192
"""Most records (fields, and fields of tensors other than their contents) of a larger message."""

ID: Final = 0x1A
"""Tag of `id`, in requests and in responses."""
_RAW: Final = 0x3A
_INPUT: Final = 0x2A
_CONTENTS: Final = 0x2A
_HEADER: Final = frozenset({0x0A, 0x12, 0x22, 0x2A, 0x32})
_TENSORS: Final = frozenset({0x2A, 0x32})
_TENSOR: Final = frozenset({0x0A, 0x12, 0x1A, 0x22})
_FIELDS: Final = {
    "": {
        1: "model_name",
        2: "model_version",
        3: "id",
        4: "parameters",
        5: "inputs",
        6: "outputs",
        7: "raw_input_contents",
    },
    "inputs": {1: "name", 2: "datatype", 3: "shape", 4: "parameters", 5: "contents"},
    "outputs": {1: "name", 2: "parameters"},
}

PACKED: Final = {"fp32_contents": 0x32, "fp64_contents": 0x3A}
"""Tags of the typed contents whose elements lie on the wire as in memory."""
_PACKED: Final = frozenset(PACKED.values())

Split = tuple[bytes, bytes, tuple[int, ...]]


def split_python(message: bytes) -> Split | None:
    """Cut an encoded ModelInferRequest.

    Gives (header, id, spans): all other bytes in their order; the record of `id` as a response repeats it, tag and
    length included, b"" without one; and where each of the contents begins and ends, flat: start, end, start...

    Contents are raw_input_contents, whose records are cut out whole. Without any they are typed FP32 and FP64: the
    elements of each are cut out, and the header begins with a zero byte, which no message does.

    None for whatever is not plain, so that protobuf decides: an unknown or oddly typed field, a length of more than
    four bytes, truncated bytes, an id that comes twice or is longer than 127 bytes or not UTF-8, a header of more than
    HEADER_BYTES_MAX bytes, no contents or more than CONTENTS_MAX of them, typed contents that are not all of one record
    with one packed FP32 or FP64.
    """
    size, at, kept = len(message), 0, 0
    parts: list[bytes] = []
    spans: list[int] = []
    name = b""
    try:
        while at < size:
            tag, length, start = message[at], message[at + 1], at + 2
            if length > 127:
                length, start = _length(message, at + 1)
            end = start + length
            if tag in _HEADER:
                at = end
                continue
            if tag == _RAW:
                spans += (start, end)
            elif tag == ID and not name and start == at + 2:
                name = message[at:end]
            else:
                return None
            if at > kept:
                parts.append(message[kept:at])
            at = kept = end
        if at != size or not _is_text(name):
            return None
        if not spans:
            parts = _split_typed(message, spans)
        elif at > kept:
            parts.append(message[kept:at])
    except IndexError:
        return None
    header = parts[0] if len(parts) == 1 else b"".join(parts)
    if not 0 < len(spans) <= 2 * CONTENTS_MAX or len(header) > HEADER_BYTES_MAX:
        return None
    return header, name if len(name) > 2 else b"", tuple(spans)


def _split_typed(message: bytes, spans: list[int]) -> list[bytes]:
    """The parts of a header of typed contents; IndexError where they are not plain. Fills `spans`."""
    parts, at, kept, size = [b"\0"], 0, 0, len(message)
    while at < size:
        tag = message[at]
        length, start = _length(message, at + 1)
        end = start + length
        if tag == ID:
            parts.append(message[kept:at])
            kept = end
        elif tag == _INPUT:
            first = _elements(message, start, end)
            spans += (first, end)
            parts.append(message[kept:first])
            kept = end
        at = end
    parts.append(message[kept:])
    return parts


def _elements(message: bytes, at: int, end: int) -> int:
    """Where the elements of an input begin that end with it; IndexError where it is not so."""
    while at < end:
        tag = message[at]
        length, start = _length(message, at + 1)
        stop = start + length
        if tag == _CONTENTS and stop == end and message[start] in _PACKED:
            length, first = _length(message, start + 1)
            if first + length == end:
                return first
        if tag not in _TENSOR:
            break
        at = stop
    raise IndexError(at)


def _is_text(name: bytes) -> bool:
    if name.isascii():
        return True
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _length(message: bytes, at: int) -> tuple[int, int]:
    """A length of up to four bytes, and where it ends. IndexError for a longer one, as for one cut off."""
    length = shift = 0
    for place in range(at, at + 4):
        byte = message[place]
        length |= (byte & 0x7F) << shift
        if byte < 128:
            return length, place + 1
        shift += 7
    raise IndexError(at)


def _native() -> Callable[[bytes], Split | None] | None:
    try:
        found: Any = importlib.import_module("mlmesh_front")
    except ImportError:
        return None
    return getattr(found, "split", None)


split: Final[Callable[[bytes], Split | None]] = _native() or split_python


def check(message: bytes) -> None:
    """Refuse a large message whose many small parts would take up far more memory than its bytes.

    Typed contents are not looked into: they grow at most eightfold. What is no message at all passes, for protobuf to
    say so. Raises InvalidInput.
    """
    if len(message) <= UNCHECKED_BYTES_MAX:
        return
    try:
        _walk(message)
    except IndexError:
        return


def _walk(message: bytes) -> None:
    records = 0
    stack: list[tuple[int, int, str]] = [(0, len(message), "")]
    while stack:
        at, end, inside = stack.pop()
        names = _FIELDS[inside]
        while at < end:
            records += 1
            tag, at = _varint(message, at)
            if records > RECORDS_MAX:
                name = names.get(tag >> 3, str(tag >> 3))
                raise InvalidInput(
                    f"a message of {len(message)} bytes has more than {RECORDS_MAX} fields",
                    field=f"{inside}[].{name}" if inside else name,
                )
            kind = tag & 7
            if kind == 2:
                length, start = _varint(message, at)
                at = start + length
                if at > end:
                    return
                if not inside and tag in _TENSORS:
                    stack.append((start, at, names[tag >> 3]))
            elif kind == 0:
                at = _varint(message, at)[1]
            else:
                at += {1: 8, 5: 4}.get(kind, 0)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError(at)


def varint(value: int) -> bytes:
    """A number of 0 or more as protobuf writes it."""
    if value < 128:
        return _SMALL[value]
    out = bytearray()
    while value > 127:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def record_of(request_id: str) -> bytes:
    """The record of `id` with this text; b"" for none."""
    raw = request_id.encode()
    return b"".join((_SMALL[ID], varint(len(raw)), raw)) if raw else b""


def text_of(record: bytes) -> str:
    """The text of a record of `id`."""
    return record[2 if len(record) < 130 else _varint(record, 1)[1] :].decode()


_SMALL: Final = tuple(bytes((value,)) for value in range(128))


def packed(kind: Datatype, array: Array) -> bytes:
    """An encoded InferTensorContents of FP32 or FP64: the array's bytes behind the tag of its field."""
    data = array.astype(kind.dtype, copy=False).tobytes()
    return b"".join((_SMALL[PACKED[kind.contents]], varint(len(data)), data)) if data else b""


def unpacked(kind: Datatype, shape: Sequence[int], count: int, contents: bytes) -> Array | None:
    """An array from an encoded InferTensorContents that holds `count` FP32 or FP64 and nothing else; None otherwise."""
    size = count * kind.itemsize
    head = _SMALL[PACKED[kind.contents]] + varint(size)
    if len(contents) != len(head) + size or not contents.startswith(head):
        return None
    # Cut off, so that the elements are aligned.
    return np.frombuffer(contents[len(head) :], kind.dtype).reshape(shape)
