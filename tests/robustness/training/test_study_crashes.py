"""The service dies at any commit of a study, again and again, and goes on: no trial is lost, none is doubled."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.jobs import Job
from mlmesh_training.studies.book import StudyBook
from mlmesh_training.studies.study import Counts, Pruner, Recorded, Study, StudyChanged, TrialChanged
from tests.support.studies import study_spec
from tests.support.studies_service import SUCCEEDED, Crash, Registry, Service, Trainer, serving
from tests.support.training import PUBLICATION

WORSE = 0.25
# One trial is bad, so that there is something to give up; one after another, so that every run is the same run.
SPEC = study_spec(
    trials_max=4, pruner=Pruner.MEDIAN, job={"publication": PUBLICATION, "hyperparameters": {"epochs": 3.0}}, seed=0
)
NEVER = 10**9

Found = tuple[Study, list[Recorded], list[Job]]


def value(task: TrainingTask, epoch: int) -> float:
    return 0.5 - abs(task.hyperparameters["learning_rate"] - 0.01) * 4 + epoch / 1000


def bad(task: TrainingTask, epoch: int) -> bool:
    """Whether the trial is worse than the median of the others, so that it waits to be stopped."""
    return value(task, epoch) < WORSE


async def told(service: Service) -> Found:
    """What is known of the study once it has ended; asking for it again is the same study."""
    uid = (await service.book.create(SPEC, request_id="once")).uid
    study = await service.end(uid)
    _, history = await service.book.history(uid)
    jobs, _ = await service.queue.page(size=1000, before=None)
    await check_events(service.book, study, history)
    return study, list(history), list(jobs)


async def lived(folder: Path, registry: Registry, crash: Crash) -> Found | None:
    """What was told; None when the service died before."""
    trainer = Trainer(value, lingers=bad)
    async with serving(folder, trainer=trainer, registry=registry, crash=crash) as service, asyncio.timeout(30):
        dying, living = asyncio.create_task(crash.happened.wait()), asyncio.create_task(told(service))
        await asyncio.wait([dying, living], return_when=asyncio.FIRST_COMPLETED)
        if crash.happened.is_set():
            living.cancel()
        dying.cancel()
        await asyncio.gather(dying, living, return_exceptions=True)
    return None if crash.happened.is_set() else living.result()


async def check_events(book: StudyBook, study: Study, history: Sequence[Recorded]) -> None:
    """Sequences without gap; each epoch of each trial told once; at the end all is as it is read."""
    events = [event async for event in book.watch(study.uid)]
    assert [event.sequence for event in events] == list(range(1, study.last_sequence + 1))
    last = events[-1].body
    assert isinstance(last, StudyChanged)
    assert last.study == study
    epochs: dict[int, list[int]] = {}
    for event in events:
        if isinstance(event.body, TrialChanged) and event.body.trial is not None:
            epochs.setdefault(event.body.trial.number, []).append(event.body.trial.epoch)
    assert sorted(epochs) == [recorded.trial.number for recorded in history]
    for seen in epochs.values():
        # The end of a trial repeats its last epoch.
        assert seen == [*range(len(seen) - 1), len(seen) - 2]


def likeness(history: Sequence[Recorded]) -> list[tuple[object, ...]]:
    """What must be the same whenever the service died."""
    return [(each.trial.number, each.trial.state, each.trial.hyperparameters, each.values) for each in history]


async def test_killed_at_any_commit_it_is_the_same_study_with_the_same_trials(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    counting = Crash(after=NEVER)
    whole = await lived(tmp_path / "whole", Registry(), counting)
    assert whole is not None
    assert whole[0].state is SUCCEEDED
    assert whole[0].counts == Counts(complete=3, pruned=1)
    deaths = 0
    # Every third: each kind of step is among them.
    for after in range(0, counting.committed, 3):
        folder, registry = tmp_path / f"cut-{after}", Registry()
        folder.mkdir()
        found = None
        # It dies, dies again soon after it was started again, and then lives.
        for crash in (Crash(after=after), Crash(after=after % 7), Crash(after=NEVER)):
            found = found or await lived(folder, registry, crash)
            deaths += crash.happened.is_set()
        assert found is not None
        study, history, jobs = found
        assert likeness(history) == likeness(whole[1])
        assert study.best is not None
        assert whole[0].best is not None
        assert (study.best.number, study.best.value) == (whole[0].best.number, whole[0].best.value)
        # Each trial once, each with one job, and no job without its trial.
        assert [recorded.trial.number for recorded in history] == [0, 1, 2, 3]
        assert sorted(recorded.trial.job for recorded in history) == sorted(job.uid for job in jobs)
        assert list(registry.versions) == [study.best.job]
        assert registry.aliases == {"stable": study.model_version}
    assert deaths > counting.committed // 3
