"""Several processes that fit together, once for all scenarios of a test: `python -m tests.support.fitting_group OUT N`.

Rank 0 leaves what it learnt in the file OUT. Processes are forked after torch was loaded, which is what takes long.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it, which takes a second
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp

from mlmesh_training import recipes
from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.options import Distribution, EarlyStopping, FitOptions, Precision, Schedule, Strategy
from mlmesh_training.trainer.fitting import sharing
from mlmesh_training.trainer.fitting.loop import Fit
from mlmesh_training.trainer.fitting.pausing import Asked, PauseRequested
from mlmesh_training.trainer.fitting.ranks import Ranks, settle
from mlmesh_training.trainer.fitting.worker import joined
from mlmesh_training.trainer.run import load
from tests.support.fitting import DIGITS, Listener, Memory, digits, run, same, task
from tests.support.training import spec

WORLD = 3
"""Two would hide in which order their numbers are added."""
RANDOM = {"batch_norm": 1.0, "dropout": 0.2, "noise": 0.1}
CURVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"fit": FitOptions(accumulation_steps=3, clip_norm=0.5, schedule=Schedule.COSINE)},
    "stopped": {
        "fit": FitOptions(early_stopping=EarlyStopping(patience=1), restore_best=True),
        "epochs": 30.0,
        "learning_rate": 0.1,
    },
}
"""Nothing at random: any number of processes learns the same, but for rounding."""
RESUMED: dict[str, dict[str, Any]] = {
    "random": {"fit": FitOptions(checkpoint_steps=14, restore_best=True), **RANDOM},
    "fp16": {
        "fit": FitOptions(checkpoint_steps=10, accumulation_steps=2, clip_norm=1.0, precision=Precision.FP16),
        **RANDOM,
    },
    "bf16": {"fit": FitOptions(checkpoint_steps=20, precision=Precision.BF16), **RANDOM},
}
"""All that is stored must come back for these to end alike."""


@functools.cache
def found() -> dict[str, Any]:
    """What these processes found, by strategy and scenario; run once."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.pt")
        subprocess.run(
            [sys.executable, "-m", "tests.support.fitting_group", str(out), str(WORLD)],
            check=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        result: dict[str, Any] = torch.load(out, weights_only=True)
        return result


def job(uid: str, strategy: Strategy) -> TrainingTask:
    """A job of so many processes, with batch norm, dropout and augmentation: all that a restart could get wrong.

    24 steps, six an epoch, the last of each epoch with 15 examples; a checkpoint every five steps.
    """
    asked = {"epochs": 4.0, "batch_size": 256.0, "width": 8.0, "dropout": 0.3, "shift": 1.0}
    return TrainingTask(
        uid=uid,
        recipe="mlp",
        dataset="digits",
        hyperparameters=recipes.resolve(spec(recipe="mlp", hyperparameters=asked)),
        seed=7,
        fit=FitOptions(checkpoint_steps=5),
        distribution=Distribution(processes=WORLD, strategy=strategy),
        threads=1,
    )


def main(out: Path, world: int) -> int:
    """Fork, run, wait; 0 when all of them went well."""
    pids = []
    for rank in range(world):
        if not (pid := os.fork()):
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
            code = 1
            try:
                with joined(out.parent, collective_s=60.0) as ranks:
                    code = work(out, ranks)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)


def work(out: Path, ranks: Ranks) -> int:
    """All scenarios, in the same order in each process."""
    settle(1)
    learnt: dict[str, Any] = {}
    for strategy in Strategy:
        distribution = Distribution(processes=ranks.world, strategy=strategy)
        for name, changes in CURVES.items():
            _, listener, memory = run(task(distribution=distribution, **changes), ranks)
            learnt[f"{strategy} {name}"] = {"curve": listener.curve(), "lines": listener.lines()}
            learnt[f"{strategy} {name}"]["best"] = memory.states[max(memory.states)]["best"] if ranks.first else None
        for name, changes in RESUMED.items():
            learnt[f"{strategy} {name}"] = resumed(distribution, changes, ranks)
        learnt[f"{strategy} paused"] = paused(distribution, ranks)
        learnt[f"{strategy} statistics"] = statistics(distribution, ranks)
        learnt[f"{strategy} sharded"] = weights_here(distribution, ranks)
        learnt[f"{strategy} job"] = undisturbed(job("whole", strategy), ranks)
    if ranks.first:
        torch.save(learnt, out)
    return 0


