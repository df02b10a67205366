"""Measures of a classifier on held-out data. Pure numpy: scikit-learn's figures without its seconds of import."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlmesh_training.jobs import Evaluation


def evaluate(logits: npt.NDArray[np.float32], classes: npt.NDArray[np.int64], labels: tuple[str, ...]) -> Evaluation:
    """Measure predictions.

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
    )


def confusion_matrix(
    predicted: npt.NDArray[np.int64], classes: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.int64]:
    """Counts, int64 [true class, predicted class]."""
    return np.bincount(classes * count + predicted, minlength=count * count).reshape(count, count)


def cross_entropy(logits: npt.NDArray[np.float64], classes: npt.NDArray[np.int64]) -> float:
    """Mean cross-entropy in nats, computed without overflow."""
    highest = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - highest).sum(axis=1)) + highest[:, 0]
    return float((total - logits[np.arange(len(classes)), classes]).mean())


def _share(
    part: npt.NDArray[np.float64], whole: npt.NDArray[np.int64] | npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Part of whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
