"""The processes of one fitting, as each of them sees the others; alone, all of it is a no-op.

Deterministic on purpose: algorithms that differ from run to run are refused (`torch.use_deterministic_algorithms`),
convolutions do not choose their algorithm by timing, cuBLAS gets a fixed workspace, TF32 stays off. On a GPU that costs
speed; an operation that has no deterministic form raises an error that names it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among the others. `device`: where it computes."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this one reports and writes for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world == 1

    def add(self, values: Tensor) -> None:
        """Replace values by their sum over all processes; in the same order of additions every time."""
        if not self.alone:
            dist.all_reduce(values)

    def adding(self, values: Tensor) -> Callable[[], None]:
        """Begin to `add`; the function that is returned waits for the end."""
        if self.alone:
            return lambda: None
        work = dist.all_reduce(values, async_op=True)

        def wait() -> None:
            if work is not None:
                work.wait()

        return wait

    def all(self, said: bool) -> bool:
        """Whether all processes say so."""
        votes = torch.tensor(float(said), device=self.device)
        self.add(votes)
        return float(votes) == self.world

    def gather(self, values: Tensor) -> list[Tensor]:
        """The values of each process by rank, on the CPU; of the same shape in each."""
        if self.alone:
            return [values]
        moved = values.to(self.device)
        found = [torch.empty_like(moved) for _ in range(self.world)]
        dist.all_gather(found, moved)
        return [each.cpu() for each in found]


ALONE = Ranks()


def device(*, local_rank: int, local_world: int) -> torch.device:
    """A GPU of its own for each process of this machine where there are enough of them, else the CPU for all."""
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_world:
        found = torch.device("cuda", local_rank)
        torch.cuda.set_device(found)
        return found
    return CPU


def settle(threads: int) -> None:
    """Make torch of this process deterministic, with so many threads; 0: all processors that it may run on."""
    # Read by cuBLAS when it is first used: https://docs.nvidia.com/cuda/cublas, "Results reproducibility".
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
