"""The seam between recipes and the fitting: what a recipe brings, and what the fitting gets to see of the data.

A recipe of another distribution implements `Definition` and is found by the entry point group "mlmesh.recipes" (see
`mlmesh_training.recipes`). Everything here runs in a training process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Generator, Tensor, nn

Settings = Mapping[str, float]
"""Hyperparameters by name, all of them, defaults filled in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Examples as the model takes them, on the CPU.

    Attributes:
        inputs: one tensor an input of the model, each [examples, ...], in the order of `Definition.input_names`.
        targets: int64 [examples], index of the true class, or FP32 [examples] for regression.
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
            the model.
    """

    train: Part
    validation: Part
    test: Part
    labels: tuple[str, ...] = ()
    fingerprint: str = ""
    statistics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShippedFile:
    """A file that goes into the version beside the model: labels, a tokenizer, statistics."""

    path: str
    data: bytes
    media_type: str


class Definition(Protocol):
    """What a recipe brings. Stateless: all state is in the module that `build` gives."""

    input_names: Sequence[str]
    """Inputs of the model as served, in order."""

    output_names: Sequence[str]
    """Outputs of the module that `serving` gives, in order; the first is what `forward` of the model gives."""

    def load(self, dataset: str, folder: str, *, seed: int) -> Loaded:
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
        """What is shipped beside the model."""
        ...
