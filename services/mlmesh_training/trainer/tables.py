"""Models of tables: the recipes "tabular" (classes) and "regression" (a number)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mlmesh_training.trainer import cleaning, data, networks, registered, sources, tabular
from mlmesh_training.trainer.definition import Classification, Loaded, Part, Regression, Settings
from mlmesh_training.trainer.reporter import PermanentError


def _features(loaded: Loaded) -> list[tabular.Feature]:
    return [tabular.Feature.read(document) for document in loaded.statistics["columns"]]


def _read(dataset: str, folder: str) -> data.Table:
    return sources.table(dataset) if dataset else registered.table(Path(folder))


def _describe(loaded: Loaded) -> Mapping[str, str]:
    names = ",".join(column["name"] for column in loaded.statistics["columns"])
    # Labels are short; statistics.json has all of it.
    return {"input_layout": "NC", "columns": names if len(names) <= 4096 else f"{names[:4090]}…"}


class TableClassifier(Classification):
    """Fits a fully connected network to rows. The model takes `features`, FP32 [batch, columns]."""

    input_names: Sequence[str] = ("features",)

    def load(self, dataset: str, folder: str, *, seed: int, settings: Settings) -> Loaded:  # noqa: ARG002
        """Read, clean and split. Errors: PermanentError."""
        table = _read(dataset, folder)
        rows, counts = cleaning.table(table, regression=False)
        classes, labels = cleaning.encoded(rows.classes, table.labels)
        split = data.split(classes, seed=seed)
        values, statistics = _measured(table, rows, split, counts)
        return Loaded(
            train=_part(values, classes, split.train),
            validation=_part(values, classes, split.validation),
            test=_part(values, classes, split.test),
            labels=labels,
            fingerprint=_fingerprint(table),
            statistics=statistics,
        )

    def build(self, settings: Settings, loaded: Loaded) -> nn.Module:
        """The network behind its normalisation."""
        return networks.TableNetwork(_features(loaded), settings, outputs=len(loaded.labels))

    def describe(self, loaded: Loaded) -> Mapping[str, str]:
        """Order of the columns."""
        return _describe(loaded)


class TableRegressor(Regression):
    """Fits a fully connected network to rows and a number. The model takes `features`, FP32 [batch, columns]."""

    input_names: Sequence[str] = ("features",)

    def load(self, dataset: str, folder: str, *, seed: int, settings: Settings) -> Loaded:  # noqa: ARG002
        """Read, clean and split by quantiles of the target. Errors: PermanentError."""
        table = _read(dataset, folder)
        rows, counts = cleaning.table(table, regression=True)
        split = data.split(data.bins(rows.target), seed=seed)
        values, statistics = _measured(table, rows, split, counts)
        fitted = rows.target[split.train]
        mean, std = float(fitted.mean()), float(fitted.std())
        if not std > 0.0:
            raise PermanentError(f"target {table.target_name!r} is the same in every row")
        statistics["target"] |= {
            "mean": mean,
            "std": std,
            "minimum": float(fitted.min()),
            "maximum": float(fitted.max()),
        }
        targets = ((rows.target - mean) / std).astype(np.float32)
        return Loaded(
            train=_part(values, targets, split.train),
            validation=_part(values, targets, split.validation),
            test=_part(values, targets, split.test),
            fingerprint=_fingerprint(table),
            statistics=statistics,
            target_mean=mean,
            target_std=std,
        )

    def build(self, settings: Settings, loaded: Loaded) -> nn.Module:
        """The network behind its normalisation; its values are normalised as the targets are."""
        target = (loaded.target_mean, loaded.target_std)
        return networks.TableNetwork(_features(loaded), settings, outputs=0, target=target)

    def describe(self, loaded: Loaded) -> Mapping[str, str]:
        """Order of the columns, and what the value is."""
        return {**_describe(loaded), "target": str(loaded.statistics["target"]["name"])}


def _measured(
    table: data.Table, rows: cleaning.Rows, split: data.Split, counts: dict[str, int]
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """Values as the model takes them, and what was found out of the columns on the training part."""
    known, left = tabular.features(rows.columns, split.train)
    if not known:
        raise PermanentError("no column tells one row from another: all are constant or free text")
    told = {
        **{name: count for name, count in counts.items() if name != "kept"},
        "cells_missing": sum(feature.missing for feature in known),
        **{reason: len(names) for reason, names in left.items()},
        "kept": counts["kept"],
    }
    statistics: dict[str, Any] = {
        "kind": "tabular",
        "columns": [feature.document() for feature in known],
        "columns_left_out": left,
        "target": {"name": table.target_name},
        "cleaning": told,
        "split": split.sizes(),
    }
    return tabular.matrix(rows.columns, known), statistics


def _part(values: npt.NDArray[np.float32], targets: npt.NDArray[Any], rows: data.Classes) -> Part:
    return Part(inputs=(torch.from_numpy(values[rows]),), targets=torch.from_numpy(targets[rows]))


def _fingerprint(table: data.Table) -> str:
    return data.text_fingerprint(table.names, *table.cells, table.target)


classifier = TableClassifier()
regressor = TableRegressor()
