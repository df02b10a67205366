"""What bytes are is decided from the bytes: whole files are let in, and whatever could run, hide or blow up is not."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_registry.formats import Examiner, Format, png, safetensors, text
from mlmesh_registry.formats import onnx as walked
from mlmesh_runtime.errors import InvalidInput
from tests.support import onnx_models
from tests.support.registry import some_bytes


def what(data: bytes, pieces: Sequence[int] = ()) -> str:
    """The format, or "" where the file is refused; fed in pieces of these sizes, the rest at once."""
    examiner, at = Examiner(len(data)), 0
    for size in pieces:
        examiner.feed(data[at : at + size])
        at += size
    examiner.feed(data[at:])
    try:
        return examiner.finish()
    except InvalidInput:
        return ""


def why(data: bytes) -> str:
    """Why a file is refused."""
    examiner = Examiner(len(data))
    examiner.feed(data)
    with pytest.raises(InvalidInput) as refused:
        examiner.finish()
    assert refused.value.reason == "FORMAT_NOT_ALLOWED"
    return refused.value.message


def picture(width: int = 3, height: int = 2, *, extra: bytes = b"") -> bytes:
    """A grey PNG."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(min(width, 9))) * min(height, 9))
    return png.SIGNATURE + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tensors(header: bytes | dict[str, Any], data: bytes) -> bytes:
    """A safetensors file."""
    text_ = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text_)) + text_ + data


def external(location: str) -> bytes:
    """A model whose weights are said to be in another file."""
    model = onnx.load_from_string(onnx_models.slow(turns=1))
    initializers = [each for each in model.graph.initializer if each.raw_data]
    for attribute in (attribute for node in model.graph.node for attribute in node.attribute):
        initializers += [each for each in attribute.g.initializer if each.raw_data]
    onnx.external_data_helper.set_external_data(initializers[0], location)
    initializers[0].ClearField("raw_data")
    initializers[0].data_location = onnx.TensorProto.EXTERNAL
    return model.SerializeToString()


