"""The local backend with small programs in the trainer's place: whatever a process does, it ends with its attempt."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mlmesh_runtime.executors import Executors
from mlmesh_training.backends.base import Died, Finished, Outcome, Paused, Report, Stopped, TrainingTask
from mlmesh_training.backends.local import LocalBackend, LocalLimits
from mlmesh_training.jobs import LOG_LINE_BYTES_MAX, JobPhase, LogLine
from tests.support.training import alive, becomes, children

TASK = TrainingTask(uid="cnn-digits-1", recipe="cnn", dataset="digits", hyperparameters={"epochs": 1.0}, seed=1)

PRELUDE = """
import argparse, json, os, signal, subprocess, sys, time, pathlib
p = argparse.ArgumentParser()
p.add_argument("--report-fd")
p.add_argument("--parent")
p.add_argument("--preload", action="store_true")
a = p.parse_args()
print("preloaded") if a.preload else None
a.folder = json.loads(sys.stdin.readline() or sys.exit(0))["folder"]
pipe = os.fdopen(int(a.report_fd), "wb", buffering=0)
def tell(kind, **value):
    pipe.write(json.dumps({"kind": kind, "value": value}).encode() + b"\\n")
def here():
    tell("phase", phase="TRAINING")
"""

Make = Callable[..., LocalBackend]


class Listener:
    """Collects reports; `begun` is set by the first of the process itself."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.begun = asyncio.Event()

    async def __call__(self, report: Report) -> None:
        if report is not JobPhase.LOADING_DATA:
            self.reports.append(report)
            self.begun.set()

    def lines(self) -> list[str]:
        return [report.message for report in self.reports if isinstance(report, LogLine)]


Started = Callable[[], list[int]]


@pytest.fixture
def started() -> Started:
    """Children of this process that the test started; fixtures of wider scope may have some of their own."""
    before = set(children(os.getpid()))
    return lambda: [child for child in children(os.getpid()) if child not in before]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    async with Executors({"disk": 2}) as executors:

        def backend(program: str, **limits: float) -> LocalBackend:
            script = tmp_path / "trainer.py"
            script.write_text(PRELUDE + textwrap.dedent(program))
            return LocalBackend(
                tmp_path / "jobs",
                executor=executors["disk"],
                environ=dict(os.environ),
                limits=LocalLimits(**{"stop_grace_s": 0.2, **limits}),  # type: ignore[arg-type]
                command=(sys.executable, "-u", str(script)),
            )

        yield backend


async def attempt(backend: LocalBackend, listener: Listener | None = None) -> Outcome:
    async with asyncio.timeout(20):
        return await backend.run(TASK, report=listener or Listener(), stop=asyncio.Event(), pause=asyncio.Event())


async def test_exit_codes_and_signals_are_told_with_the_last_words(make: Make) -> None:
    assert await attempt(make('print("out of luck"); sys.exit(3)')) == Died(
        reason="its process ended with exit code 3: out of luck"
    )
    assert await attempt(make("os.kill(os.getpid(), signal.SIGKILL)")) == Died(
        reason="its process was ended by SIGKILL"
    )
    assert await attempt(make('tell("died", reason="no luck", permanent=True); sys.exit(1)')) == Died(
        reason="no luck", permanent=True
    )


@pytest.mark.parametrize(
    "leave",
    [
        "pass",
        '(pathlib.Path(a.folder) / "result.json").write_text("{}")',
        '(pathlib.Path(a.folder) / "result.json").write_text("{ torn")',
        '(pathlib.Path(a.folder) / "result.json").write_bytes(b"\\xff")',
    ],
)
async def test_a_process_that_ends_well_without_a_result_has_died(make: Make, leave: str) -> None:
    outcome = await attempt(make(leave))
    assert isinstance(outcome, Died)
    assert "no usable result" in outcome.reason


