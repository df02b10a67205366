"""A recipe behind another one: what the other one does not change is passed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Generator, Tensor, nn

from mlmesh_training.trainer.definition import Axis, Definition, Loaded, Settings, ShippedFile


class Wrapped:
    """Passes everything on to `inner`."""

    def __init__(self, inner: Definition) -> None:
        self.inner = inner
        self.input_names: Sequence[str] = inner.input_names
        self.output_names: Sequence[str] = inner.output_names
        self.axes: Mapping[str, Mapping[int, Axis]] = inner.axes

    def load(self, dataset: str, folder: str, *, seed: int, settings: Settings) -> Loaded:
        """As the inner recipe."""
        return self.inner.load(dataset, folder, seed=seed, settings=settings)

    def build(self, settings: Settings, loaded: Loaded) -> nn.Module:
        """As the inner recipe."""
        return self.inner.build(settings, loaded)

    def augment(self, inputs: tuple[Tensor, ...], settings: Settings, generator: Generator) -> tuple[Tensor, ...]:
        """As the inner recipe."""
        return self.inner.augment(inputs, settings, generator)

    def loss(self, outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
        """As the inner recipe."""
        return self.inner.loss(outputs, targets, settings)

    def serving(self, model: nn.Module) -> nn.Module:
        """As the inner recipe."""
        return self.inner.serving(model)

    def files(self, loaded: Loaded) -> Sequence[ShippedFile]:
        """As the inner recipe."""
        return self.inner.files(loaded)

    def describe(self, loaded: Loaded) -> Mapping[str, str]:
        """As the inner recipe."""
        return self.inner.describe(loaded)
