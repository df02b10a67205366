"""The fitting loop: seeded, deterministic, and able to go on from any epoch as if it had never stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.jobs import Checkpoint, Metrics, Progress
from mlmesh_training.trainer import checkpoint, data, networks
from mlmesh_training.trainer.reporter import PermanentError, Reporter

REPORT_INTERVAL_S = 0.2
EVALUATION_BATCH = 256


class Fit:
    """Model, optimizer, schedule and random state of one task, and how far they are."""

    def __init__(self, task: TrainingTask, loaded: data.Data, split: data.Split) -> None:
        settings = task.hyperparameters
        self.task = task
        self.epoch = 0
        self.epochs = int(settings["epochs"])
        self.step = 0
        self._images = torch.from_numpy(loaded.images[split.train]).float()
        self._classes = torch.from_numpy(loaded.classes[split.train])
        self._validation = torch.from_numpy(loaded.images[split.validation]).float()
        self._validation_classes = torch.from_numpy(loaded.classes[split.validation])
        self._batch = int(settings["batch_size"])
        # Batch normalisation cannot learn from a single example: such a rest is left for another epoch's order.
        examples = len(self._images)
        self.steps = self.epochs * (examples // self._batch + (examples % self._batch > 1))
        torch.manual_seed(task.seed)
        self.model = networks.build(
            task.recipe,
            settings,
            height=loaded.images.shape[2],
            width=loaded.images.shape[3],
            classes=len(loaded.labels),
            mean=float(self._images.mean()),
            std=float(self._images.std()),
        )
        self._loss = nn.CrossEntropyLoss(label_smoothing=settings["label_smoothing"])
        rate = settings["learning_rate"]
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=settings["weight_decay"])
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(self._optimizer, max_lr=rate, total_steps=self.steps + 1)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(epoch=self.epoch, epochs=self.epochs, step=self.step, steps=self.steps)

    def run(self, folder: Path, reporter: Reporter) -> None:
        """Fit the epochs that are left; store a checkpoint after each. Errors: PermanentError (diverged), OSError."""
        while self.epoch < self.epochs:
            whole, meter = _Meter(), _Meter()
            self.model.train()
            for rows in self._order():
                loss, right = self._fit(rows)
                whole.add(loss, right, len(rows))
                meter.add(loss, right, len(rows))
                if meter.age_s >= REPORT_INTERVAL_S:
                    reporter.send(Metrics(progress=self.progress, values=self._figures(meter)))
                    meter = _Meter()
            self.epoch += 1
            # The last figures of an epoch are means over all of it.
            reporter.send(Metrics(progress=self.progress, values={**self._figures(whole), **self._validate()}))
            sha256 = checkpoint.save(folder, self.epoch, self.state())
            reporter.send(Checkpoint(progress=self.progress, sha256=sha256))

    def logits(self, images: Tensor) -> npt.NDArray[np.float32]:
        """Answers, FP32 [examples, classes], of the model as it is to raw images, FP32 [examples, 1, height, width]."""
        self.model.eval()
        with torch.inference_mode():
            parts = [self.model(part) for part in torch.split(images, EVALUATION_BATCH)]
        answers: npt.NDArray[np.float32] = torch.cat(parts).numpy()
        return answers

    def state(self) -> dict[str, Any]:
        """All that the rest of the fitting depends on."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "random": torch.get_rng_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a stored state. Errors: RuntimeError, KeyError, ValueError, TypeError for another model's."""
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self.epoch = int(state["epoch"])
        self.step = int(state["step"])
        torch.set_rng_state(state["random"])

    def _order(self) -> list[Tensor]:
        """Rows of each batch of this epoch; depends on seed and epoch alone."""
        generator = torch.Generator().manual_seed(self.task.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self._images), generator=generator)
        return [rows for rows in torch.split(shuffled, self._batch) if len(rows) > 1]

    def _fit(self, rows: Tensor) -> tuple[float, int]:
        images, classes = self._images[rows], self._classes[rows]
        if most := int(self.task.hyperparameters["shift"]):
            images = shifted(images, most)
        logits = self.model(images)
        loss = self._loss(logits, classes)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise PermanentError(f"the loss became {value} in epoch {self.epoch + 1}; lower learning_rate")
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self.step += 1
        return value, int((logits.argmax(1) == classes).sum())

    def _figures(self, meter: _Meter) -> dict[str, float]:
        return {
            "train_loss": meter.loss,
            "train_accuracy": meter.accuracy,
            "learning_rate": float(self._schedule.get_last_lr()[0]),
            "examples_per_second": meter.examples_per_second,
        }

    def _validate(self) -> dict[str, float]:
        logits = torch.from_numpy(self.logits(self._validation))
        loss = float(nn.functional.cross_entropy(logits, self._validation_classes))
        if not math.isfinite(loss):
            raise PermanentError(f"the validation loss became {loss} in epoch {self.epoch}; lower learning_rate")
        accuracy = float((logits.argmax(1) == self._validation_classes).float().mean())
        return {"validation_loss": loss, "validation_accuracy": accuracy}


def shifted(images: Tensor, most: int) -> Tensor:
    """Move a batch by up to `most` pixels each way, filled with 0; drawn from torch's global generator."""
    down, right = (int(moved) for moved in torch.randint(0, 2 * most + 1, (2,)))
    height, width = images.shape[2:]
    padded = nn.functional.pad(images, (most, most, most, most))
    return padded[:, :, down : down + height, right : right + width]


class _Meter:
    """Means since it was made; of at least one batch."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._loss = 0.0
        self._right = 0
        self._examples = 0

    def add(self, loss: float, right: int, examples: int) -> None:
        self._loss += loss * examples
        self._right += right
        self._examples += examples

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def loss(self) -> float:
        return self._loss / self._examples

    @property
    def accuracy(self) -> float:
        return self._right / self._examples

    @property
    def examples_per_second(self) -> float:
        return self._examples / max(1e-6, self.age_s)
