"""Which examples go where: a pure function of seed, epoch, position and rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 2
"""Examples that batch normalisation needs at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How the examples of an epoch become optimizer steps.

    Attributes:
        examples: number of training examples.
        batch: examples in a batch, of all processes together.
        accumulation: batches whose gradients make one step.
    """

    examples: int
    batch: int
    accumulation: int = 1

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        # A rest of one example teaches batch normalisation nothing; another epoch's order takes it in.
        batches = self.examples // self.batch + (self.examples % self.batch >= LEAST)
        return -(-batches // self.accumulation)

    def order(self, *, seed: int, epoch: int) -> list[Sequence[Tensor]]:
        """For each optimizer step of an epoch, the rows of its batches, int64 each."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        shuffled = torch.randperm(self.examples, generator=generator)
        batches = [rows for rows in torch.split(shuffled, self.batch) if len(rows) >= LEAST]
        return [batches[at : at + self.accumulation] for at in range(0, len(batches), self.accumulation)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One process's part of a batch.

    Attributes:
        rows: int64; never empty, so that each process takes part in what all do together.
        counted: how many examples count; 0 where the rows are only there to take part.
    """

    rows: Tensor
    counted: int


def share(rows: Tensor, *, rank: int, world: int, least: int = LEAST) -> Share:
    """Split a batch as evenly as it goes. A rest too small for all is split among the first processes only.

    The split sums up to the batch: with each mean loss weighted by `counted`, n processes learn what one would.
    """
    parts = min(world, max(1, len(rows) // least))
    if rank >= parts:
        return Share(rows=rows[:least], counted=0)
    part = torch.tensor_split(rows, parts)[rank]
    return Share(rows=part, counted=len(part))
