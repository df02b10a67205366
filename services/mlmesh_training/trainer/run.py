"""One training from its task to its result: load, fit, evaluate, export, each step reported."""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mlmesh_training import documents, evaluate, export, latency, recipes
from mlmesh_training.backends.base import RESULT_FILE, TASK_FILE, TrainingTask
from mlmesh_training.jobs import Evaluation, File, JobPhase, Latency, LogLine, OptimizationResult, TrainedModel
from mlmesh_training.ports import DATASET_FOLDER
from mlmesh_training.trainer import checkpoint, cleaning, lineage, optimizing, plots, pruning, weights
from mlmesh_training.trainer.definition import Definition, Loaded, Part
from mlmesh_training.trainer.fitting.start import fitted
from mlmesh_training.trainer.history import Recorder
from mlmesh_training.trainer.reporter import PermanentError, Reporter

EVALUATION_FILE = "evaluation.json"
LABELS_FILE = "labels.txt"
MODEL_FILE = "model.onnx"
STATISTICS_FILE = "statistics.json"
TRAINING_FILE = "training.json"
EVALUATION_BATCH = 256
PARITY_EXAMPLES_MAX = 1024
PARITY_EXAMPLES_MAX_AXES = 128
"""Where further dimensions are dynamic, which multiplies the requests that are compared."""
LATENCY_BATCHES = (1, 8, 32)
LABELS_MAX = 64
LABEL_LENGTH_MAX = 4096

_SUFFIXES = {
    ".json": "application/json",
    ".png": "image/png",
    ".safetensors": weights.MEDIA_TYPE,
    ".txt": "text/plain",
}


def preload() -> None:
    """Load all that a training needs, before there is one."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    export.rehearse()


def train(folder: Path, reporter: Reporter, *, threads: int) -> None:
    """Train the task in the folder, from its last whole checkpoint, and leave result.json.

    Errors: PermanentError when trying again would not help, PauseRequested, OSError for the disk.
    """
    checkpoint.sweep(folder)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    torch.use_deterministic_algorithms(True)
    task = read_task(folder)
    definition, loaded = load(folder, task)
    if isinstance(counts := loaded.statistics.get("cleaning"), Mapping):
        reporter.send(LogLine(severity="info", message=cleaning.describe(counts)))
    if task.optimization and not optimizing.fits(task.optimization):
        result = _converted(folder, task, definition, loaded, reporter, threads=threads)
    else:
        result = _fitted(folder, task, definition, loaded, reporter, threads=threads)
    export.write_file(folder / RESULT_FILE, documents.dumps(documents.model_document(result)).encode())


def _fitted(
    folder: Path, task: TrainingTask, definition: Definition, loaded: Loaded, reporter: Reporter, *, threads: int
) -> TrainedModel:
    """Fit, evaluate, export."""
    # Optimizers import what the exporter needs first; the rest may come in while the fitting computes.
    preloading = _Preloading()
    recorder = Recorder(reporter, folder, on_figures=preloading.start)
    reporter.send(JobPhase.TRAINING)
    model = fitted(folder, task, definition, loaded, recorder, threads=threads)

    reporter.send(JobPhase.EVALUATING)
    serving = definition.serving(model).eval()
    answers = outputs(serving, loaded.test)
    evaluation = evaluated(loaded, answers)
    reporter.send(evaluation)

    reporter.send(JobPhase.EXPORTING)
    preloading.wait()
    exported = exported_model(folder, definition, loaded, serving, reporter)
    evaluation = replace(
        evaluation,
        export_max_abs_diff=exported.max_abs_diff,
        latency=latencies((folder / MODEL_FILE).read_bytes(), loaded.test, threads=threads),
    )
    pictures = plots.drawn(
        evaluation,
        recorder.epochs(),
        values=answers,
        targets=raw_targets(loaded, loaded.test),
        target_name=str(loaded.statistics.get("target", {}).get("name", "")),
    )
    # Baked by now, so what is stored is what was exported.
    stored = {weights.WEIGHTS_FILE: weights.packed(model)}
    return _result(
        folder,
        task,
        definition,
        loaded,
        evaluation=evaluation,
        exported=exported,
        files={**pictures, **stored},
        optimization=_compared(
            folder, task, loaded, evaluation, exported=exported, reporter=reporter, threads=threads, model=model
        ),
    )


def _converted(
    folder: Path, task: TrainingTask, definition: Definition, loaded: Loaded, reporter: Reporter, *, threads: int
) -> TrainedModel:
    """Make the source's model smaller, evaluate what came of it."""
    if task.optimization is None:
        raise TypeError("nothing to optimise")
    reporter.send(JobPhase.OPTIMIZING)
    source = optimizing.model_of(folder).read_bytes()
    data = optimizing.converted(task.optimization, source, definition, loaded)
    reporter.send(JobPhase.EVALUATING)
    before, answers = optimizing.answers(source, loaded.test), optimizing.answers(data, loaded.test)
    evaluation = replace(
        evaluated(loaded, answers),
        export_max_abs_diff=float(np.abs(answers - before).max()),
        latency=latencies(data, loaded.test, threads=threads),
    )
    reporter.send(evaluation)
    reporter.send(JobPhase.EXPORTING)
    try:
        inputs, made = export.check(data)
    except export.ExportError as error:
        raise PermanentError(f"the optimised model does not hold up: {error}") from error
    file = export.write_file(folder / MODEL_FILE, data, media_type=export.MEDIA_TYPE)
    exported = export.Exported(file=file, inputs=inputs, outputs=made, max_abs_diff=evaluation.export_max_abs_diff)
    pictures = plots.drawn(
        evaluation,
        (),
        values=answers,
        targets=raw_targets(loaded, loaded.test),
        target_name=str(loaded.statistics.get("target", {}).get("name", "")),
    )
    return _result(
        folder,
        task,
        definition,
        loaded,
        evaluation=evaluation,
        exported=exported,
        files=pictures,
        optimization=_compared(folder, task, loaded, evaluation, exported=exported, reporter=reporter, threads=threads),
    )


