"""Optimisation of a version that was trained before: what it starts from, and whether what came of it is good enough.

The held-out examples are those of the source's training, so that before and after are measured on the same ones, which
neither has seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlmesh_training import export
from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.jobs import Evaluation, OptimizationResult
from mlmesh_training.options import Distillation, MixedPrecision, Optimization, Pruning, Quantization, Strategy
from mlmesh_training.ports import SOURCE_FOLDER
from mlmesh_training.trainer import quantizing
from mlmesh_training.trainer.definition import Definition, Loaded, Part
from mlmesh_training.trainer.distilling import Distilled
from mlmesh_training.trainer.pruning import LEARNING_RATE_SHARE, Pruned
from mlmesh_training.trainer.reporter import PermanentError

TRAINING_FILE = "training.json"
OPTIMIZATION_FILE = "optimization.json"
BATCHES_CHECKED = (1, 3, 64)
EVALUATION_BATCH = 256


def adapted(task: TrainingTask, folder: Path) -> TrainingTask:
    """The task with what it takes from its source: the split, and for pruning the network and how it was fitted.

    Errors: PermanentError when the source was trained on another data set, or is another network than is asked for.
    """
    if task.optimization is None:
        return task
    technique = task.optimization.technique
    source = _training(folder)
    if source is None:
        if isinstance(technique, Pruning):
            raise PermanentError(
                f"{task.optimization.source} was not trained here (it has no {TRAINING_FILE}), so it cannot be pruned"
            )
        return task
    asked, made = _dataset(task.dataset, task.dataset_version), _dataset(source["dataset"], source["dataset_version"])
    if asked != made:
        raise PermanentError(f"{task.optimization.source} was trained on {made}, not on {asked}")
    if not isinstance(technique, Distillation) and source["recipe"] != task.recipe:
        raise PermanentError(
            f"{task.optimization.source} was trained by recipe {source['recipe']!r}, not {task.recipe!r}"
        )
    if isinstance(technique, Pruning):
        if task.distribution.processes > 1 and task.distribution.strategy is Strategy.FSDP2:
            raise PermanentError("pruned weights cannot be sharded (FSDP2); use DDP")
        values: dict[str, float] = {**task.hyperparameters, **source["hyperparameters"], "epochs": technique.epochs}
        if "learning_rate" in values:
            values["learning_rate"] *= LEARNING_RATE_SHARE
        task = replace(task, hyperparameters=values)
    return replace(task, seed=int(source["seed"]))


def wrapped(definition: Definition, task: TrainingTask, folder: Path) -> Definition:
    """The recipe as the optimisation fits it. Errors: PermanentError."""
    technique = task.optimization.technique if task.optimization else None
    if isinstance(technique, Pruning):
        return Pruned(definition, technique, folder / SOURCE_FOLDER)
    if isinstance(technique, Distillation):
        return Distilled(definition, technique, model_of(folder), threads=task.threads)
    return definition


def fits(optimization: Optimization) -> bool:
    """Whether there is something to fit."""
    return isinstance(optimization.technique, Pruning | Distillation)


def model_of(folder: Path) -> Path:
    """The source's ONNX file. Errors: PermanentError."""
    found = sorted((folder / SOURCE_FOLDER).rglob("*.onnx"))
    if len(found) != 1:
        raise PermanentError(f"the source has {len(found)} ONNX files; expected one")
    return found[0]


def converted(optimization: Optimization, source: bytes, definition: Definition, loaded: Loaded) -> bytes:
    """The source's model in fewer bits, checked to answer batches of several sizes. Errors: PermanentError."""
    technique = optimization.technique
    if isinstance(technique, Quantization):
        data = quantizing.int8(source, technique, loaded.train.inputs, input_names=definition.input_names)
    elif isinstance(technique, MixedPrecision):
        data = quantizing.half(source, technique)
    else:
        raise TypeError(f"{technique} is fitted, not converted")
    try:
        run = export.session(data)
        for size in BATCHES_CHECKED:
            rows = np.arange(size) % len(loaded.test)
            answers = run([each.numpy()[rows] for each in loaded.test.inputs])
            if any(len(each) != size or not np.isfinite(each).all() for each in answers):
                raise PermanentError(f"the {name(optimization)} model gives values that are not finite")
    except PermanentError:
        raise
    except Exception as error:  # ONNX Runtime has exceptions of its own for every way to fail
        raise PermanentError(f"the {name(optimization)} model does not run: {error}") from error
    return data


def answers(onnx: bytes, part: Part) -> npt.NDArray[np.float32]:
    """The first output of an ONNX model to all examples of a part."""
    run = export.session(onnx)
    found = [
        run([each[start : start + EVALUATION_BATCH].numpy() for each in part.inputs])[0]
        for start in range(0, len(part), EVALUATION_BATCH)
    ]
    return np.concatenate(found).astype(np.float32)


def compared(
    optimization: Optimization,
    before: Evaluation,
    after: Evaluation,
    *,
    size_bytes_before: int,
    size_bytes_after: int,
    sparsity: float = 0.0,
) -> OptimizationResult:
    """What was won and lost. Whether it is too much is `check`'s to say."""
    return OptimizationResult(
        source=optimization.source,
        technique=name(optimization),
        before=before,
        after=after,
        size_bytes_before=size_bytes_before,
        size_bytes_after=size_bytes_after,
        sparsity=sparsity,
        quality_drop=quality_drop(before, after),
        quality_drop_max=optimization.quality_drop_max,
    )


def check(result: OptimizationResult) -> None:
    """Refuse a result that lost more than was allowed. Errors: PermanentError, with the figures."""
    if result.quality_drop <= result.quality_drop_max + 1e-12:
        return
    if result.before.regression and result.after.regression:
        figures = [each.regression.root_mean_squared_error for each in (result.before, result.after) if each.regression]
        text = f"the error grew by {result.quality_drop:.2%}, from {figures[0]:.4g} to {figures[1]:.4g}"
    else:
        text = (
            f"accuracy fell by {result.quality_drop:.4f}, from {result.before.accuracy:.4f} "
            f"to {result.after.accuracy:.4f}"
        )
    raise PermanentError(
        f"the {result.technique} model is not good enough: {text}; at most {result.quality_drop_max:g} is allowed"
    )


def quality_drop(before: Evaluation, after: Evaluation) -> float:
    """Loss of accuracy, 0 to 1; of a regressor the growth of the root mean squared error, relative to before."""
    if before.regression and after.regression:
        was, became = before.regression.root_mean_squared_error, after.regression.root_mean_squared_error
        return (became - was) / was if was else float(became > 0)
    return before.accuracy - after.accuracy


def name(optimization: Optimization) -> str:
    """The technique's name in results and labels."""
    match optimization.technique:
        case Quantization():
            return "int8"
        case MixedPrecision(precision=precision):
            return str(precision).lower()
        case Pruning(two_four=True):
            return "2:4"
        case Pruning():
            return "pruned"
        case Distillation():
            return "distilled"


def _training(folder: Path) -> Mapping[str, Any] | None:
    """How the source was trained, None when it does not say. Errors: PermanentError."""
    path = folder / SOURCE_FOLDER / TRAINING_FILE
    try:
        found = json.loads(path.read_bytes())
        document = {key: found[key] for key in ("recipe", "dataset", "dataset_version", "hyperparameters", "seed")}
        document["hyperparameters"] = {str(key): float(value) for key, value in document["hyperparameters"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PermanentError(f"the source's {TRAINING_FILE} cannot be read: {error!r}") from error
    return document


def _dataset(named: str, version: str) -> str:
    return named or version or "an unnamed data set"
