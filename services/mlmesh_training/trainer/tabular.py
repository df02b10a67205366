"""What is known of the columns of a table: found out on the training part, shipped with the model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlmesh_training.trainer.cleaning import CATEGORIES_MAX, Column

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One column that the model takes. Numbers have mean and standard deviation; categories have their names.

    `missing`: values that the training part lacks.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0
    minimum: float = 0.0
    maximum: float = 0.0
    categories: tuple[str, ...] = ()
    missing: int = 0

    def document(self) -> dict[str, Any]:
        """As plain JSON values."""
        kind = {"name": self.name, "kind": "category" if self.categories else "number", "missing": self.missing}
        if self.categories:
            return {**kind, "categories": list(self.categories)}
        return {**kind, **{n: getattr(self, n) for n in ("mean", "std", "minimum", "maximum")}}

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Feature:
        """From its document."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in document.items() if name in names}
        return cls(**{**values, "categories": tuple(document.get("categories", ()))})


def features(columns: Sequence[Column], train: Rows) -> tuple[tuple[Feature, ...], dict[str, list[str]]]:
    """What is known of each column that is any good, and the names of those left out, by why."""
    kept: list[Feature] = []
    left: dict[str, list[str]] = {"columns_constant": [], "columns_free_text": []}
    for column in columns:
        feature = _number(column, train) if column.numbers is not None else _category(column, train)
        if isinstance(feature, str):
            left[feature].append(column.name)
        else:
            kept.append(feature)
    return tuple(kept), left


def matrix(columns: Sequence[Column], known: Sequence[Feature]) -> npt.NDArray[np.float32]:
    """The columns as the model takes them, FP32 [rows, features]: a category is its index, what is missing is NaN."""
    by_name = {column.name: column for column in columns}
    parts = []
    for feature in known:
        column = by_name[feature.name]
        if column.numbers is not None:
            parts.append(column.numbers)
        else:
            index = {name: float(number) for number, name in enumerate(feature.categories)}
            parts.append(np.array([math.nan if text is None else index.get(text, math.nan) for text in column.texts]))
    return np.stack(parts, axis=1).astype(np.float32)


def _number(column: Column, train: Rows) -> Feature | str:
    values = column.numbers[train] if column.numbers is not None else np.empty(0)
    present = values[~np.isnan(values)]
    std = float(present.std()) if len(present) else 0.0
    # Also what differs by rounding alone: divided by next to nothing it would be noise.
    if std <= 1e-6 * max(1e-6, float(np.abs(present).max(initial=0.0))):
        return "columns_constant"
    return Feature(
        name=column.name,
        mean=float(present.mean()),
        std=std,
        minimum=float(present.min()),
        maximum=float(present.max()),
        missing=len(values) - len(present),
    )


def _category(column: Column, train: Rows) -> Feature | str:
    texts = [column.texts[row] for row in train]
    names = sorted({text for text in texts if text is not None})
    if len(names) > CATEGORIES_MAX:
        return "columns_free_text"
    if len(names) < 2:
        return "columns_constant"
    return Feature(name=column.name, categories=tuple(names), missing=sum(text is None for text in texts))
