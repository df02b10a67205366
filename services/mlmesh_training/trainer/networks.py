"""The networks of the recipes. They take raw images: normalisation is their first layer and exported with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """A network with its normalisation.

    Args:
        network: from normalised images, FP32 [batch, 1, height, width], to logits, FP32 [batch, classes].
        mean, std: of the raw training images.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, *, mean: float, std: float) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("scale", torch.tensor(1.0 / max(std, 1e-6)))

    def forward(self, image: Tensor) -> Tensor:
        """Logits, FP32 [batch, classes], of raw images, FP32 [batch, 1, height, width]."""
        logits: Tensor = self.network((image - self.mean) * self.scale)
        return logits


def build(
    recipe: str, hyperparameters: Mapping[str, float], *, height: int, width: int, classes: int, mean: float, std: float
) -> Classifier:
    """The network of a recipe, with weights drawn from torch's global generator."""
    build_network = {"cnn": _cnn, "mlp": _mlp}[recipe]
    return Classifier(build_network(hyperparameters, height, width, classes), mean=mean, std=std)


def _cnn(hyperparameters: Mapping[str, float], height: int, width: int, classes: int) -> nn.Module:
    first = int(hyperparameters["width"])
    layers: list[nn.Module] = []
    channels = 1
    for wide in (first, 2 * first, 4 * first):
        layers += [
            nn.Conv2d(channels, wide, 3, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = wide
    features = channels * (height // 8) * (width // 8)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(hyperparameters["dropout"]), nn.Linear(features, classes))


def _mlp(hyperparameters: Mapping[str, float], height: int, width: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    features, hidden = height * width, int(hyperparameters["width"])
    for _ in range(int(hyperparameters["depth"])):
        layers += [nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        features = hidden
    return nn.Sequential(*layers, nn.Dropout(hyperparameters["dropout"]), nn.Linear(features, classes))
