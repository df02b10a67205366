"""The learning rate over the steps of a fitting."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from mlmesh_training.options import Schedule


def schedule(optimizer: Optimizer, kind: Schedule, *, rate: float, steps: int, warmup_share: float) -> LRScheduler:
    """The schedule of an optimizer that was made with its peak rate; to be stepped after each optimizer step."""
    if kind is Schedule.ONE_CYCLE:
        return OneCycleLR(optimizer, max_lr=rate, total_steps=steps + 1)
    return LambdaLR(optimizer, factor(kind, steps=steps, warmup_share=warmup_share))


def factor(kind: Schedule, *, steps: int, warmup_share: float) -> Callable[[int], float]:
    """The share of the peak rate at each step, counted from 0. The last step's is above 0, so that it learns too."""
    warmup = math.ceil(steps * warmup_share)

    def of(step: int) -> float:
        if kind is Schedule.CONSTANT:
            return 1.0
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.5 * (1.0 + math.cos(math.pi * done)) if kind is Schedule.COSINE else 1.0 - done

    return of
