"""What is taken out of a data set, and that all of it is counted; what is found out on the training part alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("torch")

from mlmesh_training.trainer import cleaning, data, tabular
from mlmesh_training.trainer.data import Images, Table, Texts
from mlmesh_training.trainer.reporter import PermanentError


def table(rows: list[tuple[str, ...]], names: tuple[str, ...] = ("a", "b")) -> Table:
    """Rows whose last value is the target."""
    return Table(
        names=names, cells=tuple(zip(*(row[:-1] for row in rows), strict=True)), target=tuple(row[-1] for row in rows)
    )


def test_images_that_repeat_contradict_or_are_not_finite_are_removed() -> None:
    pixels = np.arange(6 * 64, dtype=np.float32).reshape(6, 1, 8, 8)
    pixels[1] = pixels[0]  # the same, of the same class
    pixels[3] = pixels[2]  # the same, of another class
    pixels[4, 0, 0, 0] = math.inf
    found, counts = cleaning.images(Images(pixels=pixels, classes=np.array([0, 0, 0, 1, 1, 1]), labels=("x", "y")))
    assert found.pixels[:, 0, 0, 0].tolist() == [0.0, 320.0]
    assert found.classes.tolist() == [0, 1]
    assert counts == {"read": 6, "not_finite": 1, "duplicates": 1, "contradictory": 2, "kept": 2}


def test_texts_are_trimmed_and_repetitions_are_seen_in_any_case() -> None:
    found, counts = cleaning.texts(
        Texts(texts=("  What  is\nit?", "what is it?", " ", "Go!", "go!", "Hm"), labels=("q", "q", "q", "x", "y", ""))
    )
    assert (found.texts, found.labels) == (("What is it?",), ("q",))
    assert counts == {
        "read": 6,
        "empty": 1,
        "target_missing": 1,
        "duplicates": 1,
        "contradictory": 2,
        "kept": 1,
    }


def test_rows_without_a_target_without_values_and_repeated_ones_are_removed() -> None:
    found, counts = cleaning.table(
        table([("1", "x", "7"), ("1", "x", "7"), ("1", "x", "8"), ("NA", "?", "9"), ("2", "y", ""), ("2", "", "inf")]),
        regression=True,
    )
    assert found.target.tolist() == [7.0, 8.0]
    assert counts == {
        "read": 6,
        "target_missing": 2,
        "rows_without_values": 1,
        "duplicates": 1,
        "cells_not_finite": 0,
        "kept": 2,
    }
    assert "6 read, 2 removed without a target" in cleaning.describe(counts)


def test_columns_are_numbers_or_categories_and_what_is_infinite_is_missing() -> None:
    rows = [(str(index), "red" if index % 2 else "NULL", "7") for index in range(4)]
    found, counts = cleaning.table(table([*rows, ("-inf", "blue", "7"), ("1e39", "blue", "8")]), regression=True)
    number, category = found.columns
    assert number.numbers is not None
    assert np.array_equal(number.numbers, [0, 1, 2, 3, math.nan, math.nan], equal_nan=True)
    assert category.texts == (None, "red", None, "red", "blue", "blue")
    assert counts["cells_not_finite"] == 2


def test_a_target_that_is_no_number_is_said_with_its_row() -> None:
    with pytest.raises(PermanentError, match=r"row 2: expected a number, got 'tall'"):
        cleaning.table(table([("1", "x", "7"), ("2", "y", "tall")]), regression=True)


def test_labels_are_in_the_order_of_their_numbers_or_of_their_names() -> None:
    assert cleaning.encoded(["10", "9", "9.5"])[1] == ("9", "9.5", "10")
    assert cleaning.encoded(["b", "a", "2"])[1] == ("2", "a", "b")
    assert cleaning.encoded(["b", "a"], ("b", "a"))[0].tolist() == [0, 1]
    with pytest.raises(PermanentError, match="1 different values"):
        cleaning.encoded(["a", "a"])
    with pytest.raises(PermanentError, match="'c' is none of the classes"):
        cleaning.encoded(["a", "c"], ("a", "b"))


def test_statistics_are_those_of_the_training_part_alone() -> None:
    rows = [(str(index), "red" if index < 5 else "blue", "5", str(index)) for index in range(8)]
    found, _ = cleaning.table(table(rows, ("number", "colour", "same")), regression=True)
    train = np.arange(6, dtype=np.int64)
    known, left = tabular.features(found.columns, train)
    number, colour = known
    assert left == {"columns_constant": ["same"], "columns_free_text": []}
    assert (number.mean, number.minimum, number.maximum) == (2.5, 0.0, 5.0)
    assert number.std == pytest.approx(np.arange(6).std())
    assert colour.categories == ("blue", "red")
    values = tabular.matrix(found.columns, known)
    assert values[:, 1].tolist() == [1.0] * 5 + [0.0] * 3
    assert [tabular.Feature.read(feature.document()) for feature in known] == list(known)
    # A category that only other parts have is as unknown as one that is missing.
    only, _ = tabular.features(found.columns, np.arange(5, dtype=np.int64))
    assert [feature.name for feature in only] == ["number"]


def test_a_column_of_many_texts_is_left_out() -> None:
    rows = [(str(index), f"person {index}", str(index)) for index in range(100)]
    found, _ = cleaning.table(table(rows), regression=True)
    known, left = tabular.features(found.columns, np.arange(100, dtype=np.int64))
    assert [feature.name for feature in known] == ["a"]
    assert left["columns_free_text"] == ["b"]


def test_a_regression_is_split_by_quantiles_of_its_target() -> None:
    values = np.random.default_rng(3).exponential(size=500)
    split = data.split(data.bins(values), seed=5)
    assert np.concatenate([split.train, split.validation, split.test]).tolist() != list(range(500))
    assert sorted(np.concatenate([split.train, split.validation, split.test]).tolist()) == list(range(500))
    highest = np.quantile(values, 0.9)
    for part, share in ((split.train, 0.72), (split.validation, 0.08), (split.test, 0.2)):
        assert len(part) == pytest.approx(500 * share, abs=6)
        assert (values[part] > highest).mean() == pytest.approx(0.1, abs=0.03)


def test_a_data_set_that_is_too_small_is_said() -> None:
    with pytest.raises(PermanentError, match="12 usable examples"):
        data.split(np.zeros(12, dtype=np.int64), seed=1)
    with pytest.raises(PermanentError, match="too few examples of a class"):
        data.split(np.arange(40, dtype=np.int64), seed=1)


def test_a_fingerprint_tells_texts_from_texts_however_they_are_joined() -> None:
    assert data.text_fingerprint(["ab", "c"]) != data.text_fingerprint(["a", "bc"])
    assert data.text_fingerprint(["a"], ["b"]) != data.text_fingerprint(["a", "b"])
    assert data.text_fingerprint(["a"], ["b"]) == data.text_fingerprint(["a"], ["b"])
