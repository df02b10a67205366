"""Jobs, ledgers and services for the tests of training."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from mlmesh_training import recipes
from mlmesh_training.backends.base import Finished, Outcome, Report, TrainingTask
from mlmesh_training.jobs import (
    Evaluation,
    File,
    Job,
    JobSpec,
    OptimizationResult,
    Publication,
    Tensor,
    TrainedModel,
)

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class ManualClock:
    """A clock that moves one second with each look."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def spec(**changes: Any) -> JobSpec:
    """A spec that is fine, with changes."""
    return JobSpec(**{"recipe": "cnn", "dataset": "digits", "hyperparameters": {"epochs": 2.0}, "seed": 7, **changes})


def job(uid: str = "cnn-digits-1", **changes: Any) -> Job:
    """A queued job, with changes."""
    asked = changes.pop("spec", spec())
    return Job(
        **{"uid": uid, "spec": asked, "hyperparameters": recipes.resolve(asked), "create_time": START, **changes}
    )


def evaluation(**changes: Any) -> Evaluation:
    """An evaluation of two classes."""
    fields = {
        "accuracy": 0.75,
        "precision": 0.7,
        "recall": 0.72,
        "f1": 0.71,
        "loss": 0.5,
        "labels": ("0", "1"),
        "confusion": ((3, 1), (0, 4)),
        "examples": 8,
    }
    return Evaluation(**{**fields, **changes})


def optimization() -> OptimizationResult:
    """What an optimisation measured."""
    return OptimizationResult(
        source="models/digits/versions/1",
        technique="int8",
        before=evaluation(),
        after=evaluation(accuracy=0.7),
        size_bytes_before=100,
        size_bytes_after=30,
        quality_drop=0.05,
        quality_drop_max=0.1,
    )


def model(**changes: Any) -> TrainedModel:
    """A trained model with one file."""
    fields = {
        "files": (File(path="model.onnx", sha256="ab" * 32, size_bytes=3, media_type="application/onnx"),),
        "inputs": (Tensor(name="image", datatype="FP32", shape=(-1, 1, 8, 8)),),
        "outputs": (Tensor(name="logits", datatype="FP32", shape=(-1, 10)),),
        "evaluation": evaluation(),
        "labels": {"classes": "0,1"},
        "dataset_fingerprint": "cd" * 32,
        "code_digest": "ef" * 32,
        "environment_digest": "01" * 32,
    }
    return TrainedModel(**{**fields, **changes})


PUBLICATION = Publication(model="models/digits", aliases=("stable",), description="of a test")

Act = Callable[[TrainingTask, Callable[[Report], Awaitable[None]], asyncio.Event], Awaitable[Outcome]]


class ScriptedBackend:
    """A backend whose attempts are coroutines of the test, in order; the last one is used again and again.

    It keeps the port's promise: once `run` ends, nothing of the attempt runs.
    """

    def __init__(self, *acts: Act) -> None:
        self._acts = list(acts) or [finish]
        self.attempts: list[str] = []
        self.running = 0
        self.running_max = 0
        self.discarded: list[str] = []
        self.tasks: list[TrainingTask] = []
        self.pauses: dict[str, asyncio.Event] = {}

    async def run(
        self,
        task: TrainingTask,
        *,
        report: Callable[[Report], Awaitable[None]],
        stop: asyncio.Event,
        pause: asyncio.Event,
    ) -> Outcome:
        act = self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]
        self.attempts.append(task.uid)
        self.tasks.append(task)
        self.pauses[task.uid] = pause
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        try:
            return await act(task, report, stop)
        finally:
            self.running -= 1

    def folder(self, uid: str) -> Path:
        return Path("/nowhere") / uid

    async def discard(self, uid: str) -> None:
        self.discarded.append(uid)


async def finish(task: TrainingTask, report: Callable[[Report], Awaitable[None]], stop: asyncio.Event) -> Outcome:
    """An attempt that succeeds at once."""
    return Finished(model=model())


def children(pid: int) -> list[int]:
    """Processes whose parent is pid (Linux)."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in path.read_text().split()]
        except OSError:
            continue
    return found


async def becomes(wanted: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    """Wait for what no event tells: another process's end, a file's removal. TimeoutError when it does not come."""
    async with asyncio.timeout(timeout_s):
        while not wanted():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False
