"""ONNX by its structure: a walk over the protobuf wire format that proves a ModelProto without building one.

Field numbers are those of onnx.proto (github.com/onnx/onnx), which never change. Only messages that may hold tensors,
and so paths of external data, are walked; all else is skipped by its length.
"""

import re
from dataclasses import dataclass, field

from mlmesh_registry import names
from mlmesh_registry.formats.source import Refused, Source, Walk
from mlmesh_runtime.errors import InvalidInput

MODEL, GRAPH, NODE, ATTRIBUTE, TENSOR, SPARSE, TRAINING, FUNCTION, ENTRY = range(9)
# Which length-delimited fields of a message are walked, and as what.
CHILDREN: dict[int, dict[int, int]] = {
    MODEL: {7: GRAPH, 20: TRAINING, 25: FUNCTION},
    GRAPH: {1: NODE, 5: TENSOR, 15: SPARSE},
    NODE: {5: ATTRIBUTE},
    ATTRIBUTE: {5: TENSOR, 6: GRAPH, 10: TENSOR, 11: GRAPH, 22: SPARSE, 23: SPARSE},
    TENSOR: {13: ENTRY},
    SPARSE: {1: TENSOR, 2: TENSOR},
    TRAINING: {1: GRAPH, 2: GRAPH},
    FUNCTION: {7: NODE, 11: ATTRIBUTE},
    ENTRY: {},
}
# Every field of a ModelProto with its wire type. The outermost message is held to it exactly: whatever else happens to
# read as protobuf has other fields.
MODEL_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
FIRST_BYTES = frozenset(
    (number << 3 | wire) & 0x7F | (0x80 if number > 15 else 0) for number, wire in MODEL_FIELDS.items()
)

DEPTH_MAX = 64
FIELDS_MAX = 20_000_000
_ENTRY_BYTES_MAX = 1 << 16
_HEADER_BYTES_MAX = 20
_WINDOW = 1 << 16
_IR_VERSION_MAX = 1000

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}


def _tags(wire: int) -> bytes:
    return b"".join(re.escape(bytes([tag])) for tag in range(8, 128) if tag & 7 == wire)


# A run of scalars of low field numbers: attributes of tree ensembles hold millions, one tag each.
_SCALARS = re.compile(
    b"(?:[%b][\x80-\xff]{0,9}+[\x00-\x7f]|[%b].{4}|[%b].{8})++" % (_tags(_VARINT), _tags(_FIXED32), _tags(_FIXED64)),
    re.DOTALL,
)


@dataclass(slots=True)
class _Seen:
    fields: int = 0
    ir_version: int = 0
    graphs: int = 0
    outputs: int = 0
    opsets: int = 0
    open: list[tuple[int, int]] = field(default_factory=list)


def walk(source: Source, size_bytes: int) -> Walk[None]:
    """Refuse what is no ModelProto of size_bytes."""
    seen = _Seen(open=[(size_bytes, MODEL)])
    while True:
        while source.here >= seen.open[-1][0]:
            if source.here > seen.open[-1][0]:
                raise Refused("a field reaches out of its message")
            seen.open.pop()
            if not seen.open:
                return _judge(seen)
        end, kind = seen.open[-1]
        yield from source.has(min(_HEADER_BYTES_MAX, end - source.here))
        if kind != MODEL and _pass_scalars(source, end):
            continue
        seen.fields += 1
        if seen.fields > FIELDS_MAX:
            raise Refused(f"it has more than {FIELDS_MAX} fields")
        tag = _varint(source)
        number, wire = tag >> 3, tag & 7
        if number == 0 or (kind == MODEL and MODEL_FIELDS.get(number) != wire):
            raise Refused(f"field {number} of wire type {wire} is none of a ModelProto's")
        yield from _field(source, seen, number, wire)


def _field(source: Source, seen: _Seen, number: int, wire: int) -> Walk[None]:
    end, kind = seen.open[-1]
    if wire == _VARINT:
        value = _varint(source)
        if (kind, number) == (MODEL, 1):
            seen.ir_version = value
    elif wire == _BYTES:
        length = _varint(source)
        if length > end - source.here:
            raise Refused(f"a field of {length} bytes does not fit where it is")
        seen.graphs += (kind, number) == (MODEL, 7)
        seen.opsets += (kind, number) == (MODEL, 8)
        seen.outputs += (kind, number, len(seen.open)) == (GRAPH, 12, 2)
        child = CHILDREN[kind].get(number)
        if child is None:
            yield from source.skip(length)
        elif child == ENTRY:
            yield from _external(source, length)
        elif len(seen.open) == DEPTH_MAX:
            raise Refused(f"it is nested deeper than {DEPTH_MAX} messages")
        else:
            seen.open.append((source.here + length, child))
    elif wire in _FIXED:
        yield from source.skip(_FIXED[wire])
    else:
        raise Refused(f"wire type {wire} is none of protobuf's")


def _pass_scalars(source: Source, end: int) -> bool:
    limit = min(len(source.data), end - source.offset, source.position + _WINDOW)
    found = _SCALARS.match(source.data, source.position, limit)
    if found is None:
        return False
    source.position = found.end()
    return True


def _varint(source: Source) -> int:
    value = shift = 0
    data, position = source.data, source.position
    for byte in data[position : position + 10]:
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            source.position = position
            return value
        shift += 7
    raise Refused("a number is cut or too long")


def _external(source: Source, length: int) -> Walk[None]:
    """Check one entry of external_data: what it names must be a file beside the model."""
    if length > _ENTRY_BYTES_MAX:
        raise Refused(f"an entry of external data has {length} bytes, at most {_ENTRY_BYTES_MAX}")
    entry = Source()
    entry.push((yield from source.take(length)))
    texts: dict[int, bytes] = {}
    while entry.position < length:
        tag = _varint(entry)
        if tag & 7 != _BYTES:
            raise Refused("an entry of external data holds no text")
        size = _varint(entry)
        if size > length - entry.position:
            raise Refused("an entry of external data is cut")
        texts[tag >> 3] = entry.data[entry.position : entry.position + size]
        entry.position += size
    if texts.get(1) == b"location":
        try:
            names.artifact_path(texts.get(2, b"").decode("utf-8", "replace"), "location")
        except InvalidInput as error:
            raise Refused("its external data is at a path that is not beside it") from error


def _judge(seen: _Seen) -> None:
    if not 1 <= seen.ir_version <= _IR_VERSION_MAX:
        raise Refused("it has no ir_version")
    if seen.graphs != 1 or not seen.outputs:
        raise Refused(
            f"it has {seen.graphs} graphs and {seen.outputs} outputs; a model has one graph that gives something"
        )
    if not seen.opsets:
        raise Refused("it imports no operator set")