async def test_a_result_whose_files_are_not_as_announced_is_refused(make: Make) -> None:
    program = """
    file = {"path": "model.onnx", "sha256": "00" * 32, "size_bytes": 3, "media_type": ""}
    evaluation = {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "loss": 0, "labels": [], "confusion": [],
                  "examples": 0, "export_max_abs_diff": 0}
    (pathlib.Path(a.folder) / "model.onnx").write_bytes(b"abc")
    (pathlib.Path(a.folder) / "result.json").write_text(json.dumps({
        "files": [file], "inputs": [], "outputs": [], "evaluation": evaluation, "labels": {},
        "dataset_fingerprint": "", "code_digest": "", "environment_digest": ""}))
    """
    outcome = await attempt(make(program))
    assert isinstance(outcome, Died)
    assert "model.onnx is not what was exported" in outcome.reason
    right = program.replace('"00" * 32', '__import__("hashlib").sha256(b"abc").hexdigest()')
    assert isinstance(await attempt(make(right)), Finished)


async def test_reports_and_prints_arrive_in_order_and_garbage_is_only_noted(make: Make) -> None:
    program = """
    print("hello")
    print("to stderr", file=sys.stderr)
    here()
    pipe.write(b"not json\\n")
    pipe.write(b'{"kind": "job", "value": {}}\\n')
    tell("phase", phase="EVALUATING")
    print("no newline", end="")
    """
    listener = Listener()
    await attempt(make(program), listener)
    phases = [report for report in listener.reports if isinstance(report, JobPhase)]
    assert phases == [JobPhase.TRAINING, JobPhase.EVALUATING]
    lines = listener.lines()
    assert [line for line in lines if "unreadable" not in line] == ["hello", "to stderr", "no newline"]
    assert len([line for line in lines if "unreadable" in line]) == 2


async def test_a_flood_of_prints_is_bounded(make: Make) -> None:
    listener = Listener()
    await attempt(make('print("x" * 1_000_000)\nfor i in range(5000): print(i)', log_lines_max=100), listener)
    lines = listener.lines()
    assert len(lines) == 100
    assert max(len(line) for line in lines) <= LOG_LINE_BYTES_MAX
    assert "dropped" in lines[-1]


async def test_a_slow_ledger_slows_the_process_instead_of_filling_memory(make: Make) -> None:
    released = asyncio.Event()
    seen: list[Report] = []

    async def report(report: Report) -> None:
        if report is not JobPhase.LOADING_DATA:
            await released.wait()
            seen.append(report)

    program = """
    for number in range(20_000):
        here()
    (pathlib.Path(a.folder) / "through").touch()
    """
    backend = make(program)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(backend.run(TASK, report=report, stop=asyncio.Event(), pause=asyncio.Event()))
        await asyncio.sleep(0.5)  # time in which an unbounded pipe would have taken everything
        assert not (backend.folder(TASK.uid) / "through").exists()
        released.set()
        await running
    assert len(seen) == 20_000


async def test_stopping_asks_first_and_then_insists(make: Make, started: Started) -> None:
    for program, polite in (
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); here(); time.sleep(60)", True),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); here(); time.sleep(60)", False),
    ):
        listener, stop = Listener(), asyncio.Event()
        backend = make(program, stop_grace_s=0.3 if not polite else 60.0)
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            running = group.create_task(backend.run(TASK, report=listener, stop=stop, pause=asyncio.Event()))
            await listener.begun.wait()
            stop.set()
        assert running.result() == Stopped()
        assert started() == []


