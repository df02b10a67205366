"""A distribution of somebody else that brings a recipe: built as a wheel and installed into a folder of the test."""

from __future__ import annotations

from pathlib import Path

from tests.support import wheel

_PROJECT = """
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "acme-recipes"
version = "1.2"

[project.entry-points."mlmesh.recipes"]
threshold = "acme_recipes:threshold"
cnn = "acme_recipes:threshold"
broken = "acme_recipes.nowhere:recipe"
"""
_RECIPE = '''
"""What the service reads: light."""

from mlmesh_training.datasets import DatasetKind
from mlmesh_training.recipes import Hyperparameter, Recipe, Task, fitting

threshold = Recipe(
    name="threshold",
    description="Logistic regression on the rows of iris.",
    task=Task.CLASSIFICATION,
    dataset_kind=DatasetKind.TABULAR,
    datasets=("petals",),
    hyperparameters=(
        *fitting(epochs=3, learning_rate=0.1, batch_size=16),
        Hyperparameter(name="columns", description="Columns seen.", default=4, low=1, high=4, integer=True),
    ),
    definition="acme_recipes.training:definition",
)
'''
_TRAINING = '''
"""What a training process loads, and nobody else. What it prints becomes lines of the job's log."""

import os

import torch
from torch import nn

from mlmesh_training.trainer.definition import Classification, Loaded, Part, ShippedFile

print(f"acme loaded in {os.getpid()}")


class Threshold(Classification):
    input_names = ("row",)

    def load(self, dataset, folder, *, seed, settings):
        from sklearn.datasets import load_iris

        rows, classes = load_iris(return_X_y=True)
        order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
        inputs = torch.tensor(rows, dtype=torch.float32)[order][:, -int(settings["columns"]):]
        targets = torch.tensor(classes, dtype=torch.int64)[order]

        def part(start, end):
            return Part(inputs=(inputs[start:end],), targets=targets[start:end])

        return Loaded(
            train=part(0, 100), validation=part(100, 120), test=part(120, 150),
            labels=("setosa", "versicolor", "virginica"), fingerprint="5e" * 32, statistics={"note": "acme"},
        )

    def build(self, settings, loaded):
        return nn.Linear(int(settings["columns"]), 3)

    def files(self, loaded):
        return [ShippedFile(path="acme/notice.txt", data=b"made by Acme", media_type="text/plain")]

    def describe(self, loaded):
        return {"input_layout": "NC", "made_by": "acme"}


definition = Threshold()
'''


def installed(folder: Path) -> Path:
    """Build it and install it; the folder to put on PYTHONPATH."""
    source = folder / "acme"
    (source / "acme_recipes").mkdir(parents=True)
    (source / "pyproject.toml").write_text(_PROJECT)
    (source / "acme_recipes" / "__init__.py").write_text(_RECIPE)
    (source / "acme_recipes" / "training.py").write_text(_TRAINING)
    uv = wheel.uv()
    wheel.run(uv, "build", "--quiet", "--wheel", "--out-dir", folder / "wheels", source)
    (built,) = (folder / "wheels").glob("*.whl")
    target = folder / "site"
    wheel.run(uv, "pip", "install", "--quiet", "--no-deps", "--target", target, built)
    return target