def resumed(distribution: Distribution, changes: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """A fitting, and for each of its checkpoints whether one that goes on from there ends with the same bits."""
    asked = task(distribution=distribution, **changes)
    _, listener, memory = run(asked, ranks)
    last = max(memory.states) if ranks.first else 0
    alike = {}
    for step, state in through_file(memory, ranks):
        torch.rand(ranks.rank + 1)
        _, heard, kept = run(asked, ranks, state=state)
        if ranks.first and step < last:
            alike[step] = same(kept.states[last], memory.states[last]) and heard.curve()[-1] == listener.curve()[-1]
    return {"alike": alike, "curve": listener.curve()}


def paused(distribution: Distribution, ranks: Ranks) -> dict[str, Any]:
    """Only the last rank is asked to pause, after its first epoch's figures; all of them do, at the same step."""
    asked = task(distribution=distribution, **RANDOM)
    _, _, whole = run(asked, ranks)
    fit, memory, pause = Fit(asked, DIGITS, digits(), ranks), Memory(), Asked()

    class Asking(Listener):
        def send(self, report: Any) -> None:
            super().send(report)
            if ranks.rank == ranks.world - 1 and fit.epoch == 1 and "validation_loss" in getattr(report, "values", ()):
                pause.value = True

    stopped = False
    try:
        fit.run(memory, Asking(), pause=pause)
    except PauseRequested:
        stopped = True
    states = through_file(memory, ranks)
    _, _, rest = run(asked, ranks, state=states[-1][1])
    if not ranks.first:
        return {}
    last = max(whole.states)
    return {"stopped": stopped, "step": states[-1][0], "alike": same(rest.states[last], whole.states[last])}


def statistics(distribution: Distribution, ranks: Ranks) -> bool:
    """Whether batch normalisation's running statistics are the same in all processes, and finite."""
    fit, _, _ = run(task(distribution=distribution, epochs=1.0, **RANDOM), ranks)
    mine = torch.cat([each.flatten() for each in sharing.statistics(fit.shared.plain)])
    return len(mine) > 0 and all(torch.equal(mine, other) for other in ranks.gather(mine))


def undisturbed(asked: TrainingTask, ranks: Ranks) -> dict[str, Any]:
    """The state that a job ends with when nothing happens to it."""
    fit, memory = Fit(asked, *load(Path(), asked), ranks), Memory()
    fit.run(memory, Listener())
    return memory.states[max(memory.states)] if ranks.first else {}


def weights_here(distribution: Distribution, ranks: Ranks) -> float:
    """Share of the weights that this process holds."""
    fit = Fit(task(distribution=distribution), DIGITS, digits(), ranks)
    parameters = list(fit.shared.model.parameters())
    whole = sum(each.numel() for each in parameters)
    here = sum((each.to_local() if hasattr(each, "to_local") else each).numel() for each in parameters)
    return here / whole


def through_file(memory: Memory, ranks: Ranks) -> list[tuple[int, dict[str, Any]]]:
    """Rank 0's states, in every process, as from a checkpoint's file."""
    path = Path(os.environ["FITTING_GROUP_FILE"])
    if ranks.first:
        torch.save(memory.states, path)
    ranks.all(True)
    states: dict[int, dict[str, Any]] = torch.load(path, weights_only=True)
    ranks.all(True)
    return sorted(states.items())


if __name__ == "__main__":
    target = Path(sys.argv[1])
    os.environ["FITTING_GROUP_FILE"] = str(target.with_suffix(".states"))
    sys.exit(main(target, int(sys.argv[2])))
