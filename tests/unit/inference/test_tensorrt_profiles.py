"""Profiles: which shapes each covers, what is refused, and which one runs a batch. And what is refused before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_doubles import refuse_doubles
from mlmesh_inference.engines.tensorrt_profiles import (
    PROFILES_MAX,
    FreeInput,
    batch_ranges,
    bucket,
    buckets,
    choose,
    parse_dims,
    profiles,
)
from tests.support import onnx_models

IDS = FreeInput(name="ids", shape=(-1, -1), dimensions=("batch", "seq"))
MASK = FreeInput(name="mask", shape=(-1, -1), dimensions=("batch", "seq"))


def made(*inputs: FreeInput, dims: str = "", preferred: int = 8, most: int = 64) -> list[dict[str, tuple[object, ...]]]:
    found = profiles(inputs, batch_ranges(preferred, most), parse_dims(dims))
    return [{name: (each.low, each.usual, each.high) for name, each in profile.items()} for profile in found]


def test_the_batch_is_cut_into_one_row_the_usual_and_what_is_more() -> None:
    assert [profile["x"] for profile in made(FreeInput(name="x", shape=(-1, 4)))] == [
        ((1, 4), (1, 4), (1, 4)),
        ((2, 4), (8, 4), (8, 4)),
        ((9, 4), (64, 4), (64, 4)),
    ]


@pytest.mark.parametrize(
    ("preferred", "most", "expected"),
    [(1, 1, ["1..1@1"]), (8, 1, ["1..1@1"]), (1, 4, ["1..1@1", "2..4@4"]), (8, 8, ["1..1@1", "2..8@8"])],
)
def test_ranges_of_small_batches(preferred: int, most: int, expected: list[str]) -> None:
    assert [str(each) for each in batch_ranges(preferred, most)] == expected


@given(preferred=st.integers(1, 300), most=st.integers(1, 300))
def test_every_batch_is_in_one_range_and_its_bucket_too(preferred: int, most: int) -> None:
    ranges = batch_ranges(preferred, most)
    known = set(buckets(ranges))
    for rows in range(1, most + 1):
        (each,) = [each for each in ranges if each.low <= rows <= each.high]
        padded = bucket(rows, each.high)
        assert rows <= padded <= each.high
        assert padded < 2 * rows
        assert padded in known


def test_a_named_dimension_is_declared_once_for_all_inputs() -> None:
    found = made(IDS, MASK, dims="seq=2..256@64", preferred=8, most=8)
    assert found == [
        dict.fromkeys(("ids", "mask"), ((1, 2), (1, 64), (1, 256))),
        dict.fromkeys(("ids", "mask"), ((2, 2), (8, 64), (8, 256))),
    ]


def test_several_ranges_of_a_dimension_are_combined_with_every_batch() -> None:
    found = made(IDS, dims="seq=1..64@32, seq=65..256@128", preferred=4, most=4)
    assert [profile["ids"][1] for profile in found] == [(1, 32), (1, 128), (4, 32), (4, 128)]


def test_an_input_and_axis_names_a_dimension_that_the_model_does_not_name() -> None:
    found = made(FreeInput(name="x", shape=(-1, 3, -1)), dims="x[2]=8..16", most=1)
    assert found == [{"x": ((1, 3, 8), (1, 3, 16), (1, 3, 16))}]


def test_a_first_dimension_that_is_no_batch_is_declared() -> None:
    found = made(FreeInput(name="x", shape=(-1,), dimensions=("tokens",)), dims="tokens=1..512@128")
    assert found == [{"x": ((1,), (128,), (512,))}]


def test_a_model_of_fixed_shapes_needs_no_profile() -> None:
    assert made(FreeInput(name="x", shape=(2, 4))) == []


def test_a_free_dimension_that_nobody_declared_is_refused_by_name() -> None:
    with pytest.raises(EngineError, match=r"'ids' \[-1,-1\] has a free dimension beside the batch.*seq=1..256@64"):
        made(IDS)


def test_a_declared_dimension_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(
        EngineError, match=r"'sqe' is declared, but is no free dimension; the model has \['batch', 'seq'\]"
    ):
        made(IDS, dims="seq=1..8,sqe=1..8")


def test_too_many_profiles_are_refused() -> None:
    dims = ",".join(f"seq={low}..{low}" for low in range(1, PROFILES_MAX + 1))
    with pytest.raises(EngineError, match=f"48 profiles are declared, at most {PROFILES_MAX}"):
        made(IDS, dims=dims)


@pytest.mark.parametrize(
    "text", ["seq", "seq=", "seq=1", "seq=8..2", "seq=0..4", "seq=1..4@5", "=1..4", "seq=1..999999999", "a=1..2;b=1..2"]
)
def test_what_is_no_range_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"seq|=1\.\.4|a="):
        parse_dims(text)


def test_the_first_profile_that_covers_all_inputs_is_chosen() -> None:
    ready = profiles((IDS, MASK), batch_ranges(4, 8), parse_dims("seq=1..8,seq=9..16"))

    def of(*shape: int, mask: tuple[int, ...] | None = None) -> int:
        return choose(ready, {"ids": shape, "mask": mask or shape})

    assert [of(1, 3), of(1, 9), of(4, 8), of(8, 16)] == [0, 1, 2, 5]
    assert [of(9, 3), of(1, 17), of(0, 3), of(1, 3, mask=(1, 9)), of(1, 3, mask=(1,))] == [-1] * 5


def double_weights(count: int) -> bytes:
    """y[N,4] = x[N,4] + the sum of so many FP64 weights, in FP32 but for them."""
    model = onnx.load_from_string(onnx_models.add())
    model.graph.initializer.append(numpy_helper.from_array(np.ones(count), "doubles"))
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (onnx_models.identity(["FP64"]), "in_FP64"),
        (onnx_models.identity(["INT32", "FP64"]), "in_FP64"),
        (double_weights(2), "doubles"),
    ],
    ids=["input", "one of several inputs", "weights"],
)
def test_fp64_is_refused_by_name(data: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(EngineError, match=f"'{name}' is FP64, of which TensorRT would make FP32"):
        refuse_doubles(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "data", [onnx_models.identity(["FP32", "INT64"]), double_weights(1), b"", b"this is no model", b"\x3a\xff"]
)
def test_what_has_none_and_what_is_no_model_is_let_through(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    refuse_doubles(tmp_path / "model.onnx")
