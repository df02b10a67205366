"""The way into the fitting: alone in this process, or with workers of its own."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import nn

from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.jobs import LogLine
from mlmesh_training.trainer import checkpoint
from mlmesh_training.trainer.definition import Definition, Loaded
from mlmesh_training.trainer.fitting import agent, forking
from mlmesh_training.trainer.fitting.loop import Fit
from mlmesh_training.trainer.fitting.meeting import Machines
from mlmesh_training.trainer.fitting.pausing import ASKED, Flag
from mlmesh_training.trainer.fitting.ranks import ALONE, Ranks, device, settle
from mlmesh_training.trainer.reporter import Reporter


def fitted(
    folder: Path, task: TrainingTask, definition: Definition, loaded: Loaded, reporter: Reporter, *, threads: int
) -> nn.Module:
    """Fit a task from its last whole checkpoint in the folder, and leave checkpoints there.

    Args:
        threads: of torch in each process; 0 shares the processors out.

    Returns the module, in this process, on the CPU, whole, ready to evaluate. Errors: PermanentError when trying again
    would not help, PauseRequested after a checkpoint, `forking.GroupLost` when workers died too often,
    `forking.FirstGoesOn` on any machine but the first, OSError.
    """
    if task.distribution.processes > 1:
        found = _collected(folder, task, definition, loaded)
        if found is None:
            agent.run(folder, task, reporter, threads=threads)
        if Machines.of(task.distribution.nodes, os.environ).rank:
            raise forking.FirstGoesOn
        if found is None:
            found = _collected(folder, task, definition, loaded)
        if found is None:
            raise forking.GroupLost("the last checkpoint of the fitting is not there or not whole")
        return found
    settle(threads)
    ranks = Ranks(device=device(local_rank=0, local_world=1))
    return fit(folder, task, definition, loaded, reporter, ranks=ranks).finished()


def fit(
    folder: Path,
    task: TrainingTask,
    definition: Definition,
    loaded: Loaded,
    reporter: Reporter,
    *,
    ranks: Ranks,
    pause: Flag = ASKED,
) -> Fit:
    """Fit as one of `ranks`; each of them calls this."""
    made = resumed(folder, task, definition, loaded, reporter, ranks=ranks)
    made.run(functools.partial(checkpoint.save, folder), reporter, pause=pause)
    return made


def resumed(
    folder: Path,
    task: TrainingTask,
    definition: Definition,
    loaded: Loaded,
    reporter: Reporter,
    *,
    ranks: Ranks = ALONE,
) -> Fit:
    """A fit as the newest usable checkpoint left it, or a new one. What cannot be used is told and passed over."""
    for candidate in _candidates(folder, ranks):
        state = checkpoint.load(candidate) if candidate else None
        name = candidate.path.name if candidate else "a checkpoint"
        if not ranks.all(state is not None) or state is None:
            reporter.send(LogLine(severity="warning", message=f"{name} is torn or changed; passed over"))
            continue
        made = Fit(task, definition, loaded, ranks)
        reason = _restored(made, state)
        if not ranks.all(not reason):
            reporter.send(LogLine(severity="warning", message=f"{name} does not fit: {reason}"))
            continue
        where = f", step {made.step}" if made.position else ""
        reporter.send(LogLine(severity="info", message=f"resumed after epoch {made.epoch}{where}"))
        return made
    return Fit(task, definition, loaded, ranks)


def _candidates(folder: Path, ranks: Ranks) -> list[checkpoint.Stored | None]:
    """The checkpoints that the first process has, newest first, as this one has them."""
    here = list(checkpoint.stored(folder))[: checkpoint.KEPT + 1]
    digests = torch.zeros(checkpoint.KEPT + 1, 32, dtype=torch.uint8)
    for row, each in zip(digests, here, strict=False):
        row.copy_(torch.frombuffer(bytearray.fromhex(each.sha256), dtype=torch.uint8))
    wanted = [bytes(row.tolist()).hex() for row in ranks.gather(digests)[0] if row.any()]
    known = {each.sha256: each for each in here}
    return [known.get(sha256) for sha256 in wanted]


def _restored(made: Fit, state: dict[str, object]) -> str:
    """Restore; what was in the way, empty when nothing was."""
    try:
        made.restore(state)
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
        return str(error) or repr(error)
    return ""


def _collected(folder: Path, task: TrainingTask, definition: Definition, loaded: Loaded) -> nn.Module | None:
    """The module that workers left in their last checkpoint, None where they have not done all yet."""
    newest = next(checkpoint.stored(folder), None)
    state = checkpoint.load(newest) if newest is not None else None
    if state is None or not state.get("done"):
        return None
    model = definition.build(task.hyperparameters, loaded)
    try:
        model.load_state_dict(state["best"] or state["model"])
    except RuntimeError:
        return None
    return model.eval()