WHOLE: dict[str, tuple[bytes, Format]] = {
    "nothing": (b"", Format.TEXT),
    "text": ("Label für Katzen: 猫\n".encode(), Format.TEXT),
    "csv": (b"class,label\n1,cat\n2,dog\n" * 100, Format.TEXT),
    "labels": (b"cat\ndog\nbird\n", Format.TEXT),
    "abbreviation": (b"N.B. this is no pickle of None.\n", Format.TEXT),
    "markdown": (b"[link](x) {curly} \x0c\r\n", Format.TEXT),
    "jsonl": (b'{"a": 1}\n{"a": [2]}\n', Format.TEXT),
    "broken json": (b'{"a": [1, 2', Format.TEXT),
    "json": (json.dumps({"a": [1, -2.5e-3, None, True, 'x\\"\u1234', {}, []], "": {"b": [[]]}}).encode(), Format.JSON),
    "spread json": (json.dumps([{"a": list(range(99))}] * 30, indent=2).encode(), Format.JSON),
    "onnx": (onnx_models.add(), Format.ONNX),
    "onnx with control flow": (onnx_models.slow(turns=2, width=8), Format.ONNX),
    "onnx with strings": (onnx_models.identity(), Format.ONNX),
    "onnx with a file beside it": (external("weights/data.bin"), Format.ONNX),
    "safetensors": (some_bytes(1, 5000), Format.SAFETENSORS),
    "safetensors with metadata": (
        tensors(
            {"__metadata__": {"x": "[[{}"}, "t": {"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 12]}}, bytes(12)
        ),
        Format.SAFETENSORS,
    ),
    "safetensors without tensors": (tensors({}, b""), Format.SAFETENSORS),
    "png": (picture(), Format.PNG),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_file_of_an_allowed_format_is_let_in_however_it_comes(name: str) -> None:
    data, expected = WHOLE[name]
    assert what(data) == what(data, [1] * min(len(data), 3000)) == what(data, [7] * (len(data) // 7)) == expected


class Runs:
    """What a pickle made for the purpose would do to whoever loads it."""

    def __init__(self, canary: str) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self._canary, "w")


def hostile(canary: str) -> dict[str, tuple[bytes, str]]:
    """Files that must not be stored, and what is said of them."""
    program = {protocol: pickle.dumps(Runs(canary), protocol) for protocol in range(6)}
    zipped, tarred, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program[2])
        archive.writestr("bomb", bytes(10_000_000))
    with tarfile.open(fileobj=tarred, mode="w") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    import numpy as np

    np.save(arrays, np.array([Runs(canary)], dtype=object), allow_pickle=True)
    model, floats = onnx_models.add(), {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    named = {"a": floats, "b": {**floats, "data_offsets": [12, 28]}}
    found: dict[str, tuple[bytes, str]] = {
        "pickle 0": (program[0], "pickle"),
        "pickle 1": (program[1], "pickle"),
        **{f"pickle {protocol}": (program[protocol], f"pickle of protocol {protocol}") for protocol in range(2, 6)},
        "a pickle of data, in text": (pickle.dumps({"a": [1, 2]}, 0), "pickle"),
        "a pickle before other text": (b"cos\nsystem\n(S'true'\ntR.\nand more text\n", "pickle"),
        "a pickle after many opcodes": (b"N0" * 60_000 + program[0], "pickle"),
        "a pickle in a safetensors header": (_pickle_in_a_header(), "pickle"),
        "torch": (zipped.getvalue(), "zip archive"),
        "zip behind a model": (some_bytes(1, 500)[:-30] + _zip_end(30), "ends as a zip"),
        "tar": (tarred.getvalue(), "tar"),
        "gzip": (gzip.compress(bytes(1000)), "gzip"),
        "xz": (lzma.compress(bytes(1000)), "xz"),
        "joblib": (zlib.compress(program[2] * 9), "zlib"),
        "numpy": (arrays.getvalue(), "NumPy"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        "elf": (Path(sys.executable).resolve().read_bytes()[:2000], "ELF"),
        "script": (b"#!/bin/sh\nrm -rf /\n", "script"),
        "engine": (b"ftrt" + bytes(100), "TensorRT"),
        "engine of TensorRT for RTX": (b"vtrt" + bytes(100), "TensorRT"),
        "noise": (os.urandom(5000), "not text"),
        "zeros": (bytes(5000), "control character"),
        "latin-1": ("Größe".encode("latin-1") * 10, "UTF-8"),
        "terminal escapes": (b"\x1b[2Jgone", "control character"),
        "deep json": (b'{"a":' * 1000 + b"1" + b"}" * 1000, "nested deeper"),
        "deep brackets": (b"[" * 1_000_000, "nested deeper"),
        "safetensors, a hole": (tensors({"a": {**floats, "data_offsets": [4, 20]}}, bytes(20)), "hole"),
        "safetensors, an overlap": (tensors(named, bytes(28)), "overlap"),
        "safetensors, more behind": (tensors({"a": floats}, bytes(17)), "cover 16 bytes of 17"),
        "safetensors, less": (tensors({"a": floats}, bytes(15)), "cover 16 bytes of 15"),
        "safetensors, a lie": (tensors({"a": {**floats, "shape": [5]}}, bytes(16)), "do not fit"),
        "safetensors, overflow": (tensors({"a": {**floats, "shape": [2**40, 2**40]}}, bytes(16)), "do not fit"),
        "safetensors, negative": (tensors({"a": {**floats, "shape": [-4]}}, bytes(16)), "no list of numbers"),
        "safetensors, unknown type": (tensors({"a": {**floats, "dtype": "PICKLE"}}, bytes(16)), "type"),
        "safetensors, twice": (tensors(b'{"a":%b,"a":%b}' % ((json.dumps(floats).encode(),) * 2), bytes(16)), "twice"),
        "safetensors, a bomb": (tensors(b'{"a":' + b"[]," * 100_000 + b"1}", b""), "other than tensors"),
        "safetensors, a long header": (struct.pack("<Q", 9 << 20) + b"{" + b" " * (9 << 20), "at most"),
        "onnx, cut": (model[:-1], "does not fit"),
        "onnx, more behind": (model + b"\x50\x01", "none of a ModelProto's"),
        "onnx, no graph": (b"\x08\x08\x42\x02\x10\x0d", "0 graphs"),
        "onnx, deep": (_nested(200), "nested deeper"),
        "png, cut": (picture()[:-1], "not png"),
        "png, more behind": (picture() + b"x", "behind its end"),
        "png, a wrong checksum": (picture()[:-1] + b"\0", "checksum"),
        "png, huge": (picture(60_000, 60_000), "at most"),
        "png, without an end": (picture()[:-12], "not png"),
    }
    for location in ("../secret", "/etc/passwd", "a/../../b", "..\\x", "file:///etc/passwd", "", "a\0b"):
        found[f"onnx, beside it {location!r}"] = external(location or " "), "not beside it"
    return found


def _pickle_in_a_header() -> bytes:
    """A whole safetensors file that is a program, too: its first bytes are opcodes that skip to it, hop by hop."""
    data = b"cos\nsystem\n(S'true'\ntR."
    # X, here the first byte of the header's length, takes the next four as the length of a text; the rest of the
    # header's length and the header's beginning are that text. U takes one byte of length and so much text.
    skipped, length = 30, 0x58 | 30 << 8
    entry = b'"},"t":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (len(data), len(data))
    header = bytearray(b'{"__metadata__":{"x":"' + b" " * length)
    at = skipped - 3
    while length - at > 128:
        header[at : at + 2] = b"U>"
        at += 2 + ord(">")
    header[at : at + 2] = b"U" + bytes([length - at - 2])
    header = header[: at + 2] + entry.ljust(length - at - 2)
    assert len(header) == length
    return struct.pack("<Q", length) + bytes(header) + data


def _zip_end(size: int) -> bytes:
    return b"PK\x05\x06" + bytes(16) + struct.pack("<H", size - 22) + b"c" * (size - 22)


def _nested(depth: int) -> bytes:
    model = onnx.load_from_string(onnx_models.add())
    graph = model.graph
    for _ in range(depth):
        node = graph.node.add(op_type="If", output=["y"])
        attribute = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
        graph = attribute.g
    return model.SerializeToString()


HOSTILE = hostile("/nonexistent/canary")


@pytest.mark.parametrize("name", HOSTILE)
def test_what_may_not_be_stored_is_refused_and_named(name: str) -> None:
    data, said = HOSTILE[name]
    assert said in why(data)
    assert what(data, [1] * 40) == what(data, [1000] * (len(data) // 1000)) == ""


def test_nothing_of_a_hostile_file_is_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.write_text("sings")
    before = set(tmp_path.iterdir())
    for data, _ in hostile(str(canary)).values():
        what(data)
    assert canary.read_text() == "sings"
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["onnx with control flow", "safetensors with metadata", "png"])
def test_a_file_that_ends_anywhere_else_is_not_whole(name: str) -> None:
    data = WHOLE[name][0]
    step = max(1, len(data) // 200)
    assert all(what(data[:end]) != WHOLE[name][1] for end in range(0, len(data), step))


@given(st.data())
def test_no_change_of_a_file_makes_it_anything_else_or_breaks_the_examiner(draws: st.DataObject) -> None:
    name = draws.draw(st.sampled_from([name for name in WHOLE if WHOLE[name][0]]))
    data = bytearray(WHOLE[name][0])
    for _ in range(draws.draw(st.integers(1, 4))):
        at = draws.draw(st.integers(0, len(data) - 1))
        data[at : at + draws.draw(st.integers(0, 3))] = draws.draw(st.binary(max_size=4))
        data = data or bytearray(b"x")
    # Text may become other text; a binary file stays what it is, or is refused.
    textual = {"", Format.TEXT, Format.JSON}
    found = what(bytes(data), draws.draw(st.lists(st.integers(0, 50), max_size=5)))
    assert found in (textual if WHOLE[name][1] in textual else {"", WHOLE[name][1], Format.TEXT})


JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
).filter(lambda value: isinstance(value, dict | list))


@given(JSON, st.integers(0, 4), st.booleans(), st.lists(st.integers(1, 20), max_size=10))
def test_every_json_document_is_json(value: Any, indent: int, plain: bool, pieces: list[int]) -> None:
    document = json.dumps(value, indent=indent or None, ensure_ascii=plain)
    assert what(document.encode("utf-8", "replace"), pieces) == Format.JSON


@given(st.text(alphabet='[]{}":,0123456789.-+eEtrufalsn\\ \n', max_size=60), st.lists(st.integers(0, 9), max_size=6))
def test_json_is_what_a_parser_takes(document: str, pieces: list[int]) -> None:
    document = "[" + document
    try:
        json.loads(document, parse_constant=lambda _: 1 / 0)
        expected = True
    except (ValueError, ZeroDivisionError):
        expected = False
    assert (what(document.encode(), pieces) == Format.JSON) == expected


@pytest.mark.parametrize(
    "data",
    [b"[" + b"1," * (1 << 20), b'["' + b"x" * (20 << 20), b"a line\n" * (3 << 20), some_bytes(1, 20 << 20)],
    ids=["numbers", "a string", "text", "tensors"],
)
def test_memory_does_not_grow_with_the_file(data: bytes) -> None:
    examiner = Examiner(len(data))
    pieces = [data[at : at + (1 << 20)] for at in range(0, len(data), 1 << 20)]
    tracemalloc.start()
    try:
        for piece in pieces:
            examiner.feed(piece)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_json_document_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "JSON_BYTES_MAX", 1000)
    assert what(json.dumps(list(range(200))).encode()) == Format.JSON
    for large in (json.dumps(list(range(900))), json.dumps(["x" * 2000]), json.dumps([[1]] * 900)):
        assert "more than 1000 bytes" in why(large.encode())
    # Many documents are lines of text.
    assert what(b'{"a": 1}\n' * 1000) == Format.TEXT


def test_the_walk_knows_every_way_to_a_tensor() -> None:
    """Of the onnx that is installed: a field that could hold a tensor and is not walked would hide a path."""
    kinds = {
        "ModelProto": walked.MODEL,
        "GraphProto": walked.GRAPH,
        "NodeProto": walked.NODE,
        "AttributeProto": walked.ATTRIBUTE,
        "TensorProto": walked.TENSOR,
        "SparseTensorProto": walked.SPARSE,
        "TrainingInfoProto": walked.TRAINING,
        "FunctionProto": walked.FUNCTION,
    }
    messages: dict[str, Descriptor] = {}

    def collect(descriptor: Descriptor) -> None:
        if descriptor.name not in messages:
            messages[descriptor.name] = descriptor
            for field in descriptor.fields:
                if field.message_type:
                    collect(field.message_type)

    collect(onnx.ModelProto.DESCRIPTOR)
    holding = {"TensorProto"}
    while (
        more := {
            name
            for name, descriptor in messages.items()
            if any(field.message_type and field.message_type.name in holding for field in descriptor.fields)
        }
        - holding
    ):
        holding |= more
    assert holding == set(kinds)
    for name in holding:
        ways = {
            f.number: kinds[f.message_type.name]
            for f in messages[name].fields
            if f.message_type and f.message_type.name in holding
        }
        if name == "TensorProto":
            ways[messages[name].fields_by_name["external_data"].number] = walked.ENTRY
        assert walked.CHILDREN[kinds[name]] == ways, name
    wires = {FieldDescriptor.TYPE_INT64: 0, FieldDescriptor.TYPE_STRING: 2, FieldDescriptor.TYPE_MESSAGE: 2}
    assert {field.number: wires[field.type] for field in messages["ModelProto"].fields} == walked.MODEL_FIELDS


def test_the_types_of_safetensors_are_those_of_the_library() -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    import numpy as np

    kinds = ["bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float64"]
    data = numpy.save({kind: np.ones((2, 3), kind) for kind in kinds}, {"by": "the library"})
    assert what(data) == Format.SAFETENSORS
    assert what(data[:-1]) == what(data + b"x") == ""
    assert safetensors.begins(data[:9], len(data))
