"""What does the service add to distributed training, and how fast does it train again after a kill?

    python -m benchmarks training-ddp --rounds 3 --epochs 30

Two processes fit the same network on the same batches over gloo: as a job of the service's local backend, and as a
plain script under `torchrun`, in turn. The service's figures contain what the plain script does without: figures of
every step from all processes, progress, flushed checkpoints of everything, validation by all processes.

- *examples a second*: between the end of the first and of the last epoch.
- *until fitted*: from the start of the first process to the last checkpoint; most of it is loading torch.
- *kill of a worker, of the agent*: `kill -9` in the middle of an epoch, until the first epoch that ends after it. The
  plain script gets the setting without which torchrun hangs (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1); nothing starts
  torchrun itself again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.harness import ratio_of_medians, write_results
from mlmesh_runtime.executors import BoundedExecutor, Executors
from mlmesh_training import recipes
from mlmesh_training.backends.base import Report, TrainingTask
from mlmesh_training.backends.local import LocalBackend, LocalLimits
from mlmesh_training.backends.results import prepare
from mlmesh_training.config import trainer_environment
from mlmesh_training.jobs import JobSpec, Metrics
from mlmesh_training.options import Distribution, Strategy

RESULT = Path("benchmarks/results/training_ddp.json")
RUN_S_MAX = 240.0
EXAMPLES = 3600
SCRIPT = Path(__file__).with_name("plain_ddp.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """When a run began and when each of its epochs ended, seconds of one clock."""

    began: float
    epochs: Mapping[int, float]

    @property
    def examples_per_s(self) -> float:
        """Between the end of the first and of the last epoch."""
        first, last = min(self.epochs), max(self.epochs)
        return (last - first) * EXAMPLES / (self.epochs[last] - self.epochs[first])

    @property
    def fitted_s(self) -> float:
        """From the start to the end of the last epoch."""
        return max(self.epochs.values()) - self.began


def task(uid: str, *, epochs: int, strategy: Strategy = Strategy.DDP) -> TrainingTask:
    """A network on MNIST, in two processes."""
    asked = {"epochs": float(epochs), "batch_size": 128.0, "dropout": 0.0, "width": 256.0}
    spec = JobSpec(recipe="mlp", dataset="mnist", hyperparameters=asked, seed=1)
    return TrainingTask(
        uid=uid,
        recipe=spec.recipe,
        dataset=spec.dataset,
        hyperparameters=recipes.resolve(spec),
        seed=spec.seed,
        distribution=Distribution(processes=2, strategy=strategy),
        threads=1,
    )


class Service:
    """Jobs on the local backend, as the service runs them."""

    def __init__(self, folder: Path, executor: BoundedExecutor, environ: Mapping[str, str]) -> None:
        self._backend = LocalBackend(folder, executor=executor, environ=environ, limits=LocalLimits(stop_grace_s=0.1))

    async def run(self, asked: TrainingTask, *, kill: Callable[[int], None] | None = None, at_epoch: int = 2) -> Run:
        """Until it is fitted; `kill` gets the agent's process id once, after an epoch."""
        began, ended, stop = time.monotonic(), dict[int, float](), asyncio.Event()
        epochs, left = int(asked.hyperparameters["epochs"]), kill
        before = {child.pid for child in psutil.Process().children()}

        async def report(told: Report) -> None:
            nonlocal left
            if isinstance(told, Metrics):
                if "validation_loss" in told.values:
                    ended.setdefault(told.progress.epoch, time.monotonic())
                elif left is not None and told.progress.epoch >= at_epoch:
                    (agent,) = {child.pid for child in psutil.Process().children()} - before
                    ended.clear()
                    ended[told.progress.epoch] = time.monotonic()
                    left(agent)
                    left = None
                if epochs in ended:
                    stop.set()

        while not stop.is_set():
            # A dead agent: the service begins another attempt (it waits for a second first).
            await self._backend.run(asked, report=report, stop=stop, pause=asyncio.Event())
        return Run(began=began, epochs=ended)


