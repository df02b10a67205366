"""Pictures: whole PNG files of a sensible size, the same bytes for the same values, whatever the names are."""

from __future__ import annotations

import struct

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from mlmesh_training.evaluate import evaluate, evaluate_regression
from mlmesh_training.jobs import Evaluation
from mlmesh_training.trainer import plots

EPOCHS = [
    {"epoch": float(n), "train_loss": 1 / n, "validation_loss": 1.1 / n, "train_accuracy": 1 - 0.5 / n}
    for n in range(1, 6)
]
NOTHING = np.empty(0)


def classified(classes: int, *, names: tuple[str, ...] = ()) -> Evaluation:
    random = np.random.default_rng(classes)
    right = random.integers(0, classes, 300)
    logits = np.eye(classes)[right] * 3 + random.normal(size=(300, classes))
    return evaluate(logits.astype(np.float32), right, names or tuple(str(each) for each in range(classes)))


def size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def test_a_classifier_has_curves_a_matrix_and_a_reliability_diagram() -> None:
    found = plots.drawn(classified(5), EPOCHS, values=NOTHING, targets=NOTHING)
    assert set(found) == {f"plots/{name}.png" for name in ("learning_curves", "confusion_matrix", "reliability")}
    for png in found.values():
        width, height = size(png)
        assert 300 < width < 1600
        assert 300 < height < 1600
        assert len(png) < 200_000
        # Nothing of the machine or the time: the same values give the same bytes.
        assert b"Software" not in png
    assert plots.drawn(classified(5), EPOCHS, values=NOTHING, targets=NOTHING) == found


def test_a_regressor_has_residuals_instead() -> None:
    targets = np.random.default_rng(1).normal(size=80) * 30 + 100
    values = (targets + np.random.default_rng(2).normal(size=80) * 9).astype(np.float32)
    evaluation = evaluate_regression(values, targets)
    found = plots.drawn(evaluation, [], values=values, targets=targets, target_name="price in $")
    assert set(found) == {"plots/residuals.png"}
    assert plots.drawn(evaluation, [], values=values, targets=targets, target_name="price in $") == found
    constant = np.full(5, 3.0)
    assert plots.drawn(
        evaluate_regression(constant.astype(np.float32), constant), [], values=constant, targets=constant
    )


@pytest.mark.parametrize(
    "names",
    [("$x^", "b"), ("a" * 200, "b\nc"), ("日本語", "\x00"), ("", " "), ("_\\frac", "%s")],
    ids=["formula", "long", "no glyph", "empty", "escapes"],
)
def test_any_name_can_be_drawn(names: tuple[str, str]) -> None:
    found = plots.drawn(classified(2, names=names), EPOCHS[:1], values=NOTHING, targets=NOTHING)
    width, height = size(found["plots/confusion_matrix.png"])
    assert max(width, height) < 1200


def test_a_matrix_of_many_classes_stays_a_picture() -> None:
    found = plots.drawn(classified(200), EPOCHS, values=NOTHING, targets=NOTHING)
    width, height = size(found["plots/confusion_matrix.png"])
    assert max(width, height) < 1600
    assert len(found["plots/confusion_matrix.png"]) < 200_000
