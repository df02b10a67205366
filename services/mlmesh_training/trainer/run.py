"""One training from its task to its result: load, fit, evaluate, export, each step reported."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from mlmesh_training import documents, evaluate, export
from mlmesh_training.backends.base import RESULT_FILE, TASK_FILE, TrainingTask
from mlmesh_training.jobs import JobPhase, LogLine, TrainedModel
from mlmesh_training.recipes import DATASETS
from mlmesh_training.trainer import checkpoint, data, lineage
from mlmesh_training.trainer.fit import Fit
from mlmesh_training.trainer.reporter import PermanentError, Reporter

EVALUATION_FILE = "evaluation.json"
LABELS_FILE = "labels.txt"
MODEL_FILE = "model.onnx"


def preload() -> None:
    """Load all that a training needs, before there is one."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    export.rehearse()


def train(folder: Path, reporter: Reporter, *, threads: int) -> None:
    """Train the task in the folder, from its last whole checkpoint, and leave result.json.

    Errors: PermanentError when trying again would not help, OSError for the disk.
    """
    checkpoint.sweep(folder)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    torch.use_deterministic_algorithms(True)
    task = read_task(folder)
    loaded = data.load(task.dataset)
    split = data.split(loaded.classes, seed=task.seed)

    fit = resumed(folder, task, loaded, split, reporter)
    # Optimizers import what the exporter needs first; the rest may come in while the fitting computes.
    preload = threading.Thread(target=export.preload, name="preload", daemon=True)
    preload.start()
    reporter.send(JobPhase.TRAINING)
    fit.run(folder, reporter)

    reporter.send(JobPhase.EVALUATING)
    test = torch.from_numpy(loaded.images[split.test]).float()
    logits = fit.logits(test)
    evaluation = evaluate.evaluate(logits, loaded.classes[split.test], loaded.labels)
    reporter.send(evaluation)

    reporter.send(JobPhase.EXPORTING)
    preload.join()
    started = time.monotonic()
    try:
        exported = export.export(fit.model, test.numpy(), logits, folder / MODEL_FILE)
    except export.ExportError as error:
        raise PermanentError(f"the exported model does not hold up: {error}") from error
    evaluation = replace(evaluation, export_max_abs_diff=exported.max_abs_diff)
    reporter.send(
        LogLine(
            severity="info",
            message=f"exported to ONNX in {time.monotonic() - started:.1f} s, "
            f"largest difference to the trained model {exported.max_abs_diff:.1e}",
        )
    )
    text = json.dumps(documents.evaluation_document(evaluation), indent=2).encode()
    model = TrainedModel(
        files=(
            exported.file,
            export.write_file(folder / EVALUATION_FILE, text, media_type="application/json"),
            export.write_file(folder / LABELS_FILE, "\n".join(loaded.labels).encode(), media_type="text/plain"),
        ),
        inputs=exported.inputs,
        outputs=exported.outputs,
        evaluation=evaluation,
        labels=describe(task, loaded, examples=len(split.train)),
        dataset_fingerprint=loaded.fingerprint,
        code_digest=lineage.code_digest(),
        environment_digest=lineage.environment_digest(),
    )
    export.write_file(folder / RESULT_FILE, documents.dumps(documents.model_document(model)).encode())


def read_task(folder: Path) -> TrainingTask:
    """The task that the service left in the folder."""
    document = json.loads((folder / TASK_FILE).read_bytes())
    return documents.read_task({"uid": folder.name, **document})


def resumed(folder: Path, task: TrainingTask, loaded: data.Data, split: data.Split, reporter: Reporter) -> Fit:
    """A fit as the newest usable checkpoint left it, or a new one. What cannot be used is told and passed over."""
    for candidate in checkpoint.stored(folder):
        state = checkpoint.load(candidate)
        if state is None:
            reporter.send(LogLine(severity="warning", message=f"{candidate.path.name} is torn or changed; passed over"))
            continue
        fit = Fit(task, loaded, split)
        try:
            fit.restore(state)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            reporter.send(LogLine(severity="warning", message=f"{candidate.path.name} does not fit: {error}"))
            continue
        reporter.send(LogLine(severity="info", message=f"resumed after epoch {fit.epoch}"))
        return fit
    return Fit(task, loaded, split)


def describe(task: TrainingTask, loaded: data.Data, *, examples: int) -> dict[str, str]:
    """Labels of the version: how to feed the model, and how it was made."""
    known = DATASETS[task.dataset]
    return {
        "recipe": task.recipe,
        "dataset": task.dataset,
        "seed": str(task.seed),
        "classes": ",".join(loaded.labels),
        "input_layout": "NCHW",
        "input_range": f"0..{known.value_max}",
        "training_examples": str(examples),
        **{f"hyperparameters.{name}": f"{value:g}" for name, value in sorted(task.hyperparameters.items())},
    }