PAUSABLE = """
signal.signal(signal.SIGUSR1, lambda *_: sys.exit({code}))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
here()
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (PAUSABLE.format(code=75), Paused()),
        # It has been asked before it could listen: what it had done is in a checkpoint or nowhere.
        ("here(); time.sleep(60)", Paused()),
        (PAUSABLE.format(code=1), Died(reason="its process ended with exit code 1")),
    ],
)
async def test_pausing_asks_the_process_alone_and_nothing_of_it_is_left(
    make: Make, started: Started, program: str, expected: Outcome
) -> None:
    listener, pause = Listener(), asyncio.Event()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(make(program).run(TASK, report=listener, stop=asyncio.Event(), pause=pause))
        await listener.begun.wait()
        pause.set()
    assert running.result() == expected
    assert started() == []


async def test_a_process_that_pauses_unasked_has_died(make: Make) -> None:
    assert isinstance(await attempt(make("sys.exit(75)")), Died)


async def test_stopping_overrides_pausing(make: Make) -> None:
    listener, stop, pause = Listener(), asyncio.Event(), asyncio.Event()
    program = "signal.signal(signal.SIGUSR1, lambda *_: tell('phase', phase='EVALUATING')); here(); time.sleep(60)"
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        running = group.create_task(make(program).run(TASK, report=listener, stop=stop, pause=pause))
        await listener.begun.wait()
        pause.set()
        await becomes(lambda: JobPhase.EVALUATING in listener.reports)
        stop.set()
    assert running.result() == Stopped()


async def test_a_process_that_says_nothing_hangs_and_is_ended(make: Make) -> None:
    outcome = await attempt(make("here(); os.kill(os.getpid(), signal.SIGSTOP)", silence_s_max=0.5))
    assert isinstance(outcome, Died)
    assert "silent" in outcome.reason


async def test_what_a_process_started_ends_with_it(make: Make) -> None:
    program = """
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (pathlib.Path(a.folder) / "child").write_text(str(child.pid))
    here()
    os._exit(1)
    """
    backend = make(program)
    await attempt(backend)
    child = int((backend.folder(TASK.uid) / "child").read_text())
    # It was killed; the kernel may still be taking it apart.
    await becomes(lambda: not alive(child))


@pytest.mark.parametrize("cut", ["cancelled", "report fails"])
async def test_however_an_attempt_is_left_nothing_of_it_runs(make: Make, cut: str) -> None:
    program = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (pathlib.Path(a.folder) / "pid").write_text(str(os.getpid()))
    here()
    time.sleep(60)
    """
    backend, begun = make(program), asyncio.Event()

    async def report(report: Report) -> None:
        if report is JobPhase.TRAINING:
            begun.set()
            if cut == "report fails":
                raise OSError("the ledger is gone")

    async with asyncio.timeout(10):
        running = asyncio.ensure_future(backend.run(TASK, report=report, stop=asyncio.Event(), pause=asyncio.Event()))
        await begun.wait()
        if cut == "cancelled":
            running.cancel()
        with pytest.raises((asyncio.CancelledError, ExceptionGroup)):
            await running
    assert not alive(int((backend.folder(TASK.uid) / "pid").read_text()))


async def test_a_folder_that_cannot_be_written_is_the_attempts_end(make: Make, tmp_path: Path) -> None:
    backend = make("pass")
    (tmp_path / "jobs").write_text("in the way")
    outcome = await attempt(backend)
    assert isinstance(outcome, Died)
    assert "cannot write" in outcome.reason


async def test_a_warm_process_takes_the_next_attempt_and_never_a_second_one(make: Make, started: Started) -> None:
    program = """
    here()
    print("I am", os.getpid(), a.preload)
    """
    listener, second = Listener(), Listener()
    async with make(program, warm=True) as backend:
        (warm,) = started()
        await attempt(backend, listener)
        assert f"I am {warm} True" in listener.lines()
        (next_one,) = started()
        assert next_one != warm
        await attempt(backend, second)
        assert f"I am {next_one} True" in second.lines()
    assert started() == []


async def test_a_warm_process_that_died_is_not_missed(make: Make, started: Started) -> None:
    listener = Listener()
    async with make("here(); print(a.preload)", warm=True) as backend:
        (warm,) = started()
        os.kill(warm, signal.SIGKILL)
        async with asyncio.timeout(10):
            assert backend._warm is not None
            await backend._warm.process.wait()
        await attempt(backend, listener)
    assert listener.lines() == ["False"]


async def test_discarding_twice_is_fine(make: Make) -> None:
    backend = make("pass")
    await attempt(backend)
    assert await backend.kept() == [TASK.uid]
    await backend.discard(TASK.uid)
    await backend.discard(TASK.uid)
    assert await backend.kept() == []