def _compared(
    folder: Path,
    task: TrainingTask,
    loaded: Loaded,
    evaluation: Evaluation,
    *,
    exported: export.Exported,
    reporter: Reporter,
    threads: int,
    model: nn.Module | None = None,
) -> OptimizationResult | None:
    """An optimised model against its source; told before it is judged. Errors: PermanentError when it lost too much."""
    if task.optimization is None:
        return None
    source = optimizing.model_of(folder).read_bytes()
    before = evaluated(loaded, optimizing.answers(source, loaded.test))
    result = optimizing.compared(
        task.optimization,
        replace(before, latency=latencies(source, loaded.test, threads=threads)),
        evaluation,
        size_bytes_before=len(source),
        size_bytes_after=exported.file.size_bytes,
        sparsity=pruning.sparsity(model) if model is not None else 0.0,
    )
    reporter.send(result)
    optimizing.check(result)
    return result


def _result(
    folder: Path,
    task: TrainingTask,
    definition: Definition,
    loaded: Loaded,
    *,
    evaluation: Evaluation,
    exported: export.Exported,
    files: Mapping[str, bytes],
    optimization: OptimizationResult | None,
) -> TrainedModel:
    """Write what is shipped beside the model; all that is left to publish."""
    metrics: dict[str, float] = {}
    if optimization is not None:
        files = {**files, optimizing.OPTIMIZATION_FILE: _json(documents.optimization_document(optimization))}
        metrics = {
            "quality_drop": optimization.quality_drop,
            "size_ratio": optimization.size_bytes_after / max(1, optimization.size_bytes_before),
            "sparsity": optimization.sparsity,
        }
    return TrainedModel(
        files=(exported.file, *shipped(folder, task, definition, loaded, evaluation=evaluation, made=files)),
        inputs=exported.inputs,
        outputs=exported.outputs,
        evaluation=evaluation,
        labels=describe(task, definition, loaded),
        dataset_fingerprint=loaded.fingerprint,
        code_digest=lineage.code_digest(type(getattr(definition, "inner", definition)).__module__),
        environment_digest=lineage.environment_digest(),
        optimization=optimization,
        metrics=metrics,
    )