async def plain(
    folder: Path, asked: TrainingTask, environ: Mapping[str, str], *, kill: Callable[[int], None] | None = None
) -> Run:
    """The plain script under torchrun."""
    prepare(folder, asked)
    began, ended = time.monotonic(), dict[int, float]()
    command = ("torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3", "--rdzv-backend=c10d")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command, "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *(str(SCRIPT), str(folder)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
        env={**environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            told = json.loads(line)
            ended.setdefault(told["epoch"], told["time"])
            if kill is not None and told["epoch"] == 2:
                ended = {told["epoch"]: time.monotonic()}
                kill(process.pid)
                kill = None
        await process.wait()
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.returncode is None else []:
            child.kill()
    return Run(began=began, epochs=ended)


def kill_worker(agent: int) -> None:
    """kill -9 of the last worker: what the agent started, or what the server that it started forked."""
    scripts = [child for child in psutil.Process(agent).children() if SCRIPT.name in " ".join(child.cmdline())]
    forked = [worker for child in psutil.Process(agent).children() for worker in child.children()]
    os.kill(max(child.pid for child in scripts or forked), signal.SIGKILL)


def kill_agent(agent: int) -> None:
    """kill -9 of the agent."""
    os.kill(agent, signal.SIGKILL)


def recovery_s(run: Run) -> float:
    """From the kill to the end of the first epoch after it."""
    first, second = sorted(run.epochs.values())[:2]
    return second - first


async def measure(rounds: int, epochs: int) -> dict[str, Any]:
    """Rounds of both sides in turn, then the kills."""
    environ = trainer_environment(os.environ)
    ours: list[Run] = []
    theirs: list[Run] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with Executors({"disk": 2}) as executors, asyncio.timeout(RUN_S_MAX * (2 * rounds + 3)):
            service = Service(folder / "jobs", executors["disk"], environ)
            for number in range(rounds):
                for side in ("ours", "plain") if number % 2 else ("plain", "ours"):
                    if side == "ours":
                        ours.append(await service.run(task(f"round-{number}", epochs=epochs)))
                    else:
                        theirs.append(await plain(folder / f"plain-{number}", task("plain", epochs=epochs), environ))
            worker = await service.run(task("worker", epochs=epochs), kill=kill_worker)
            agent = await service.run(task("agent", epochs=epochs), kill=kill_agent)
            torchrun = await plain(folder / "kill", task("plain", epochs=epochs), environ, kill=kill_worker)
    return {
        "rounds": rounds,
        "epochs": epochs,
        "examples_per_s": {
            "service": statistics.median(run.examples_per_s for run in ours),
            "torchrun": statistics.median(run.examples_per_s for run in theirs),
            "ratio": ratio_of_medians([run.examples_per_s for run in ours], [run.examples_per_s for run in theirs]),
        },
        "until_fitted_s": {
            "service": statistics.median(run.fitted_s for run in ours),
            "torchrun": statistics.median(run.fitted_s for run in theirs),
            "ratio": ratio_of_medians([run.fitted_s for run in ours], [run.fitted_s for run in theirs]),
        },
        "trains_again_after_s": {
            "service, worker killed": recovery_s(worker),
            "service, agent killed": recovery_s(agent),
            "torchrun, worker killed": recovery_s(torchrun) if len(torchrun.epochs) > 1 else None,
        },
    }


def main(argv: list[str]) -> None:
    """Measure, write JSON, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training-ddp", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    results = asyncio.run(measure(arguments.rounds, arguments.epochs))
    write_results(arguments.out, results)
    table = Table("", "service", "torchrun", "ratio")
    for name in ("examples_per_s", "until_fitted_s"):
        row = results[name]
        table.add_row(name, f"{row['service']:.5g}", f"{row['torchrun']:.5g}", f"{row['ratio']:.2f}")
    Console().print(table)
    for name, seconds in results["trains_again_after_s"].items():
        Console().print(f"{name}: trains again after {'never' if seconds is None else f'{seconds:.1f} s'}")
