"""Classifiers of images: the recipes "cnn" and "mlp"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

from mlmesh_training.trainer import cleaning, data, networks, registered, sources
from mlmesh_training.trainer.definition import Classification, Loaded, Part, Settings
from mlmesh_training.trainer.reporter import PermanentError

SIDE_MIN, SIDE_MAX = 8, 512

Network = Callable[[Settings, Sequence[int], int], nn.Module]


class ImageClassifier(Classification):
    """Fits a network to images of one size.

    The model takes `image`, raw values, FP32 [batch, channels, height, width].
    """

    input_names: Sequence[str] = ("image",)

    def __init__(self, network: Network) -> None:
        self._network = network

    def load(self, dataset: str, folder: str, *, seed: int, settings: Settings) -> Loaded:  # noqa: ARG002
        """Read, clean and split. Errors: PermanentError."""
        read = sources.images(dataset) if dataset else registered.images(Path(folder))
        side = read.pixels.shape[2:]
        if min(side) < SIDE_MIN or max(side) > SIDE_MAX:
            raise PermanentError(f"images have {side[0]}x{side[1]} pixels; expected {SIDE_MIN} to {SIDE_MAX} each way")
        found, counts = cleaning.images(read)
        split = data.split(found.classes, seed=seed)
        train = _part(found, split.train)
        pixels = train.inputs[0]
        statistics = {
            "kind": "image",
            "shape": list(pixels.shape[1:]),
            "mean": float(pixels.mean()),
            "std": float(pixels.std()),
            "minimum": float(pixels.min()),
            "maximum": float(pixels.max()),
            "value_max": found.value_max or float(pixels.max()),
            "cleaning": dict(counts),
            "split": split.sizes(),
        }
        return Loaded(
            train=train,
            validation=_part(found, split.validation),
            test=_part(found, split.test),
            labels=found.labels,
            fingerprint=data.fingerprint(read.pixels, read.classes),
            statistics=statistics,
        )

    def build(self, settings: Settings, loaded: Loaded) -> nn.Module:
        """The network behind its normalisation."""
        known = loaded.statistics
        network = self._network(settings, known["shape"], len(loaded.labels))
        return networks.Classifier(network, mean=known["mean"], std=known["std"])

    def augment(self, inputs: tuple[Tensor, ...], settings: Settings, generator: Generator) -> tuple[Tensor, ...]:
        """Moved by up to `shift` pixels each way, filled with 0."""
        most = int(settings["shift"])
        return (shifted(inputs[0], most, generator),) if most else inputs

    def describe(self, loaded: Loaded) -> Mapping[str, str]:
        """Layout and range of the input."""
        return {"input_layout": "NCHW", "input_range": f"0..{loaded.statistics['value_max']:g}"}


def shifted(images: Tensor, most: int, generator: Generator) -> Tensor:
    """A batch moved by up to `most` pixels each way, filled with 0."""
    down, right = (int(moved) for moved in torch.randint(0, 2 * most + 1, (2,), generator=generator))
    height, width = images.shape[2:]
    padded = nn.functional.pad(images, (most, most, most, most))
    return padded[:, :, down : down + height, right : right + width]


def _part(found: data.Images, rows: data.Classes) -> Part:
    pixels = np.ascontiguousarray(found.pixels[rows], dtype=np.float32)
    return Part(inputs=(torch.from_numpy(pixels),), targets=torch.from_numpy(found.classes[rows]))


cnn = ImageClassifier(networks.convolutional)
mlp = ImageClassifier(networks.connected)
