"""Early stopping: which epoch was the best, and when no better one is to be expected. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlmesh_training.options import Direction, EarlyStopping
from mlmesh_training.trainer.reporter import PermanentError


@dataclass(slots=True, kw_only=True)
class Watch:
    """Follows one figure over the epochs.

    Attributes:
        options: what is followed.
        ending: whether it may end the fitting, or only knows the best epoch.
        best: the best value so far; None before the first epoch.
        best_epoch: its epoch, counted from 1.
        waited: epochs since an improvement that counts.
    """

    options: EarlyStopping
    ending: bool
    best: float | None = None
    best_epoch: int = 0
    waited: int = 0
    _reference: float | None = None

    @classmethod
    def of(cls, options: EarlyStopping | None) -> Watch:
        """The watch for a job's options; without any it follows the validation loss and ends nothing."""
        return cls(options=options or EarlyStopping(), ending=options is not None)

    def see(self, epoch: int, figures: Mapping[str, float]) -> bool:
        """Take in an epoch's figures; whether it is the best so far. Errors: PermanentError for an unknown figure."""
        if self.options.metric not in figures:
            raise PermanentError(
                f"early stopping watches {self.options.metric!r}, which is not measured; there are "
                f"{', '.join(sorted(figures))}"
            )
        value = figures[self.options.metric]
        if self._reference is None or self._gain(value, self._reference) > self.options.min_delta:
            self._reference, self.waited = value, 0
        else:
            self.waited += 1
        if self.best is None or self._gain(value, self.best) > 0:
            self.best, self.best_epoch = value, epoch
            return True
        return False

    @property
    def over(self) -> bool:
        """Whether the fitting should end."""
        return self.ending and self.waited >= self.options.patience

    def state(self) -> dict[str, Any]:
        """What it has seen."""
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "waited": self.waited,
            "reference": self._reference,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.best, self.best_epoch = state["best"], int(state["best_epoch"])
        self.waited, self._reference = int(state["waited"]), state["reference"]

    def _gain(self, value: float, other: float) -> float:
        return other - value if self.options.direction is Direction.MINIMIZE else value - other
