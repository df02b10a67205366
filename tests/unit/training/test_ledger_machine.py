"""Whatever is asked of jobs in whatever order, across restarts: the ledger's histories are what the contract says."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from mlmesh_runtime.errors import Conflict, NotFound, Overloaded, WrongState
from mlmesh_training import jobs, moves
from mlmesh_training.jobs import Checkpoint, Event, Job, JobChanged, JobState, LogLine, Metrics, Progress
from mlmesh_training.ledger import LedgerLimits, SqlJobLedger
from mlmesh_training.options import Resources
from mlmesh_training.schedule import Capacity, choose
from tests.support.queues import migrated
from tests.support.training import PUBLICATION, ManualClock, job, model, spec

CAPACITY = Capacity(total=Resources(cpus=2.0, memory_bytes=100), jobs_max=2)
HELD_MAX = 4
REQUESTS = ("pause_requested", "resume_requested", "retry_requested", "cancel_requested")
# What the runner and its processes do with a job that is theirs.
WORK = {
    "measured": lambda job, now: moves.measured(moves.ran(job, job.run_s + 1), Metrics(progress=Progress(), values={})),
    "checkpointed": lambda job, now: moves.checkpointed(job, Checkpoint(progress=Progress(epoch=1), sha256="00")),
    "logged": lambda job, now: moves.logged(job, LogLine(severity="info", message="x")),
    "trained": lambda job, now: moves.trained(job, model(), now),
    "died": lambda job, now: moves.process_died(job, "SIGKILL", now),
    "diverged": lambda job, now: moves.failed(job, "nan", now, charged=True),
    "late": lambda job, now: moves.time_ran_out(job, 1.0, now),
    "stopped": moves.paused,
}
# What only makes sense once there is a model to publish.
PUBLISH = {
    "registration_begun": lambda job, now: moves.registration_begun(job),
    "registered": lambda job, now: moves.registered(job, "models/digits/versions/1"),
    "succeeded": moves.succeeded,
    "refused": lambda job, now: moves.failed(job, "denied", now),
    "stopped": moves.paused,
}


class Ledger(RuleBasedStateMachine):
    """Clients ask, the runner works, the service restarts; `seen` is what a watcher of each job has read so far."""

    names = Bundle("names")

    @initialize()
    def opens(self) -> None:
        # In memory, where there is such a place: what a flush costs is not what is tested here.
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.clock = ManualClock()
        self.numbers = itertools.count()
        self.seen: dict[str, list[Event]] = {}
        self.gone: set[str] = set()
        (Path(self.folder.name) / "l.sqlite").write_bytes(migrated())
        self.ledger = self._open()

    def _open(self) -> SqlJobLedger:
        return SqlJobLedger(
            f"sqlite:///{Path(self.folder.name) / 'l.sqlite'}",
            clock=self.clock,
            limits=LedgerLimits(queued_jobs_max=HELD_MAX),
        )

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            self.folder.cleanup()

    @rule(target=names, publish=st.booleans(), priority=st.integers(-1, 1), retries=st.integers(-1, 1))
    def submit(self, publish: bool, priority: int, retries: int) -> str:
        number = next(self.numbers)
        asked = spec(publication=PUBLICATION if publish else None, priority=priority, retries_max=retries)
        held = self._count(JobState.QUEUED, JobState.PAUSED)
        try:
            stored = self.ledger.create(job(f"j{number}", spec=asked), request_id=f"r{number}")
        except Overloaded:
            assert held >= HELD_MAX
            return "none"
        assert held < HELD_MAX
        # Asked again, it is the same job, as it first was, whatever happened to it since.
        assert self.ledger.create(job("other", spec=asked), request_id=f"r{number}") == stored
        self.seen[stored.uid] = []
        return stored.uid

    @rule(name=names, request=st.sampled_from(REQUESTS))
    def ask(self, name: str, request: str) -> None:
        self._change(name, getattr(moves, request))

    @rule()
    def choose(self) -> None:
        running = [Resources(cpus=1.0, memory_bytes=50)] * self._count(JobState.RUNNING, JobState.PAUSING)
        choice = self.ledger.choose(lambda waiting: choose(waiting, running, CAPACITY), excluding=())
        if choice is not None:
            before = self.ledger.get(choice.job.uid)
            assert before.state in jobs.WAITING
            assert choice.job.light == (before.trained is not None)
            begin: Any = (lambda job, now: moves.publishing_resumed(job)) if choice.job.light else moves.started
            assert self._change(choice.job.uid, begin)

    @rule(name=names, did=st.sampled_from(sorted(WORK)), publishing=st.sampled_from(sorted(PUBLISH)))
    def work(self, name: str, did: str, publishing: str) -> None:
        if name not in self.seen:
            return
        now = self.ledger.get(name)
        if now.state in {JobState.RUNNING, JobState.PAUSING, JobState.CANCELLING}:
            step = PUBLISH[publishing] if now.trained else WORK[did]
            if publishing == "stopped" and now.trained and now.registering:
                return  # The runner does not stop a registration.
            if publishing == "succeeded" and now.trained and not now.model_version:
                return
            self._change(name, step)

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.ledger = self._open()
        for found in self.ledger.unfinished():
            self._change(found.uid, moves.interrupted)

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name not in self.seen:
            return
        ended = self.ledger.get(name).final
        try:
            self.ledger.expiry.delete(name)
        except WrongState:
            assert not ended
            return
        assert ended
        del self.seen[name]
        self.gone.add(name)

    @rule()
    def bury(self) -> None:
        found = self.ledger.expiry.doomed()
        if found is not None:
            assert found[1] in self.gone
            self.ledger.expiry.drop_events(found[0], limit=3)

    @rule()
    def lists_agree(self) -> None:
        everything, _ = self.ledger.page(size=1000)
        assert {found.uid for found in everything} == set(self.seen)
        for state in JobState:
            listed, _ = self.ledger.page(size=1000, states=[state])
            assert listed == [found for found in everything if found.state is state]
        queued = sorted(
            (found for found in everything if found.state is JobState.QUEUED), key=lambda found: found.queue_position
        )
        assert [found.queue_position for found in queued] == list(range(len(queued)))
        assert [found.spec.priority for found in queued] == sorted((f.spec.priority for f in queued), reverse=True)
        for name in self.gone:
            with pytest.raises(NotFound):
                self.ledger.get(name)

    @invariant()
    def watchers_miss_nothing(self) -> None:
        for name, seen in getattr(self, "seen", {}).items():
            start = seen[-1].sequence + 1 if seen else 0
            found, ended = self.ledger.events(name, from_sequence=start, limit=1000)
            seen.extend(found)
            now = self.ledger.get(name)
            assert [event.sequence for event in seen] == list(range(1, now.last_sequence + 1))
            assert ended == now.final
            told = [event.body.job for event in seen if isinstance(event.body, JobChanged) and event.body.job]
            for before, after in itertools.pairwise(told):
                assert after.state is before.state or after.state in jobs.LEGAL[before.state]
                assert after.attempts >= before.attempts
                assert after.run_s >= before.run_s
                assert after.history[: len(before.history)] == before.history
            assert (told[-1].state, told[-1].phase) == (now.state, now.phase)
            since = max((e.sequence for e in seen if _retried(e)), default=0)
            assert sum(a.charged for a in now.history) >= now.failures
            if not since:
                assert sum(a.charged for a in now.history) == now.failures

    def _change(self, name: str, decide: Any) -> bool:
        if name not in self.seen:
            return False
        before = self.ledger.get(name)
        with contextlib.suppress(WrongState, Conflict, Overloaded):
            after = self.ledger.change(name, decide)
            assert self.ledger.get(name) == after
            return True
        # What was refused changed nothing.
        assert self.ledger.get(name) == before
        return False

    def _count(self, *states: JobState) -> int:
        return len(self.ledger.page(size=1000, states=states)[0])


def _retried(event: Event) -> bool:
    return isinstance(event.body, LogLine) and "put back" in event.body.message


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=10, stateful_step_count=40, deadline=None)


def test_a_history_reads_as_the_job(tmp_path: Path) -> None:
    """The machine above compares what it can; this is one whole life, spelled out."""
    ledger = SqlJobLedger(f"sqlite:///{tmp_path / 'l.sqlite'}", clock=ManualClock())
    ledger.migrate()
    ledger.create(job("a", spec=spec(retries_max=-1)))
    decisions = [
        moves.started,
        moves.pause_requested,
        moves.paused,
        moves.resume_requested,
        moves.started,
        lambda job, now: moves.process_died(job, "boom", now),
        moves.retry_requested,
        moves.started,
        moves.succeeded,
    ]
    for decide in decisions:
        ledger.change("a", decide)
    events, ended = ledger.events("a", from_sequence=0, limit=100)
    told: list[Job] = [event.body.job for event in events if isinstance(event.body, JobChanged) and event.body.job]
    assert [found.state for found in told] == [
        *(JobState.QUEUED, JobState.RUNNING, JobState.PAUSING, JobState.PAUSED, JobState.QUEUED),
        *(JobState.RUNNING, JobState.FAILED, JobState.QUEUED, JobState.RUNNING, JobState.SUCCEEDED),
    ]
    assert ended
    ledger.close()
