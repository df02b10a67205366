"""Splitting, and what was read of a data set before it is split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlmesh_training.trainer.reporter import PermanentError

TEST_SHARE = 0.2
VALIDATION_SHARE = 0.08
EXAMPLES_MIN = 20
BINS_MAX = 10
"""Bins of a number by which a regression is stratified."""

Numbers = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Images and their classes.

    Attributes:
        pixels: uint8 or float32 [examples, channels, height, width], raw values as the data set has them.
        classes: int64 [examples], index of the true label.
        labels: names of the classes.
        value_max: greatest value that a pixel may have; 0 where nothing is known.
    """

    pixels: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    classes: Classes
    labels: tuple[str, ...]
    value_max: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows as they were read. `cells`: a column of texts each, in the order of `names`; `target`: as the rows."""

    names: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    target: tuple[str, ...]
    target_name: str = "target"
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Texts and the name of the class of each."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Indexes of examples, int64, disjoint and together all of them. Test data is measured once, at the end."""

    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]

    def sizes(self) -> dict[str, int]:
        """Examples of each part."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


def split(classes: Classes, *, seed: int) -> Split:
    """Split so that each part has every class in the same share (stratified), at random by the seed.

    Of a class with less than three examples all are fitted. Errors: PermanentError when there are too few examples.
    """
    if len(classes) < EXAMPLES_MIN:
        raise PermanentError(f"the data set has {len(classes)} usable examples, at least {EXAMPLES_MIN} are needed")
    random = np.random.default_rng(seed)
    parts: tuple[list[npt.NDArray[np.int64]], ...] = ([], [], [])
    for label in np.unique(classes):
        shuffled = random.permutation(np.flatnonzero(classes == label)).astype(np.int64)
        test = round(len(shuffled) * TEST_SHARE)
        held = test + round(len(shuffled) * VALIDATION_SHARE)
        for part, chosen in zip(parts, (shuffled[held:], shuffled[test:held], shuffled[:test]), strict=True):
            part.append(chosen)
    train, validation, test_part = (np.sort(np.concatenate(part)) for part in parts)
    if not len(validation):
        # So few of each class that rounding left none: some test examples serve.
        validation, test_part = test_part[::3], np.delete(test_part, np.s_[::3])
    if not len(test_part) or not len(validation):
        raise PermanentError("the data set has too few examples of a class to hold some back for validation and test")
    return Split(train=train, validation=validation, test=test_part)


def bins(values: Numbers) -> Classes:
    """The quantile bin of each number, int64: by these a regression is split as a classification is by its classes."""
    count = max(1, min(BINS_MAX, len(values) // 10))
    edges = np.unique(np.quantile(values, np.linspace(0, 1, count + 1)[1:-1]))
    return np.digitize(values, edges).astype(np.int64)


def fingerprint(*arrays: npt.NDArray[np.generic]) -> str:
    """SHA-256 over shapes, types and bytes, hex."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}{array.dtype.str};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def text_fingerprint(*columns: Iterable[str]) -> str:
    """SHA-256 over texts with their lengths, column by column, hex."""
    digest = hashlib.sha256()
    for column in columns:
        for text in column:
            raw = text.encode()
            digest.update(b"%d:" % len(raw))
            digest.update(raw)
        digest.update(b";")
    return digest.hexdigest()
