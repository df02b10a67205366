"""The two models that every server serves.

tiny: 64 floats through two matrices to 10: as little work as a model can be, so that the server is measured.
minilm: the all-MiniLM-L6-v2 encoder with mean pooling, 32 tokens, as FP32 ONNX: the engine and batching are measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

TINY: Final = "tiny"
MINILM: Final = "minilm"
FEATURES: Final = 64
CLASSES: Final = 10
TOKENS: Final = 32
HIDDEN: Final = 384


def write(folder: Path) -> dict[str, Path]:
    """Write both models; what is there already stays. Needs onnx, and for minilm torch and the encoder's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.onnx" for name in (TINY, MINILM)}
    if not paths[TINY].exists():
        write_tiny(paths[TINY])
    if not paths[MINILM].exists():
        _write_minilm(paths[MINILM])
    return paths


def inputs(model: str, rows: int = 1) -> list[tuple[str, str, np.ndarray]]:
    """Name, datatype and value of each input: the same for every request."""
    generator = np.random.default_rng(7)
    if model == TINY:
        return [("x", "FP32", generator.standard_normal((rows, FEATURES)).astype(np.float32))]
    return [
        ("input_ids", "INT64", generator.integers(1000, 30000, (rows, TOKENS))),
        ("attention_mask", "INT64", np.ones((rows, TOKENS), np.int64)),
    ]


def output_bytes(model: str) -> int:
    """Bytes of one row of the output."""
    return 4 * (CLASSES if model == TINY else HIDDEN)


def write_tiny(path: Path, *, seed: int = 0) -> Path:
    """Write the tiny model with other weights a seed; the path."""
    from onnx import TensorProto, helper, numpy_helper, save

    generator = np.random.default_rng(seed)
    first = generator.standard_normal((FEATURES, FEATURES)).astype(np.float32)
    second = generator.standard_normal((FEATURES, CLASSES)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "b"], ["y"]),
        ],
        TINY,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "b")],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def _write_minilm(path: Path) -> None:
    import torch

    from mlmesh_training.trainer.encoder import Encoder, model_folder, pooled

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder.pretrained(model_folder(), frozen=6)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return pooled(self.encoder(input_ids, attention_mask), attention_mask)

    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=256)
    sample = tuple(torch.from_numpy(array) for _, _, array in inputs(MINILM, rows=2))
    program = torch.onnx.export(
        Embedder().eval(),
        sample,
        input_names=["input_ids", "attention_mask"],
        output_names=["sentence_embedding"],
        dynamic_shapes={"input_ids": {0: batch, 1: tokens}, "attention_mask": {0: batch, 1: tokens}},
        dynamo=True,
        opset_version=20,
        external_data=False,
        optimize=True,
        verbose=False,
    )
    program.save(str(path))
