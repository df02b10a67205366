"""Steps behind a classifier."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mlmesh_inference.pipelines.steps.base import BuiltIn, Options, lines, tensor
from mlmesh_inference.tensors import Array, Signature


class ClassesStep(BuiltIn):
    """mlmesh.classes: scores to the best classes, best first.

    `scores` FP32 [count, classes] -> `class` INT64, `confidence` FP32, `label` BYTES [count, k].
    Options: k (1), softmax (true): scores are logits; labels (labels.txt where the version has it).
    """

    def __init__(self, options: Options) -> None:

        self._k = options.integer("k", 1, low=1, high=1000)
        self._softmax = options.flag("softmax", default=True)
        path = options.file("labels", "labels.txt")
        options.finish()
        self._labels = [line.encode() for line in lines(path)] if path is not None else []
        self.signature = Signature(
            inputs=(tensor("scores", "FP32", -1, -1),),
            outputs=(
                tensor("class", "INT64", -1, -1),
                tensor("confidence", "FP32", -1, -1),
                tensor("label", "BYTES", -1, -1),
            ),
        )

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        scores = inputs["scores"]
        if self._softmax:
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            scores /= scores.sum(axis=1, keepdims=True)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._k]
        labels = np.empty(best.shape, object)
        for row, column in np.ndindex(*best.shape):
            index = int(best[row, column])
            labels[row, column] = self._labels[index] if index < len(self._labels) else str(index).encode()
        confidence = np.take_along_axis(scores, best, axis=1).astype(np.float32, copy=False)
        return {"class": best.astype(np.int64), "confidence": confidence, "label": labels}
