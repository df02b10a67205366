"""The ends of a job's folder that every backend shares: the task that goes in and the model that comes out."""

from __future__ import annotations

import json
from pathlib import Path

from mlmesh_runtime.chunks import sha256_of
from mlmesh_training import documents
from mlmesh_training.backends.base import RESULT_FILE, TASK_FILE, TrainingTask
from mlmesh_training.jobs import TrainedModel


def prepare(folder: Path, task: TrainingTask) -> None:
    """Make the folder and write the task. Errors: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TASK_FILE).write_text(documents.dumps(documents.task_document(task)))


def read_result(folder: Path) -> TrainedModel:
    """What a finished training left, each file verified against its digest.

    Errors: OSError, ValueError, KeyError, TypeError when it is not whole.
    """
    model = documents.read_model(json.loads((folder / RESULT_FILE).read_bytes()))
    for file in model.files:
        found = sha256_of(folder / file.path)
        if found != (file.sha256, file.size_bytes):
            raise ValueError(f"{file.path} is not what was exported ({found[1]} bytes, expected {file.size_bytes})")
    return model