def read_task(folder: Path) -> TrainingTask:
    """The task that the service left in the folder, with what an optimisation takes from its source.

    Errors: PermanentError.
    """
    document = json.loads((folder / TASK_FILE).read_bytes())
    return optimizing.adapted(documents.read_task({"uid": folder.name, **document}), folder)


def load(folder: Path, task: TrainingTask) -> tuple[Definition, Loaded]:
    """The task's recipe and its data, the same in every process that fits it. Errors: PermanentError."""
    definition = optimizing.wrapped(definition_of(task.recipe), task, folder)
    place = "" if task.dataset else str(folder / DATASET_FOLDER)
    loaded = definition.load(task.dataset, place, seed=task.seed, settings=task.hyperparameters)
    for name in ("train", "validation", "test"):
        part = getattr(loaded, name)
        if not len(part) or {len(each) for each in part.inputs} != {len(part)}:
            raise PermanentError(f"recipe {task.recipe!r} gave no examples for {name}, or inputs of several lengths")
    return definition, loaded


def definition_of(recipe: str) -> Definition:
    """The code of a recipe, which is loaded here and nowhere else. Errors: PermanentError."""
    known = recipes.known().get(recipe)
    if known is None:
        raise PermanentError(f"no recipe {recipe!r} is installed where the training runs")
    module, _, attribute = known.definition.partition(":")
    try:
        found: Definition = getattr(import_module(module), attribute)
    except Exception as error:  # whatever another distribution's code raises while it is loaded
        raise PermanentError(f"recipe {recipe!r}: {known.definition} cannot be loaded: {error!r}") from error
    missing = [name for name in _MEMBERS if not hasattr(found, name)]
    if missing:
        raise PermanentError(f"recipe {recipe!r}: {known.definition} has no {', '.join(missing)}")
    return found


_MEMBERS = sorted(name for name in {*Definition.__annotations__, *vars(Definition)} if not name.startswith("_"))


