"""safetensors: a length, a JSON header, and bytes that the header's offsets cover exactly.

Rules are those of the format's README (github.com/huggingface/safetensors); the header's bound here is tighter, because
it is kept in memory. It is taken apart entry by entry, so a header made to blow up when parsed does not.
"""

import json
import math
import re
from typing import Any, TypeGuard

from mlmesh_registry.formats.source import Refused, Source, Walk

HEADER_BYTES_MAX = 8 << 20
_ENTRY_BYTES_MAX = 4096
_RANK_MAX = 64
# Bits an element.
DTYPES = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_OPEN = re.compile(rb"\{\s*+")
_NAME = re.compile(rb"(%b)\s*+:\s*+" % _STRING)
_FLAT = re.compile(rb'\{(?:[^"{}]++|%b)*+\}' % _STRING)
_TEXTS = re.compile(rb"\{\s*+(?:%b\s*+:\s*+%b\s*+(?:,\s*+(?=\")|(?=\})))*+\}" % (_STRING, _STRING))
_NEXT = re.compile(rb"\s*+(?:,\s*+(?=\")|\}\s*+\Z)")
_NOTHING = re.compile(rb"\{\s*+\}\s*+\Z")


def begins(head: bytes, size_bytes: int) -> bool:
    """Whether bytes begin as this format does."""
    return 2 <= int.from_bytes(head[:8], "little") <= size_bytes - 8 and head[8:9] == b"{"


def walk(source: Source, size_bytes: int) -> Walk[None]:
    """Refuse what is not whole and exact."""
    length = int.from_bytes((yield from source.take(8)), "little")
    if length > HEADER_BYTES_MAX:
        raise Refused(f"its header has {length} bytes, at most {HEADER_BYTES_MAX}")
    header = yield from source.take(length)
    at = 0
    for begin, end in sorted(_spans(header)):
        if begin != at:
            raise Refused(f"its tensors leave a hole or overlap at byte {min(begin, at)}")
        at = end
    if at != size_bytes - 8 - length:
        raise Refused(f"its tensors cover {at} bytes of {size_bytes - 8 - length}")


def _spans(header: bytes) -> list[tuple[int, int]]:
    """Begin and end of every tensor's bytes."""
    try:
        header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("its header is not UTF-8") from error
    if _NOTHING.match(header):
        return []
    spans: list[tuple[int, int]] = []
    names: set[str] = set()
    position = _match(_OPEN, header, 0).end()
    while position < len(header):
        found = _match(_NAME, header, position)
        name = json.loads(found[1])
        if name in names:
            raise Refused("a name is in its header twice")
        names.add(name)
        value = _match(_TEXTS if name == "__metadata__" else _FLAT, header, found.end())
        if name != "__metadata__":
            spans.append(_span(value[0]))
        position = _match(_NEXT, header, value.end()).end()
    return spans


def _match(pattern: re.Pattern[bytes], header: bytes, position: int) -> re.Match[bytes]:
    if (found := pattern.match(header, position)) is None:
        raise Refused(f"its header holds something other than tensors at byte {position}")
    return found


def _span(entry: bytes) -> tuple[int, int]:
    if len(entry) > _ENTRY_BYTES_MAX:
        raise Refused(f"an entry of its header has {len(entry)} bytes, at most {_ENTRY_BYTES_MAX}")
    try:
        pairs: Any = json.loads(entry, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise Refused("its header is no JSON") from error
    fields = dict(pairs)
    if len(pairs) != 3 or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise Refused("its header holds something other than tensors")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not (_numbers(shape) and _numbers(offsets) and len(offsets) == 2 and len(shape) <= _RANK_MAX):
        raise Refused("a tensor's shape or offsets are no list of numbers")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused("a tensor has a type that is none of the format's")
    begin, end = offsets
    bits = math.prod(shape) * DTYPES[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise Refused("a tensor's offsets do not fit its shape")
    return begin, end


def _numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 53 for each in value)
