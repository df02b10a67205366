"""Jobs of several processes, killed, paused and hung in many ways: they end with the weights of an undisturbed one."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

torch = pytest.importorskip("torch")

from mlmesh_runtime.executors import Executors  # noqa: E402
from mlmesh_training.backends.base import Died, Finished, Outcome, Paused, Report, TrainingTask  # noqa: E402
from mlmesh_training.backends.local import LocalBackend, LocalLimits  # noqa: E402
from mlmesh_training.jobs import Checkpoint, LogLine, Metrics  # noqa: E402
from mlmesh_training.options import Distribution, EarlyStopping, FitOptions, Strategy  # noqa: E402
from mlmesh_training.trainer import checkpoint  # noqa: E402
from tests.support import dying_worker, fitting_group  # noqa: E402
from tests.support.fitting import same  # noqa: E402
from tests.support.fitting_group import job  # noqa: E402
from tests.support.training import alive, becomes, children  # noqa: E402

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(600)


class Attempt:
    """One attempt of a job, which the test disturbs at reports."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend
        self.reports: list[Report] = []
        self.pause = asyncio.Event()
        self.trainer = 0
        self.workers: list[int] = []
        self._disturb: Iterator[Callable[[Report], bool]] = iter(())
        self._next: Callable[[Report], bool] | None = None

    async def __call__(self, asked: TrainingTask, *disturb: Callable[[Report], bool]) -> Outcome:
        """Run it; each of `disturb` is called at each report until it says that it has done its work."""
        before = set(children(os.getpid()))
        self._disturb = iter(disturb)
        self._next = next(self._disturb, None)

        async def report(told: Report) -> None:
            self.reports.append(told)
            self.trainer = next(iter(set(children(os.getpid())) - before), 0)
            if self._next is not None and self._next(told):
                self._next = next(self._disturb, None)

        async with asyncio.timeout(180):
            outcome = await self._backend.run(asked, report=report, stop=asyncio.Event(), pause=self.pause)
        assert self._next is None, "all that was planned has happened"
        for pid in (self.trainer, *self.workers) if self.workers else ():
            await becomes(lambda pid=pid: not alive(pid))
        return outcome

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a worker."""
        self.workers = workers(self.trainer)
        os.kill(self.workers[rank], number)

    def checkpoints(self) -> list[int]:
        """Steps after which there was one."""
        return [report.progress.step for report in self.reports if isinstance(report, Checkpoint)]

    def lines(self) -> list[str]:
        """Log lines."""
        return [report.message for report in self.reports if isinstance(report, LogLine)]


def workers(trainer: int) -> list[int]:
    """Workers by rank: what the server forked that the trainer started."""
    found = []
    for child in psutil.Process(trainer).children():
        found += [each.pid for each in child.children()]
    return sorted(found)


def between_checkpoints(report: Report, *, after: int) -> bool:
    """Whether the fitting is within an epoch, some steps behind a checkpoint."""
    return isinstance(report, Checkpoint) and report.progress.step >= after and report.progress.step % 6 != 0


def learnt(backend: LocalBackend, asked: TrainingTask) -> dict[str, Any]:
    """The state that the job ended with."""
    state = checkpoint.load(next(checkpoint.stored(backend.folder(asked.uid))))
    assert state is not None
    assert state["done"]
    return state


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., LocalBackend]]:
    async with Executors({"disk": 2}) as executors:

        def backend(
            *, pace_s: float = 0.0, name: str = "jobs", environ: Mapping[str, str] | None = None, **limits: float
        ) -> LocalBackend:
            return LocalBackend(
                tmp_path / name,
                executor=executors["disk"],
                environ={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "PYTHONUNBUFFERED": "1",
                    dying_worker.PACE: str(pace_s),
                    **(environ or {}),
                },
                limits=LocalLimits(**limits),  # type: ignore[arg-type]
                command=(sys.executable, "-m", "tests.support.dying_trainer"),
            )

        yield backend


async def test_a_ddp_job_survives_kills_a_pause_and_a_process_that_hangs(make: Callable[..., LocalBackend]) -> None:
    asked, backend = job("disturbed", Strategy.DDP), make(pace_s=0.1, collective_s=6.0)
    first = Attempt(backend)

    def kill_a_worker(report: Report) -> bool:
        if due := between_checkpoints(report, after=5):
            assert listening(workers(first.trainer)) <= {"127.0.0.1"}
            first.kill(1)
        return due

    def pause(report: Report) -> bool:
        # Only after the restart: the new workers have said where they go on.
        if due := isinstance(report, LogLine) and "resumed after" in report.message:
            first.pause.set()
        return due

    assert await first(asked, kill_a_worker, pause) == Paused()
    (killed,) = [line for line in first.lines() if "start again" in line]
    assert killed.startswith("rank 1: its process was ended by SIGKILL; all processes start again from the last")

    second = Attempt(backend)

    def kill_the_agent(report: Report) -> bool:
        if due := isinstance(report, Metrics):
            second.workers = workers(second.trainer)
            os.kill(second.trainer, signal.SIGKILL)
        return due

    assert await second(asked, kill_the_agent) == Died(reason="its process was ended by SIGKILL")

    third = Attempt(backend)

    def hang(report: Report) -> bool:
        if due := isinstance(report, LogLine) and "resumed after" in report.message:
            third.kill(0, signal.SIGSTOP)
        return due

    outcome = await third(asked, hang)
    assert isinstance(outcome, Finished), (outcome, third.lines())
    (hung,) = [line for line in third.lines() if "start again" in line]
    assert "another process has not answered for 6 s; all processes start again" in hung

    assert same(learnt(backend, asked), fitting_group.found()["DDP job"])
    assert not [name for name in os.listdir("/dev/shm") if "disturbed" in name]
    assert not (backend.folder(asked.uid) / "workers").exists()


async def test_an_fsdp_job_whose_workers_die_within_checkpoints(make: Callable[..., LocalBackend]) -> None:
    asked, backend = job("dying", Strategy.FSDP2), make()
    plan = backend.folder(asked.uid) / dying_worker.DEATHS
    plan.parent.mkdir(parents=True)
    plan.write_text("2 0 0 0")
    first = Attempt(backend)
    gave_up = await first(asked)
    assert gave_up == Died(reason="rank 0: its process was ended by SIGKILL; gave up after 3 restarts")
    assert len([line for line in first.lines() if "start again" in line]) == 3
    assert plan.read_text() == ""

    second = Attempt(backend)
    assert isinstance(await second(asked), Finished)
    assert "resumed after epoch 1, step 10" in second.lines()
    assert first.checkpoints() + second.checkpoints() == [5, 10, 15, 20, 24], "none is told before it is whole"
    assert same(learnt(backend, asked), fitting_group.found()["FSDP2 job"])


async def test_workers_of_two_machines_meet_and_say_why_they_cannot_go_on(make: Callable[..., LocalBackend]) -> None:
    """Two agents of one worker each, as Kubeflow Trainer starts them in two pods."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    attempts = [Attempt(make(name=f"pod-{n}", environ={**told, "PET_NODE_RANK": str(n)})) for n in range(2)]
    asked = dataclasses.replace(
        job("several", Strategy.DDP),
        distribution=Distribution(processes=2, nodes=2),
        fit=FitOptions(checkpoint_steps=5, early_stopping=EarlyStopping(metric="f1")),
    )
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(attempt(asked)) for attempt in attempts]
    for outcome in (each.result() for each in running):
        assert isinstance(outcome, Died), outcome
        assert outcome.permanent, "another attempt would end in the same way"
        assert "early stopping watches 'f1', which is not measured" in outcome.reason
    assert [attempt.checkpoints() for attempt in attempts] == [[5], []], "the first reports and writes for all"
    assert not any("start again" in line for attempt in attempts for line in attempt.lines())


def listening(pids: list[int]) -> set[str]:
    """Addresses on which these processes listen."""
    found = set()
    for pid in pids:
        for each in psutil.Process(pid).net_connections(kind="inet"):
            if each.status == psutil.CONN_LISTEN:
                found.add(each.laddr.ip)
    return found