def outputs(serving: nn.Module, part: Part) -> npt.NDArray[np.float32]:
    """The first output of the served module to all examples of a part."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(part), EVALUATION_BATCH):
            answers = serving(*(each[start : start + EVALUATION_BATCH] for each in part.inputs))
            found.append(answers[0] if isinstance(answers, tuple | list) else answers)
    first: npt.NDArray[np.float32] = torch.cat(found).float().numpy()
    return first


def raw_targets(loaded: Loaded, part: Part) -> npt.NDArray[np.float64]:
    """Targets in their unit; classes as they are."""
    return part.targets.double().numpy() * loaded.target_std + loaded.target_mean


def evaluated(loaded: Loaded, answers: npt.NDArray[np.float32]) -> Evaluation:
    """Measure the first output to the test part."""
    if loaded.test.targets.is_floating_point():
        return evaluate.evaluate_regression(answers, raw_targets(loaded, loaded.test))
    return evaluate.evaluate(answers, loaded.test.targets.numpy(), loaded.labels)


def difference_max(loaded: Loaded) -> float:
    """Largest difference of the first output that an export may have."""
    return export.DIFFERENCE_MAX * loaded.target_std


def exported_model(
    folder: Path, definition: Definition, loaded: Loaded, serving: nn.Module, reporter: Reporter
) -> export.Exported:
    """The served module as model.onnx in the folder, checked. Errors: PermanentError, OSError."""
    started = time.monotonic()
    most = PARITY_EXAMPLES_MAX_AXES if definition.axes else PARITY_EXAMPLES_MAX
    held_out = [each[:most] for each in loaded.test.inputs]
    try:
        exported = export.export(
            serving,
            export.cases(serving, held_out, input_names=definition.input_names, axes=definition.axes),
            folder / MODEL_FILE,
            input_names=definition.input_names,
            output_names=definition.output_names,
            axes=definition.axes,
            difference_max=difference_max(loaded),
        )
    except export.ExportError as error:
        raise PermanentError(f"the exported model does not hold up: {error}") from error
    reporter.send(
        LogLine(
            severity="info",
            message=f"exported to ONNX in {time.monotonic() - started:.1f} s, "
            f"largest difference to the trained model {exported.max_abs_diff:.1e}",
        )
    )
    return exported


def latencies(onnx: bytes, part: Part, *, threads: int) -> tuple[Latency, ...]:
    """How fast an exported model answers here, for each of LATENCY_BATCHES."""
    run = export.session(onnx, threads=threads)
    found = []
    for size in LATENCY_BATCHES:
        given = [each[torch.arange(size) % len(part)].numpy() for each in part.inputs]
        found.append(latency.measure(functools.partial(run, given), batch_size=size, clock=time.perf_counter))
    return tuple(found)


def shipped(
    folder: Path,
    task: TrainingTask,
    definition: Definition,
    loaded: Loaded,
    *,
    evaluation: Evaluation,
    made: Mapping[str, bytes],
) -> tuple[File, ...]:
    """Write what goes into the version beside the model. Errors: OSError, PermanentError."""
    files: dict[str, bytes] = {
        EVALUATION_FILE: _json(documents.evaluation_document(evaluation)),
        STATISTICS_FILE: _json(loaded.statistics),
        TRAINING_FILE: _json({k: v for k, v in documents.task_document(task).items() if k not in _OF_THE_ATTEMPT}),
        **made,
    }
    if loaded.labels:
        files[LABELS_FILE] = "\n".join(loaded.labels).encode()
    kinds = {path: _SUFFIXES[Path(path).suffix] for path in files}
    for file in definition.files(loaded):
        if file.path in files or file.path in _RESERVED or ".." in Path(file.path).parts or file.path.startswith("/"):
            raise PermanentError(f"recipe {task.recipe!r} cannot ship a file called {file.path!r}")
        files[file.path], kinds[file.path] = file.data, file.media_type
    return tuple(
        export.write_file(folder / path, data, media_type=kinds[path], name=path) for path, data in files.items()
    )


_OF_THE_ATTEMPT = {"uid", "attempt", "threads", "gpus"}
_RESERVED = {MODEL_FILE, RESULT_FILE, TASK_FILE, "lock"}


def describe(task: TrainingTask, definition: Definition, loaded: Loaded) -> dict[str, str]:
    """Labels of the version: how to feed the model, and how it was made."""
    labels = {
        "recipe": task.recipe,
        "dataset": task.dataset or task.dataset_version,
        "seed": str(task.seed),
        "training_examples": str(len(loaded.train)),
        **({"classes": ",".join(loaded.labels)} if loaded.labels else {}),
        **({"optimization": optimizing.name(task.optimization)} if task.optimization else {}),
        **definition.describe(loaded),
        **{f"hyperparameters.{name}": f"{value:g}" for name, value in sorted(task.hyperparameters.items())},
    }
    # The registry has bounds; training.json and labels.txt have all of it.
    return {name: value[:LABEL_LENGTH_MAX] for name, value in list(labels.items())[:LABELS_MAX]}


def _json(document: Any) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


class _Preloading:
    """Imports what the export and the pictures need beside the fitting, once there is a moment."""

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._load, name="preload", daemon=True)

    def start(self) -> None:
        """Begin, unless it has begun."""
        if not self._thread.ident:
            self._thread.start()

    def wait(self) -> None:
        """Until it is done."""
        self.start()
        self._thread.join()

    @staticmethod
    def _load() -> None:
        export.preload()
        plots.preload()
