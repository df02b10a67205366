"""TorchServe's handler: ONNX Runtime over the batch that TorchServe put together. Bodies are raw tensors."""

from __future__ import annotations

import os
import sys

import numpy as np

sys.path.insert(0, os.environ["BENCH_FOLDER"])
from runtime_onnx import Model as Onnx

_MODEL = None


def handle(data: list, context: object) -> list | None:
    """One batch: each item's body is the raw bytes of its tensors, one after the other."""
    global _MODEL  # noqa: PLW0603  TorchServe calls a function
    if _MODEL is None:
        _MODEL = Onnx(os.path.join(os.environ["BENCH_MODELS"], context.manifest["model"]["modelName"] + ".onnx"))
    if not data:
        return None
    types = [np.float32 if kind == "tensor(float)" else np.int64 for _, kind in _MODEL.inputs]
    rows = []
    for item in data:
        body = item.get("data") or item.get("body")
        size = len(body) // len(types)
        rows.append(
            [
                np.frombuffer(body, dtype, size // dtype().itemsize, number * size)[None]
                for number, dtype in enumerate(types)
            ]
        )
    arrays = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
    result = _MODEL.run({name: array for (name, _), array in zip(_MODEL.inputs, arrays, strict=True)})
    return [row.tobytes() for row in result]
