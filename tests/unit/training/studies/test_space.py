"""What may be searched, said field by field; discrete values and grids are exact."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_runtime.errors import InvalidInput
from mlmesh_training import recipes
from mlmesh_training.studies.space import Axis, Dimension, grid_order, grid_point, grid_points, resolve

KNOWN = {known.name: known for known in recipes.RECIPES["mlp"].hyperparameters}


def dimension(name: str = "learning_rate", **fields: Any) -> Dimension:
    return Dimension(name=name, **fields)


def test_without_bounds_the_recipes_are_searched() -> None:
    (axis,) = resolve([dimension(log=True)], KNOWN, grid=False)
    assert axis == Axis(name="learning_rate", low=1e-6, high=1.0, log=True)
    (axis,) = resolve([dimension("depth")], KNOWN, grid=False)
    assert (axis.low, axis.high, axis.integer, axis.count) == (1, 8, True, None)


@pytest.mark.parametrize(
    ("bad", "field", "grid"),
    [
        (dimension("depht"), "name", False),
        (dimension(low=0.1), "max_value", False),
        (dimension(high=0.1), "min_value", False),
        (dimension(low=0.2, high=0.1), "min_value", False),
        (dimension(low=0.1, high=2.0), "max_value", False),
        (dimension(low=-1.0, high=0.1), "min_value", False),
        (dimension("dropout", log=True), "log_scale", False),
        (dimension(low=0.1, high=0.2, step=0.01, log=True), "log_scale", False),
        (dimension("depth", low=1.5, high=3.0), "min_value", False),
        (dimension("depth", step=0.5), "step", False),
        (dimension(values=(0.1, 0.1)), "values", False),
        (dimension(values=(0.1, 7.0)), "values[1]", False),
        (dimension("depth", values=(1.0, 1.5)), "values[1]", False),
        (dimension(values=(0.1,), low=0.1, high=0.2), "min_value", False),
        (dimension(values=(0.1,), step=0.1), "step", False),
        (dimension(values=(0.1,), log=True), "log_scale", False),
        (dimension(low=0.1, high=0.2), "step", True),
        (dimension("depth"), "step", True),
        (dimension(low=0.1, high=math.inf), "max_value", False),
    ],
)
def test_what_cannot_be_searched_names_the_field(bad: Dimension, field: str, grid: bool) -> None:
    with pytest.raises(InvalidInput) as raised:
        resolve([dimension("weight_decay", step=0.1), bad], KNOWN, grid=grid)
    assert f"spec.dimensions[1].{field}" in {violation.field for violation in raised.value.violations}


def test_a_name_twice_is_refused_and_all_faults_are_told_at_once() -> None:
    with pytest.raises(InvalidInput) as raised:
        resolve([dimension(), dimension(), dimension("x")], KNOWN, grid=False)
    assert [violation.field for violation in raised.value.violations] == [
        "spec.dimensions[1].name",
        "spec.dimensions[2].name",
    ]


def test_steps_hit_both_ends_and_are_what_a_person_would_write() -> None:
    axis = Axis(name="x", low=0.0, high=0.9, step=0.1)
    assert axis.count == 10
    assert [axis.at(index) for index in range(10)] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert Axis(name="x", low=1, high=8, integer=True, step=3).count == 3


@given(
    low=st.floats(-1e3, 1e3),
    width=st.floats(0, 1e3),
    step=st.floats(1e-3, 10),
    share=st.floats(0, 1, exclude_max=True),
)
def test_every_point_of_a_stepped_axis_is_within_it_and_found_again(
    low: float, width: float, step: float, share: float
) -> None:
    axis = Axis(name="x", low=low, high=low + width, step=step)
    assert axis.count is not None
    index = int(share * axis.count)
    assert axis.low <= axis.at(index) <= axis.high
    assert axis.index(axis.at(index)) == index


def test_a_grid_visits_each_point_once_in_an_order_of_its_seed() -> None:
    axes = resolve([dimension(values=(0.1, 0.01)), dimension("depth", low=1, high=5, step=2)], KNOWN, grid=True)
    assert grid_points(axes) == 6
    orders = [grid_order(axes, seed=seed, among=6) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    points = [tuple(grid_point(axes, index).values()) for index in orders[0]]
    assert sorted(points) == sorted(itertools.product((0.01, 0.1), (1.0, 3.0, 5.0)))


def test_a_part_of_a_grid_that_fits_no_memory_is_drawn_at_once() -> None:
    axes = [Axis(name=str(number), low=0, high=1, step=1e-6) for number in range(12)]
    assert grid_points(axes) > 2**200
    order = grid_order(axes, seed=1, among=100)
    assert len(set(order)) == 100
    assert all(0 <= value <= 1 for value in grid_point(axes, order[0]).values())
