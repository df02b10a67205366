"""Tensors: every datatype, raw and typed, round trips; every wrong size is refused before anything is allocated."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlmesh_inference.tensors import (
    DATATYPES,
    RANK_MAX,
    Datatype,
    Signature,
    TensorSpec,
    classify,
    datatype,
    decode_raw,
    decode_typed,
    element_count,
    encode_raw,
    encode_typed,
)
from mlmesh_runtime.errors import InvalidInput

NUMERIC = [kind for kind in DATATYPES.values() if kind.itemsize]
BYTES = DATATYPES["BYTES"]
NAMES = {"tensor": "x", "model": "m"}


def _array(data: st.DataObject, kind: Datatype) -> Any:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    return data.draw(hnp.arrays(kind.dtype, shape))


@pytest.mark.parametrize("kind", NUMERIC, ids=lambda kind: kind.name)
@given(data=st.data())
def test_raw_round_trip(kind: Datatype, data: st.DataObject) -> None:
    array = _array(data, kind)
    raw = encode_raw(kind, array)
    assert len(raw) == array.size * kind.itemsize
    decoded = decode_raw(kind, array.shape, raw, **NAMES)
    assert decoded.dtype == kind.dtype
    assert decoded.shape == array.shape
    assert decoded.tobytes() == array.tobytes()


@pytest.mark.parametrize("kind", [kind for kind in NUMERIC if kind.contents], ids=lambda kind: kind.name)
@given(data=st.data())
def test_typed_round_trip(kind: Datatype, data: st.DataObject) -> None:
    array = _array(data, kind)
    decoded = decode_typed(kind, array.shape, encode_typed(array), **NAMES)
    assert decoded.dtype == kind.dtype
    assert decoded.shape == array.shape
    assert np.array_equal(decoded, array, equal_nan=kind.name.startswith("FP"))


@given(elements=st.lists(st.binary(max_size=20), max_size=8))
def test_bytes_round_trip_raw_and_typed(elements: list[bytes]) -> None:
    shape = [len(elements)]
    array = decode_typed(BYTES, shape, elements, **NAMES)
    assert array.tolist() == elements
    again = decode_raw(BYTES, shape, encode_raw(BYTES, array), **NAMES)
    assert again.tolist() == elements


def test_bytes_on_the_wire_are_length_and_content() -> None:
    array = decode_raw(BYTES, [2, 1], struct.pack("<I", 3) + b"a\x00b" + struct.pack("<I", 0), **NAMES)
    assert array.tolist() == [[b"a\x00b"], [b""]]


@given(raw=st.binary(max_size=64), count=st.integers(0, 20))
def test_any_bytes_as_strings_are_decoded_or_refused(raw: bytes, count: int) -> None:
    with contextlib.suppress(InvalidInput):
        assert encode_raw(BYTES, decode_raw(BYTES, [count], raw, **NAMES)) == raw


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (struct.pack("<I", 1) + b"a", "unexpected number of string elements 1"),
        (struct.pack("<I", 1) + b"a" + struct.pack("<I", 9) + b"b", "incomplete string data"),
        (struct.pack("<I", 0) * 2 + b"\x00\x00", "incomplete string length indicator"),
        (struct.pack("<I", 0) * 3, "unexpected number of string elements 3"),
        (struct.pack("<I", 0xFFFFFFFF), "incomplete string data"),
    ],
)
def test_wrong_strings_are_refused(raw: bytes, text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        decode_raw(BYTES, [2], raw, **NAMES)


@pytest.mark.parametrize("kind", NUMERIC, ids=lambda kind: kind.name)
@given(shape=hnp.array_shapes(max_dims=3, max_side=4), extra=st.integers(-8, 8).filter(bool))
def test_wrong_byte_count_names_both_sizes(kind: Datatype, shape: tuple[int, ...], extra: int) -> None:
    right = int(np.prod(shape)) * kind.itemsize
    given_bytes = max(0, right + extra)
    with pytest.raises(InvalidInput, match=f"Expected {right}, got {given_bytes}") as caught:
        decode_raw(kind, shape, bytes(given_bytes), **NAMES)
    assert caught.value.reason == "SHAPE_MISMATCH"


@pytest.mark.parametrize(
    "shape",
    [[-1], [2, -3], [2**31, 2**31], [2**62, 2**62, 4], [1] * (RANK_MAX + 1), [2**63 - 1]],
    ids=str,
)
def test_impossible_shapes_cost_nothing_but_their_refusal(shape: list[int]) -> None:
    tracemalloc.start()
    try:
        for kind in DATATYPES.values():
            with pytest.raises(InvalidInput) as caught:
                decode_raw(kind, shape, b"", **NAMES)
            assert caught.value.reason == "SHAPE_MISMATCH"
            with pytest.raises(InvalidInput):
                decode_typed(kind, shape, [], **NAMES)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_zero_dimension_does_not_make_absurd_ones_harmless() -> None:
    """numpy cannot make such an array either."""
    assert element_count([0, 2**20], tensor="x") == 0
    with pytest.raises(InvalidInput, match="more than"):
        element_count([0, 2**40], tensor="x")
    assert decode_raw(DATATYPES["FP32"], [0, 7], b"", **NAMES).shape == (0, 7)


def test_raw_contents_are_viewed_and_not_copied() -> None:
    raw = np.arange(6, dtype=np.float32).tobytes()
    array = decode_raw(DATATYPES["FP32"], [2, 3], raw, **NAMES)
    assert not array.flags.owndata
    assert not array.flags.writeable


@pytest.mark.parametrize(("kind", "value"), [("INT8", 128), ("INT8", -129), ("UINT8", 256), ("INT16", 1 << 15)])
def test_a_typed_value_out_of_range_is_refused(kind: str, value: int) -> None:
    with pytest.raises(InvalidInput, match=f"out of the range of {kind}"):
        decode_typed(DATATYPES[kind], [2], [1, value], **NAMES)


def test_half_precisions_have_no_typed_field() -> None:
    assert {kind.name for kind in DATATYPES.values() if not kind.contents} == {"FP16", "BF16"}


def test_an_unknown_datatype_names_the_known() -> None:
    with pytest.raises(InvalidInput, match=r"'FP8'.*FP16"):
        datatype("FP8", tensor="x")


@pytest.mark.parametrize(
    ("inputs", "outputs", "batches"),
    [
        ([(-1, 3)], [(-1, 2)], True),
        ([(-1,)], [(-1,)], True),
        ([(4, 3)], [(-1, 2)], False),
        ([(-1, 3)], [(2, 2)], False),
        ([(-1, 3)], [()], False),
        ([], [(-1, 3)], False),
    ],
)
def test_a_model_batches_when_every_first_dimension_is_free(
    inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], batches: bool
) -> None:
    def specs(shapes: list[tuple[int, ...]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=str(n), datatype=DATATYPES["FP32"], shape=s) for n, s in enumerate(shapes))

    assert Signature(inputs=specs(inputs), outputs=specs(outputs)).batches is batches


def test_classes_are_value_index_and_label() -> None:
    scores = np.array([[0.1, 0.7, 0.2], [3.0, 1.0, 2.0]], np.float32)
    best = classify(scores, 2, ("cat", "dog"), batched=True)
    assert best.tolist() == [[b"0.700000:1:dog", b"0.200000:2"], [b"3.000000:0:cat", b"2.000000:2"]]
    assert classify(scores[0], 9, (), batched=False).tolist() == [b"0.700000:1", b"0.200000:2", b"0.100000:0"]
