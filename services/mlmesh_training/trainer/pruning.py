"""Weights set to zero and held there while the rest is fine-tuned."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mlmesh_training.options import Pruning
from mlmesh_training.trainer import weights
from mlmesh_training.trainer.definition import Definition, Loaded, Settings
from mlmesh_training.trainer.wrapping import Wrapped

_GROUP, _KEPT_OF_GROUP = 4, 2
LEARNING_RATE_SHARE = 0.1
"""Of the learning rate that the source was trained with: fine-tuning starts near an optimum."""


class Pruned(Wrapped):
    """A recipe whose model begins as the source's with weights removed.

    Args:
        source: folder with the source's files.
    """

    def __init__(self, inner: Definition, pruning: Pruning, source: Path) -> None:
        super().__init__(inner)
        self._pruning = pruning
        self._source = source

    def build(self, settings: Settings, loaded: Loaded) -> nn.Module:
        """The source's model, its zeros held by a parametrisation. Errors: PermanentError."""
        model = self.inner.build(settings, loaded)
        weights.load_into(model, self._source / weights.WEIGHTS_FILE)
        prune(model, self._pruning)
        return model

    def serving(self, model: nn.Module) -> nn.Module:
        """The module that is exported, with its zeros in place."""
        bake(model)
        return self.inner.serving(model)


class Masked(nn.Module):
    """A parametrisation that multiplies a weight by zeros and ones."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its zeros."""
        return weight * self.mask


def prune(model: nn.Module, pruning: Pruning) -> None:
    """Hold the least weights of every linear and convolutional layer at zero.

    By magnitude the share `sparsity` of all of them together; 2:4 the two least of every four in a row of what a
    unit takes in (NVIDIA's sparse tensor cores), where their number divides by four.
    """
    layers = list(_layers(model))
    if pruning.two_four:
        masks = [_two_four(layer.weight.detach()) for layer in layers]
    else:
        masks = _by_magnitude([layer.weight.detach() for layer in layers], pruning.sparsity)
    for layer, mask in zip(layers, masks, strict=True):
        parametrize.register_parametrization(layer, "weight", Masked(mask))


def bake(model: nn.Module) -> None:
    """Write the zeros into the weights and forget the parametrisations."""
    for layer in _layers(model):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def sparsity(model: nn.Module) -> float:
    """Share of the weights of linear and convolutional layers that are zero, 0 to 1."""
    found = [layer.weight.detach() for layer in _layers(model)]
    count = sum(weight.numel() for weight in found)
    return sum(int((weight == 0).sum()) for weight in found) / count if count else 0.0


def _layers(model: nn.Module) -> Iterator[nn.Linear | nn.Conv1d | nn.Conv2d]:
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            yield layer


def _by_magnitude(found: list[Tensor], share: float) -> list[Tensor]:
    magnitudes = torch.cat([weight.abs().flatten() for weight in found])
    count = round(share * len(magnitudes))
    keep = torch.ones_like(magnitudes)
    keep[torch.argsort(magnitudes, stable=True)[:count]] = 0
    parts = torch.split(keep, [weight.numel() for weight in found])
    return [part.view_as(weight) for part, weight in zip(parts, found, strict=True)]


def _two_four(weight: Tensor) -> Tensor:
    rows = weight.flatten(1)
    if rows.shape[1] % _GROUP:
        return torch.ones_like(weight)
    groups = rows.abs().view(-1, _GROUP)
    mask = torch.ones_like(groups)
    mask.scatter_(1, torch.argsort(groups, dim=1, stable=True)[:, : _GROUP - _KEPT_OF_GROUP], 0.0)
    return mask.view_as(weight)
