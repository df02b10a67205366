"""Cleaning: what is taken out of a data set before it is split, with a count of everything.

What needs statistics (means, constant columns, categories) is decided on the training part alone, in `columns`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlmesh_training.trainer.data import Classes, Images, Numbers, Table, Texts
from mlmesh_training.trainer.reporter import PermanentError

CATEGORIES_MAX = 64
CLASSES_MAX = 1000
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
Counts = Mapping[str, int]
_WORDS = {
    "read": "read",
    "duplicates": "duplicates removed",
    "contradictory": "removed that occur with several labels",
    "target_missing": "removed without a target",
    "not_finite": "removed with values that are not finite",
    "empty": "empty ones removed",
    "rows_without_values": "removed without any value",
    "cells_missing": "missing values filled in",
    "cells_not_finite": "infinite values taken as missing",
    "columns_constant": "constant columns left out",
    "columns_free_text": "columns of free text left out",
    "kept": "kept",
}


def describe(counts: Mapping[str, Any]) -> str:
    """The counts as a line for the log."""
    said = [
        f"{count:,} {_WORDS.get(name, name.replace('_', ' '))}"
        for name, count in counts.items()
        if isinstance(count, int) and (count or name in {"read", "kept"})
    ]
    return f"data: {', '.join(said)}"


def images(found: Images) -> tuple[Images, Counts]:
    """Without images that are not finite, repeat another of the same class, or occur in several classes."""
    flat = found.pixels.reshape(len(found.pixels), -1)
    finite = np.isfinite(flat).all(axis=1).reshape(-1)
    keys = [row.tobytes() for row in flat]
    keep, counts = _distinct(keys, found.classes.tolist(), usable=finite)
    counts = {"read": len(flat), "not_finite": int((~finite).sum()), **counts, "kept": int(keep.sum())}
    kept = Images(
        pixels=found.pixels[keep], classes=found.classes[keep], labels=found.labels, value_max=found.value_max
    )
    return kept, counts


def texts(found: Texts) -> tuple[Texts, Counts]:
    """With white space made single; without empty ones, repetitions (in any case) and contradictions."""
    shaped = [" ".join(text.split()) for text in found.texts]
    labels = [label.strip() for label in found.labels]
    filled = np.array([bool(text) for text in shaped], dtype=bool)
    labelled = np.array([bool(label) for label in labels], dtype=bool)
    keep, counts = _distinct([text.casefold() for text in shaped], labels, usable=filled & labelled)
    counts = {
        "read": len(shaped),
        "empty": int((~filled).sum()),
        "target_missing": int((filled & ~labelled).sum()),
        **counts,
        "kept": int(keep.sum()),
    }
    chosen = np.flatnonzero(keep)
    return Texts(texts=tuple(shaped[i] for i in chosen), labels=tuple(labels[i] for i in chosen)), counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column as numbers, NaN where a value is missing; or as texts, None where one is."""

    name: str
    numbers: Numbers | None = None
    texts: tuple[str | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A table without what cannot be fitted. `target`: float64 [rows] for regression, else empty; `classes`: names."""

    columns: tuple[Column, ...]
    target: Numbers
    classes: tuple[str, ...]


def table(found: Table, *, regression: bool) -> tuple[Rows, dict[str, int]]:
    """Without repeated rows, rows without a target, and rows without any value; typed column by column.

    Errors: PermanentError when the target of a regression is no number.
    """
    present = np.array([not _missing(text) for text in found.target], dtype=bool)
    numbers = np.full(len(found.target), math.nan)
    if regression:
        for row in np.flatnonzero(present):
            numbers[row] = _number(found.target[row], f"target {found.target_name!r}, row {row + 1}")
        present &= np.isfinite(numbers)
    empty = np.array([all(map(_missing, row)) for row in zip(*found.cells, strict=True)], dtype=bool)
    usable = present & ~empty
    keys = ["\x1f".join((*row, target)) for *row, target in zip(*found.cells, found.target, strict=True)]
    keep, counts = _distinct(keys, keys, usable=usable)
    chosen = np.flatnonzero(keep)
    columns, infinite = [], 0
    for name, cells in zip(found.names, found.cells, strict=True):
        column, not_finite = _column(name, [cells[i] for i in chosen])
        columns.append(column)
        infinite += not_finite
    told = {
        "read": len(found.target),
        "target_missing": int((~present).sum()),
        "rows_without_values": int((present & empty).sum()),
        "duplicates": counts["duplicates"],
        "cells_not_finite": infinite,
        "kept": len(chosen),
    }
    classes = () if regression else tuple(found.target[i].strip() for i in chosen)
    return Rows(columns=tuple(columns), target=numbers[chosen] if regression else np.empty(0), classes=classes), told


def encoded(names: Sequence[str], labels: Sequence[str] = ()) -> tuple[Classes, tuple[str, ...]]:
    """Class indexes, int64, and the labels in order: as given, else sorted, numbers by their value.

    Errors: PermanentError when there are too few or too many, or one that is not among those given.
    """
    present = set(names)
    if not labels:
        labels = sorted(present, key=_sort_key)
    elif unknown := present - set(labels):
        raise PermanentError(f"target {sorted(unknown)[0]!r} is none of the classes {', '.join(labels)}")
    if not 2 <= len(labels) <= CLASSES_MAX:
        raise PermanentError(f"the target has {len(labels)} different values; expected 2 to {CLASSES_MAX} classes")
    index = {label: number for number, label in enumerate(labels)}
    return np.array([index[name] for name in names], dtype=np.int64), tuple(labels)


def _distinct(
    keys: Sequence[Any], labels: Sequence[Any], *, usable: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], dict[str, int]]:
    """Which examples to keep: the first of each key, none of a key that occurs with several labels."""
    seen: dict[Any, Any] = {}
    several = set()
    for key, label, good in zip(keys, labels, usable, strict=True):
        if good and seen.setdefault(key, label) != label:
            several.add(key)
    keep = np.zeros(len(keys), dtype=bool)
    met: set[Any] = set()
    contradictory = 0
    for row, (key, good) in enumerate(zip(keys, usable, strict=True)):
        if not good:
            continue
        if key in several:
            contradictory += 1
        elif key not in met:
            met.add(key)
            keep[row] = True
    return keep, {
        "duplicates": int(usable.sum()) - contradictory - int(keep.sum()),
        "contradictory": contradictory,
    }


def _column(name: str, cells: Sequence[str]) -> tuple[Column, int]:
    """A column by its type, and how many of its values were infinite."""
    numbers = np.full(len(cells), math.nan)
    try:
        for row, cell in enumerate(cells):
            if not _missing(cell):
                numbers[row] = float(cell)
    except ValueError:
        return Column(name=name, texts=tuple(None if _missing(cell) else cell.strip() for cell in cells)), 0
    infinite = np.isinf(numbers)
    # Beyond FP32, in which models count, is as good as infinite.
    infinite |= np.abs(numbers) > float(np.finfo(np.float32).max)
    numbers[infinite] = math.nan
    return Column(name=name, numbers=numbers), int(infinite.sum())


def _missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PermanentError(f"{where}: expected a number, got {text[:40]!r}") from None


def _sort_key(label: str) -> tuple[int, float, str]:
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)
