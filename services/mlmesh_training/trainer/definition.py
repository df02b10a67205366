"""The seam between recipes and the fitting: what a recipe brings, and what the fitting gets to see of the data.

A recipe of another distribution implements `Definition`, best by extending `Classification` or `Regression`, and is
found by the entry point group "mlmesh.recipes" (see `mlmesh_training.recipes`). Everything here runs in a training
process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

Settings = Mapping[str, float]
"""Hyperparameters by name, all of them, defaults filled in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Examples as the model takes them, on the CPU.

    Attributes:
        inputs: one tensor an input of the model, each [examples, ...], in the order of `Definition.input_names`.
        targets: int64 [examples], index of the true class, or FP32 [examples] for regression: then as the model is to
            give them, which is normalised where `Loaded.target_mean` and `target_std` say so.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def __len__(self) -> int:
        """Examples."""
        return len(self.targets)

    def rows(self, indexes: Tensor) -> Part:
        """The examples at these indexes, int64 [n]."""
        return Part(inputs=tuple(each[indexes] for each in self.inputs), targets=self.targets[indexes])


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A data set, split and ready to fit. Loading it again, in any process, gives the same tensors in the same order.

    Attributes:
        train, validation, test: disjoint; test data is measured once, at the end.
        labels: names of the classes in order; empty for regression.
        fingerprint: SHA-256 over the whole data set as it was read, hex.
        statistics: plain JSON values found out on the training part (means, vocabulary, cleaning counts); shipped with
            the model. "cleaning", a mapping of counts, is told in the job's log.
        target_mean, target_std: of a regression's targets before they were normalised; 0 and 1 where they were not.
    """

    train: Part
    validation: Part
    test: Part
    labels: tuple[str, ...] = ()
    fingerprint: str = ""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    target_mean: float = 0.0
    target_std: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedFile:
    """A file that goes into the version beside the model: labels, a tokenizer, statistics."""

    path: str
    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A dimension beside the batch that may be of any size from `low` to `high` when the model is served."""

    name: str
    low: int
    high: int


class Definition(Protocol):
    """What a recipe brings. Stateless: all state is in the module that `build` gives."""

    input_names: Sequence[str]
    """Inputs of the model as served, in order."""

    output_names: Sequence[str]
    """Outputs of the module that `serving` gives, in order; the first are the logits, or the values of a regression."""

    axes: Mapping[str, Mapping[int, Axis]]
    """Dynamic dimensions of inputs beside the first, which is always the batch: input name → dimension → axis."""

    def load(self, dataset: str, folder: str, *, seed: int, settings: Settings) -> Loaded:
        """Read, clean and split a data set. Errors: PermanentError.

        Args:
            dataset: name of a named data set; empty for a registered one.
            folder: folder with the files of a registered one.
            seed: of the split.
        """
        ...

    def build(self, settings: Settings, loaded: Loaded) -> nn.Module:
        """A module from raw inputs to outputs, FP32 [batch, classes] logits or FP32 [batch] values.

        Normalisation is part of it. Weights are drawn from torch's global generator.
        """
        ...

    def augment(self, inputs: tuple[Tensor, ...], settings: Settings, generator: Generator) -> tuple[Tensor, ...]:
        """Training inputs, changed at random by the generator alone."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
        """Mean loss of a batch, a scalar."""
        ...

    def serving(self, model: nn.Module) -> nn.Module:
        """The module that is exported: from the model's inputs to all of `output_names`."""
        ...

    def files(self, loaded: Loaded) -> Sequence[ShippedFile]:
        """What is shipped beside the model, the labels and the statistics, which are shipped in any case."""
        ...

    def describe(self, loaded: Loaded) -> Mapping[str, str]:
        """Labels of the version that say how to feed the model, such as input_layout and input_range."""
        ...


class _Base:
    """What most recipes share."""

    axes: Mapping[str, Mapping[int, Axis]] = {}

    def augment(self, inputs: tuple[Tensor, ...], settings: Settings, generator: Generator) -> tuple[Tensor, ...]:  # noqa: ARG002
        """The inputs as they are."""
        return inputs

    def files(self, loaded: Loaded) -> Sequence[ShippedFile]:  # noqa: ARG002
        """Nothing more."""
        return ()

    def describe(self, loaded: Loaded) -> Mapping[str, str]:  # noqa: ARG002
        """Nothing more."""
        return {}


class Classification(_Base):
    """Base of classifiers: `build` gives a module to logits; logits and probabilities are served."""

    output_names: Sequence[str] = ("logits", "probabilities")

    def loss(self, outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
        """Cross-entropy, smoothed by `label_smoothing` where the recipe has it."""
        smoothing = settings.get("label_smoothing", 0.0)
        return nn.functional.cross_entropy(outputs, targets, label_smoothing=smoothing)

    def serving(self, model: nn.Module) -> nn.Module:
        """The model with its probabilities."""
        return WithProbabilities(model)


class Regression(_Base):
    """Base of regressors: `build` gives a module to values, normalised as the targets are; values are served.

    The module has two scalar buffers, `target_mean` and `target_std`, taken from `Loaded`.
    """

    output_names: Sequence[str] = ("value",)

    def loss(self, outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:  # noqa: ARG002
        """Mean squared error of normalised values."""
        return nn.functional.mse_loss(outputs, targets)

    def serving(self, model: nn.Module) -> nn.Module:
        """The model in the unit of the target."""
        return InUnits(model)


class WithProbabilities(nn.Module):
    """What is served of a classifier: logits, and the probabilities that they mean."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities, each FP32 [batch, classes]."""
        logits = self.model(*inputs)
        return logits, torch.softmax(logits, dim=1)


class InUnits(nn.Module):
    """What is served of a regressor: values in the unit of the target."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        """Values, FP32 [batch]."""
        values: Tensor = self.model(*inputs) * self.model.target_std + self.model.target_mean
        return values
