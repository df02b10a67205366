"""Rows in messages, and rows out of answers."""

from __future__ import annotations

import numpy as np
import pytest

from mlmesh_client.errors import InvalidInput, ServerError
from mlmesh_client.messages import Model, Result
from mlmesh_client.rows import Message, Packer, split
from mlmesh_client.tensors import TensorSpec


def model(*shape: int, rows_max: int = 0) -> Model:
    return Model(
        name="m",
        platform="",
        versions=(),
        inputs=(TensorSpec(name="x", datatype="FP32", shape=shape),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=shape),),
        rows_max=rows_max,
    )


def packed(packer: Packer, rows: list[object]) -> list[Message]:
    return [message for row in rows for message in packer.add(row)] + packer.rest()


def test_messages_are_full_but_for_the_last() -> None:
    messages = packed(Packer(model(-1, 2), rows_per_message=3), [[n, n] for n in range(8)])
    assert [(message.first, message.count) for message in messages] == [(0, 3), (3, 3), (6, 2)]
    assert messages[1].inputs["x"].tolist() == [[3, 3], [4, 4], [5, 5]]
    assert messages[1].inputs["x"].dtype == np.float32


def test_a_row_of_another_shape_begins_another_message() -> None:
    messages = packed(Packer(model(-1, -1), rows_per_message=8), [[1], [2], [3, 4], [5, 6], [7]])
    assert [message.inputs["x"].shape for message in messages] == [(2, 1), (2, 2), (1, 1)]


@pytest.mark.parametrize(("rows_max", "wanted", "most"), [(0, 0, 64), (4, 0, 4), (1000, 0, 64), (1000, 100, 100)])
def test_how_many_rows_a_message_has(rows_max: int, wanted: int, most: int) -> None:
    messages = packed(Packer(model(-1, rows_max=rows_max), rows_per_message=wanted), [1.0] * 1000)
    assert messages[0].count == most


def test_a_model_without_batches_gets_its_rows_one_by_one() -> None:
    messages = packed(Packer(model(2, 2)), [[[1, 2], [3, 4]]] * 2)
    assert [(message.count, message.inputs["x"].shape) for message in messages] == [(1, (2, 2))] * 2
    result = Result(outputs={"y": np.ones((2, 2))})
    assert split(result, messages[1])[0]["y"].shape == (2, 2)


def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"takes shape \[2\], got \[3\]"):
        Packer(model(-1, 2)).add([1, 2, 3])
    with pytest.raises(ValueError, match="0 or more"):
        Packer(model(-1, 2), rows_per_message=-1)


def test_answers_are_taken_apart_and_lies_are_errors() -> None:
    (message,) = packed(Packer(model(-1)), [1.0, 2.0])
    rows = split(Result(id="9", model_version="3", outputs={"y": np.array([10.0, 20.0])}), message)
    assert [(row.id, float(row["y"]), row.model_version) for row in rows] == [("0", 10.0, "3"), ("1", 20.0, "3")]
    for row in split(Result(outputs={"y": np.array([10.0])}), message):
        with pytest.raises(ServerError, match="for 2 rows"):
            row["y"]
    error = InvalidInput("no")
    assert [row.error for row in split(Result(error=error), message)] == [error, error]
