"""How far two answers are apart, and how far they may be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlmesh_inference.engines.graph import Graph, Node, Weight
from mlmesh_inference.engines.parity import TOLERANCE_QUANTISED, difference, tolerance
from mlmesh_inference.engines.samples import Samples, buckets, parse_lengths
from mlmesh_inference.tensors import DATATYPES, Array, Signature, TensorSpec


def spec(kind: str = "FP32", *shape: int) -> TensorSpec:
    return TensorSpec(name="y", datatype=DATATYPES[kind], shape=shape or (-1, 2))


def apart(one: Array, other: Array, kind: str = "FP32") -> tuple[float, float]:
    found = difference([spec(kind)], [one], [other])
    return found.absolute, found.relative


def test_a_difference_is_relative_to_the_largest_magnitude() -> None:
    absolute, relative = apart(np.array([[100.0, 0.0]], np.float32), np.array([[100.0, 1.0]], np.float32))
    assert (absolute, relative) == (1.0, 0.01)


def test_the_same_is_not_apart_infinities_and_nan_included() -> None:
    array = np.array([[np.nan, np.inf], [-np.inf, 1.0]], np.float32)
    assert apart(array, array.copy()) == (0.0, 0.0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_where_it_should_be_is_infinitely_far(wrong: float) -> None:
    assert apart(np.ones((1, 2), np.float32), np.array([[1.0, wrong]], np.float32)) == (math.inf, math.inf)
    assert apart(np.array([[1.0, wrong]], np.float32), np.ones((1, 2), np.float32)) == (math.inf, math.inf)


def test_another_shape_is_infinitely_far() -> None:
    assert apart(np.ones((1, 2), np.float32), np.ones((2, 2), np.float32))[1] == math.inf


def test_no_rows_are_not_apart() -> None:
    assert apart(np.ones((0, 2), np.float32), np.ones((0, 2), np.float32)) == (0.0, 0.0)


def test_integers_count_by_how_many_differ() -> None:
    assert apart(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 5]]), "INT64") == (0.25, 0.25)


def test_zeros_have_no_magnitude() -> None:
    assert apart(np.zeros((1, 2), np.float32), np.full((1, 2), 1e-9, np.float32)) == (
        pytest.approx(1e-9),
        pytest.approx(1e-9),
    )


def test_brain_floats_are_compared_as_numbers() -> None:
    one = (np.array([[1.0, 2.0]], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    assert apart(one, one + 1, "BF16")[1] == pytest.approx(0.0078125, rel=0.01)


def test_tolerances_grow_as_precision_falls() -> None:
    assert tolerance("fp32") < tolerance("fp16") < tolerance("bf16") < tolerance("int8") == TOLERANCE_QUANTISED


def test_every_batch_size_that_may_come_up_is_tried() -> None:
    assert buckets(64, 8, batches=True) == (1, 2, 4, 8, 16, 32, 64)
    assert buckets(48, 6, batches=True) == (1, 2, 4, 6, 8, 16, 32, 48)
    assert buckets(64, 8, batches=False) == (1,)


def test_lengths_are_read() -> None:
    assert parse_lengths("") == ()
    assert parse_lengths("16, 32") == (16, 32)
    for text in ("0", "x", "1,2,3,4,5,6,7,8,9", "70000"):
        with pytest.raises(ValueError, match=r"expected at most 8 sizes|invalid literal"):
            parse_lengths(text)


def test_samples_are_the_same_every_time_and_stay_within_what_a_model_takes() -> None:
    signature = Signature(
        inputs=(
            TensorSpec(name="ids", datatype=DATATYPES["INT64"], shape=(-1, -1)),
            TensorSpec(name="mask", datatype=DATATYPES["INT64"], shape=(-1, -1)),
            TensorSpec(name="x", datatype=DATATYPES["FP16"], shape=(-1, 3)),
            TensorSpec(name="b", datatype=DATATYPES["BF16"], shape=(-1,)),
        ),
        outputs=(),
    )
    graph = Graph(
        nodes=(Node(operator="Gather", inputs=("table", "ids"), outputs=("y",)),),
        weights={"table": Weight(kind=1, dims=(7, 2))},
        inputs={"ids": ("batch", "sequence")},
    )
    samples = Samples(signature, graph, batches=True)
    made, again = samples.make(4, 32), samples.make(4, 32)
    for name, array in made.items():
        np.testing.assert_array_equal(array, again[name])
    assert made["ids"].shape == (4, 32)
    assert made["ids"].min() >= 0
    assert made["ids"].max() == 6
    assert set(np.unique(made["mask"])) == {0, 1}
    assert (made["mask"][:, 0] == 1).all()
    assert (made["x"].shape, made["x"].dtype) == ((4, 3), np.dtype(np.float16))
    assert (made["b"].shape, made["b"].dtype) == ((4,), np.dtype(np.uint16))
