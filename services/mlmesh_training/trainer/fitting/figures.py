"""Figures of the fitting: sums over examples, which any number of processes can add up."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlmesh_training.trainer.definition import Loaded

_KEPT = 3
"""Sums: of the loss, of what is right (or the squared error), of examples. The message adds a vote to pause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Sums over examples. `second`: right answers of a classifier, squared errors of a regressor."""

    loss: float
    second: float
    examples: float


class Meter:
    """Means since it was made."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._loss = 0.0
        self._second = 0.0
        self._examples = 0.0
        self._before = 0.0

    def add(self, sums: Sums) -> None:
        """Take in the sums of further examples."""
        self._loss += sums.loss
        self._second += sums.second
        self._examples += sums.examples

    @property
    def filled(self) -> bool:
        """Whether there is anything to take means of."""
        return self._examples > 0

    @property
    def age_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._started

    @property
    def loss(self) -> float:
        """Mean loss."""
        return self._loss / self._examples

    @property
    def second(self) -> float:
        """Share of right answers, or mean squared error."""
        return self._second / self._examples

    @property
    def examples_per_second(self) -> float:
        """Examples of this process's life."""
        return (self._examples - self._before) / max(1e-6, self.age_s)

    def state(self) -> list[float]:
        """The sums so far."""
        return [self._loss, self._second, self._examples]

    def restore(self, state: list[float]) -> None:
        """Go on from these sums."""
        self._loss, self._second, self._examples = state
        self._before = self._examples


class Figures:
    """Adds up figures where they arise, so that a GPU is waited for only when they are looked at.

    Classifiers have `loss` and `accuracy`; regressors `loss`, of normalised values, and `error`, the root of the mean
    squared error in the unit of the target.
    """

    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.classifying = not loaded.train.targets.is_floating_point()
        self._unit = loaded.target_std
        self._here = torch.zeros(_KEPT + 1, dtype=torch.float64, device=device)
        self._since_look = torch.zeros_like(self._here)

    @torch.no_grad()
    def add(self, outputs: Tensor, targets: Tensor, loss: Tensor, counted: int) -> None:
        """Take in a batch of this process: its outputs and its mean loss; `counted` 0: it does not count."""
        if not counted:
            return
        if self.classifying:
            second = (outputs.argmax(1) == targets).sum()
        else:
            second = (outputs.reshape(targets.shape) - targets).square().sum()
        self._here[0] += loss.double() * counted
        self._here[1] += second
        self._here[2] += counted

    def message(self, *, asked: bool) -> Tensor:
        """What this process tells the others, FP64 [4]; begins anew."""
        message = self._here
        message[_KEPT] = float(asked)
        self._here = torch.zeros_like(message)
        return message

    def take(self, message: Tensor, *, look: bool) -> tuple[Sums | None, bool]:
        """Take in the sum of all processes' messages; where it is time to look, the sums and whether to pause."""
        self._since_look += message
        if not look:
            return None, False
        loss, second, examples, asked = self._since_look.tolist()
        self._since_look.zero_()
        return Sums(loss=loss, second=second, examples=examples), asked > 0

    def validation_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, or mean squared error, whatever a recipe does to its training loss."""
        if self.classifying:
            return nn.functional.cross_entropy(outputs, targets)
        return nn.functional.mse_loss(outputs.reshape(targets.shape), targets)

    def named(self, meter: Meter) -> Mapping[str, float]:
        """Means by their names."""
        if self.classifying:
            return {"loss": meter.loss, "accuracy": meter.second}
        return {"loss": meter.loss, "error": self._unit * math.sqrt(meter.second)}
