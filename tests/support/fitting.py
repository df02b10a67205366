"""Small fittings for tests: real digits, networks of a few hundred weights."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mlmesh_training import documents
from mlmesh_training.backends.base import Died, Report, TrainingTask
from mlmesh_training.backends.reports import read_report, report_line
from mlmesh_training.jobs import LogLine, Metrics
from mlmesh_training.options import Distribution, FitOptions
from mlmesh_training.trainer import sources
from mlmesh_training.trainer.definition import Classification, Loaded, Part, Settings
from mlmesh_training.trainer.fitting.loop import Fit
from mlmesh_training.trainer.fitting.ranks import ALONE, Ranks
from mlmesh_training.trainer.reporter import Reporter


class Network(nn.Module):
    """Layers in a list, so that FSDP2 shards each by itself."""

    def __init__(self, *, batch_norm: bool, dropout: float) -> None:
        super().__init__()
        norms = [nn.BatchNorm1d(24) if batch_norm else nn.GroupNorm(4, 24) for _ in range(2)]
        sizes = [(64, 24), (24, 24)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(*size), norm, nn.ReLU()) for size, norm in zip(sizes, norms, strict=True)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(24, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits, FP32 [batch, 10], of FP32 [batch, 64]."""
        for layer in self.layers:
            image = layer(image)
        answers: Tensor = self.head(self.dropout(image))
        return answers


class Digits(Classification):
    """A recipe of the tests. Settings: batch_norm, dropout and noise, all 0 where absent."""

    input_names = ("image",)

    def load(self, dataset: str, folder: str, *, seed: int, settings: Settings) -> Loaded:
        """See `digits`."""
        return digits()

    def build(self, settings: Settings, loaded: Loaded) -> nn.Module:
        """The network."""
        return Network(batch_norm=bool(settings.get("batch_norm")), dropout=settings.get("dropout", 0.0))

    def augment(self, inputs: tuple[Tensor, ...], settings: Settings, generator: Generator) -> tuple[Tensor, ...]:
        """With noise."""
        if not (noise := settings.get("noise", 0.0)):
            return inputs
        return tuple(each + noise * torch.randn(each.shape, generator=generator) for each in inputs)


DIGITS = Digits()


@functools.cache
def digits() -> Loaded:
    """A few hundred digits; the size leaves a rest in every batch size that is tried."""
    read = sources.images("digits")
    inputs = torch.tensor(read.pixels, dtype=torch.float32).flatten(1) / 16.0
    targets = torch.tensor(read.classes)

    def part(start: int, end: int) -> Part:
        return Part(inputs=(inputs[start:end],), targets=targets[start:end])

    return Loaded(train=part(0, 323), validation=part(323, 424), test=part(424, 500), labels=tuple("0123456789"))


def task(
    *, fit: FitOptions | None = None, distribution: Distribution | None = None, seed: int = 7, **settings: float
) -> TrainingTask:
    """Three epochs of eleven steps, the last of three examples."""
    values = {"epochs": 3.0, "batch_size": 32.0, "learning_rate": 0.01, "weight_decay": 1e-4, **settings}
    return TrainingTask(
        uid="digits",
        recipe="",
        dataset="",
        hyperparameters=values,
        seed=seed,
        fit=fit or FitOptions(),
        distribution=distribution or Distribution(),
    )


class Listener(Reporter):
    """Keeps reports, as the service would read them."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.reports: list[Report | Died] = []

    def send(self, report: Report | Died) -> None:
        """Keep one."""
        self.reports.append(read_report(report_line(report)))

    def curve(self) -> list[tuple[float, float, float]]:
        """Training loss, validation loss and validation accuracy of each epoch, the latest of each."""
        found = {
            report.progress.epoch: (
                report.values["train_loss"],
                report.values["validation_loss"],
                report.values["validation_accuracy"],
            )
            for report in self.reports
            if isinstance(report, Metrics) and "validation_loss" in report.values
        }
        return [found[epoch] for epoch in sorted(found)]

    def lines(self) -> list[str]:
        """Log lines."""
        return [report.message for report in self.reports if isinstance(report, LogLine)]


class Memory:
    """Keeps every state that a fitting saves, as it would come back from the disk."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}

    def __call__(self, step: int, state: Any) -> str:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        self.states[step] = torch.load(buffer, weights_only=True)
        return "00" * 32


def run(asked: TrainingTask, ranks: Ranks = ALONE, *, state: Any = None) -> tuple[Fit, Listener, Memory]:
    """Fit, from a state where one is given."""
    fit, listener, memory = Fit(asked, DIGITS, digits(), ranks), Listener(), Memory()
    if state is not None:
        fit.restore(state)
    fit.run(memory, listener)
    return fit, listener, memory


def same(first: Any, second: Any) -> bool:
    """Whether two states are the same, bit by bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
    return bool(first == second)


def put_task(folder: Path, asked: TrainingTask) -> Path:
    """Write a task where the trainer reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps(documents.task_document(asked)))
    return folder
