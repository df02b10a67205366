"""Measures on held-out data. Pure numpy: scikit-learn's figures without its seconds of import."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlmesh_training.jobs import Calibration, CalibrationBin, Evaluation, RegressionErrors

CALIBRATION_BINS = 10

Floats = npt.NDArray[np.float64]


def evaluate(logits: npt.NDArray[np.float32], classes: npt.NDArray[np.int64], labels: tuple[str, ...]) -> Evaluation:
    """Measure a classifier.

    Args:
        logits: FP32 [examples, classes].
        classes: int64 [examples], index of the true label.
        labels: names of the classes.

    Precision, recall and F1 are macro means over all labels; a class that is never predicted has precision 0, one that
    never occurs has recall 0 (as in scikit-learn with zero_division=0 and all labels given).
    """
    wide = logits.astype(np.float64)
    confusion = confusion_matrix(wide.argmax(axis=1), classes, len(labels))
    right = np.diag(confusion).astype(np.float64)
    precision = _share(right, confusion.sum(axis=0))
    recall = _share(right, confusion.sum(axis=1))
    f1 = _share(2 * precision * recall, precision + recall)
    return Evaluation(
        accuracy=float(right.sum() / len(classes)),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
        loss=cross_entropy(wide, classes),
        labels=labels,
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        examples=len(classes),
        calibration=calibration(softmax(wide), classes),
    )


def evaluate_regression(values: npt.NDArray[np.float32], targets: Floats) -> Evaluation:
    """Measure a regressor: values and targets, each [examples], in the unit of the target. `loss` is the mean squared
    error. R² is 0 where all targets are the same.
    """
    errors = values.astype(np.float64) - targets
    squared = float((errors**2).mean())
    variance = float(targets.var())
    return Evaluation(
        loss=squared,
        examples=len(targets),
        regression=RegressionErrors(
            mean_absolute_error=float(np.abs(errors).mean()),
            root_mean_squared_error=squared**0.5,
            r2=1.0 - squared / variance if variance > 0 else 0.0,
        ),
    )


def confusion_matrix(
    predicted: npt.NDArray[np.int64], classes: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.int64]:
    """Counts, int64 [true class, predicted class]."""
    return np.bincount(classes * count + predicted, minlength=count * count).reshape(count, count)


def softmax(logits: Floats) -> Floats:
    """Probabilities, [examples, classes], computed without overflow."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = raised / raised.sum(axis=1, keepdims=True)
    return shares


def cross_entropy(logits: Floats, classes: npt.NDArray[np.int64]) -> float:
    """Mean cross-entropy in nats, computed without overflow."""
    highest = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - highest).sum(axis=1)) + highest[:, 0]
    return float((total - logits[np.arange(len(classes)), classes]).mean())


def calibration(probabilities: Floats, classes: npt.NDArray[np.int64]) -> Calibration:
    """How far probabilities, [examples, classes], can be believed.

    Confidence is the probability of the predicted class. Bins are equal and hold their upper edge, (0, 0.1] to
    (0.9, 1.0]. The expected error (ECE) weights a bin's distance by its examples, the maximum (MCE) is over bins that
    have any; the Brier score sums squared distances over the classes (Brier, 1950).
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == classes
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    place = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, CALIBRATION_BINS - 1)
    bins, expected, largest = [], 0.0, 0.0
    for index in range(CALIBRATION_BINS):
        inside = place == index
        count = int(inside.sum())
        mean, share = (float(confidence[inside].mean()), float(right[inside].mean())) if count else (0.0, 0.0)
        bins.append(CalibrationBin(examples=count, confidence=mean, accuracy=share))
        expected += abs(mean - share) * count / len(classes)
        largest = max(largest, abs(mean - share))
    true = np.eye(probabilities.shape[1])[classes]
    return Calibration(
        expected_error=expected,
        max_error=largest,
        brier=float(((probabilities - true) ** 2).sum(axis=1).mean()),
        bins=tuple(bins),
    )


def _share(part: Floats, whole: npt.NDArray[np.int64] | Floats) -> Floats:
    """Part of whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
