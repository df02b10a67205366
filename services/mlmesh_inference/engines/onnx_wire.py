"""Protobuf as it lies in a .onnx file, walked through a memory map: what is not asked for is not read.

Whatever is not well-formed is a ValueError, or an IndexError of the map.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Final

NODES_MAX: Final = 500_000
RANK_MAX: Final = 64
ELEMENTS_MAX: Final = 1 << 40

Span = tuple[int, int]
"""Where a field's bytes begin and end."""

# TensorProto.DataType: bits of an element; strings have none.
BITS: Final = {
    1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128,
    16: 16, 17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4,
}  # fmt: skip

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(memory: mmap.mmap, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Fields of a message: numbers as they are, everything with a length as the span it takes."""
    place, end = span
    while place < end:
        tag, place = _varint(memory, place, end)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(memory, place, end)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, place = _varint(memory, place, end)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if size > end - place:
            raise ValueError(f"a field of {size} bytes where {end - place} are left")
        yield tag >> 3, (place, place + size)
        place += size


def _varint(memory: mmap.mmap, place: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while place < end and shift < 70:
        byte = memory[place]
        place += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, place
        shift += 7
    raise ValueError("a number that does not end")


def read_text(memory: mmap.mmap, value: object) -> str:
    """The text that a field's span holds, "" when there is no such field."""
    return memory[value[0] : value[1]].decode() if isinstance(value, tuple) else ""


def read_number(value: object) -> int:
    """A signed number, 0 when there is no such field."""
    number = value if isinstance(value, int) else 0
    return number - (1 << 64) if number >= 1 << 63 else number


def read_numbers(memory: mmap.mmap, value: int | Span) -> list[int]:
    """Repeated numbers, packed or not."""
    if isinstance(value, int):
        return [read_number(value)]
    place, end = value
    result = []
    while place < end:
        number, place = _varint(memory, place, end)
        result.append(read_number(number))
        if len(result) > RANK_MAX:
            raise ValueError("too many dimensions")
    return result
