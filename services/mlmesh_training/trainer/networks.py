"""The networks of the recipes. They take raw values: normalisation is their first layer and exported with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mlmesh_training.trainer.tabular import Feature

Settings = Mapping[str, float]


class Classifier(nn.Module):
    """A network with its normalisation.

    Args:
        network: from normalised images, FP32 [batch, channels, height, width], to logits, FP32 [batch, classes].
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
        """Logits, FP32 [batch, classes], of raw images, FP32 [batch, channels, height, width]."""
        logits: Tensor = self.network((image - self.mean) * self.scale)
        return logits


def convolutional(settings: Settings, shape: Sequence[int], classes: int) -> nn.Module:
    """Three blocks of convolution, each halving height and width; the sides are at least 8."""
    channels, height, width = shape
    first = int(settings["width"])
    layers: list[nn.Module] = []
    for wide in (first, 2 * first, 4 * first):
        layers += [
            nn.Conv2d(channels, wide, 3, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = wide
    features = channels * (height // 8) * (width // 8)
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(settings["dropout"]), nn.Linear(features, classes))


def connected(settings: Settings, shape: Sequence[int], classes: int) -> nn.Module:
    """Fully connected layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    features, hidden = 1, int(settings["width"])
    for side in shape:
        features *= side
    for _ in range(int(settings["depth"])):
        layers += [nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
        features = hidden
    return nn.Sequential(*layers, nn.Dropout(settings["dropout"]), nn.Linear(features, classes))


class TableNetwork(nn.Module):
    """Fully connected layers over the columns of a table.

    Takes raw values, FP32 [batch, columns]: numbers as they are, categories as their index, NaN for what is missing.
    Numbers are normalised, missing ones are the mean; categories become one-hot, missing or unknown ones all zeros.

    Args:
        features: what is known of each column, in order.
        outputs: logits of so many classes, FP32 [batch, outputs]; 0 for a regression: FP32 [batch].
        target: mean and standard deviation of a regression's target before normalisation.
    """

    mean: Tensor
    scale: Tensor
    numeric: Tensor
    target_mean: Tensor
    target_std: Tensor

    def __init__(
        self, features: Sequence[Feature], settings: Settings, *, outputs: int, target: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        super().__init__()
        numbers = [index for index, each in enumerate(features) if not each.categories]
        self.register_buffer("numeric", torch.tensor(numbers, dtype=torch.int64))
        self.register_buffer("mean", torch.tensor([features[index].mean for index in numbers]))
        self.register_buffer("scale", torch.tensor([1.0 / features[index].std for index in numbers]))
        self.register_buffer("target_mean", torch.tensor(target[0]))
        self.register_buffer("target_std", torch.tensor(target[1]))
        self._categories = [(index, len(each.categories)) for index, each in enumerate(features) if each.categories]
        self._regression = outputs == 0
        wide = len(numbers) + sum(size for _, size in self._categories)
        hidden = int(settings["width"])
        layers: list[nn.Module] = []
        for _ in range(int(settings["depth"])):
            layers += [nn.Linear(wide, hidden), nn.ReLU()]
            wide = hidden
        self.network = nn.Sequential(*layers, nn.Dropout(settings["dropout"]), nn.Linear(wide, outputs or 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits, or normalised values."""
        numbers = features.index_select(1, self.numeric)
        known = torch.where(torch.isnan(numbers), self.mean, numbers)
        parts = [(known - self.mean) * self.scale]
        for index, size in self._categories:
            indexes = torch.arange(size, dtype=features.dtype, device=features.device)
            parts.append((features[:, index : index + 1] == indexes).to(features.dtype))
        answers: Tensor = self.network(torch.cat(parts, dim=1))
        return answers.squeeze(1) if self._regression else answers
