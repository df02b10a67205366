"""Studies run to their end with real jobs of a scripted training: in order, at once, pruned, stopped, published."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from mlmesh_runtime.errors import Denied, InvalidInput, NotReady, WrongState
from mlmesh_training.backends.base import Died, Outcome, TrainingTask
from mlmesh_training.jobs import JobState, LogLine
from mlmesh_training.options import Resources
from mlmesh_training.studies.space import Dimension
from mlmesh_training.studies.study import Counts, Pruner, Sampler, StudyState, TrialState
from tests.support.studies import study_spec
from tests.support.studies_service import FAILED, STOPPED, SUCCEEDED, Registry, Trainer, serving
from tests.support.training import PUBLICATION, becomes

WIDTHS = (Dimension(name="width", values=(8.0, 16.0, 32.0, 64.0)),)
GRID = {"sampler": Sampler.GRID, "dimensions": WIDTHS, "trials_max": 0}
PUBLISHED = {"job": {"publication": PUBLICATION}}


async def test_every_trial_is_a_job_and_the_best_is_published_once_with_the_studys_figures(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        accepted = await service.book.create(study_spec(**GRID, **PUBLISHED), creator="spiffe://x/ns/y/sa/z")
        done = await service.end(accepted.uid)
        trials = await service.trials(done.uid)
        jobs = {job.uid: job for job in (await service.queue.page(size=100, before=None))[0]}
        await asyncio.sleep(0)
        assert (done.state, done.counts) == (SUCCEEDED, Counts(complete=4))
        assert [trial.number for trial in trials] == [0, 1, 2, 3]
        assert {trial.job for trial in trials} == set(jobs)
        assert sorted(trial.hyperparameters["width"] for trial in trials) == [8.0, 16.0, 32.0, 64.0]
        for trial in trials:
            job = jobs[trial.job]
            assert (job.study, job.creator, job.spec.publication) == (done.name, "spiffe://x/ns/y/sa/z", None)
            assert job.hyperparameters["width"] == trial.hyperparameters["width"]
            assert trial.value == pytest.approx(0.502 + trial.hyperparameters["width"] / 100)
        assert done.best is not None
        assert done.best.hyperparameters == {"width": 64.0}
        (name, published) = service.registry.versions[done.best.job]
        assert len(service.registry.versions) == 1
        assert service.registry.aliases == {"stable": name}
        assert done.model_version == name == "models/digits/versions/1"
        assert published.study == done.name
        assert published.trained is not None
        assert published.trained.labels["study.trials_complete"] == "4"
        assert published.trained.metrics["validation_accuracy"] == done.best.value
        assert published.spec.publication is not None
        assert published.spec.publication.description.startswith("of a test\n\nBest of 4 trials")
        # The files of the best lived until they were published, and no longer.
        assert service.registry.files_seen == [True]
        assert service.trainer.files == set()


async def test_only_the_best_so_far_keeps_its_files(tmp_path: Path) -> None:
    held = asyncio.Event()

    async def before(task: TrainingTask, epoch: int) -> Outcome | None:
        if len(trainer.attempts) == 4 and epoch == 2:
            await held.wait()
        return None

    trainer = Trainer(before=before)
    async with serving(tmp_path, trainer=trainer) as service:
        accepted = await service.book.create(study_spec(**GRID, **PUBLISHED))
        await service.until(accepted.uid, lambda study: study.counts.complete == 3 and study.chosen == 4)
        best = (await service.book.get(accepted.uid)).best
        assert best is not None
        await becomes(lambda: len(trainer.attempts) == 4 and len(trainer.files) == 2)
        assert trainer.files == {best.job, trainer.attempts[3]}
        held.set()
        assert (await service.end(accepted.uid)).state is SUCCEEDED


@pytest.mark.parametrize(("parallel", "jobs_max", "at_once"), [(1, 4, 1), (3, 2, 2), (2, 4, 2)])
async def test_trials_run_at_once_as_many_as_are_asked_for_and_fit(
    tmp_path: Path, parallel: int, jobs_max: int, at_once: int
) -> None:
    meeting = asyncio.Barrier(at_once)

    async def before(task: TrainingTask, epoch: int) -> Outcome | None:
        if epoch == 1:
            await meeting.wait()
        return None

    trainer = Trainer(before=before)
    async with serving(tmp_path, trainer=trainer, jobs_max=jobs_max) as service, asyncio.timeout(20):
        accepted = await service.book.create(study_spec(trials_max=6, parallel_max=parallel))
        done = await service.end(accepted.uid)
    assert done.counts == Counts(complete=6)
    assert trainer.running_max == at_once


async def test_a_bad_trial_is_stopped_early_and_its_job_is_told_why(tmp_path: Path) -> None:
    def bad(task: TrainingTask) -> bool:
        return trainer.attempts.index(task.uid) == 3

    trainer = Trainer(
        lambda task, epoch: (0.1 if bad(task) else 0.9) + epoch / 1000, lingers=lambda task, _epoch: bad(task)
    )
    async with serving(tmp_path, trainer=trainer) as service:
        job = {"hyperparameters": {"epochs": 3.0}, "publication": PUBLICATION}
        accepted = await service.book.create(study_spec(pruner=Pruner.MEDIAN, trials_max=4, job=job))
        done = await service.end(accepted.uid)
        trial = (await service.trials(done.uid))[3]
        ended = await service.queue.get(trial.job)
        lines = [
            event.body.message async for event in service.queue.watch(trial.job) if isinstance(event.body, LogLine)
        ]
    assert trainer.files == set()
    assert done.counts == Counts(complete=3, pruned=1)
    assert (trial.state, trial.epoch) == (TrialState.PRUNED, 1)
    assert trial.value == pytest.approx(0.101)
    assert ended.state is JobState.CANCELLED
    assert any(line.startswith("pruned after epoch 1: validation_accuracy 0.101") for line in lines)


async def test_failed_trials_count_and_one_too_many_ends_the_study(tmp_path: Path) -> None:
    async def before(task: TrainingTask, epoch: int) -> Outcome | None:
        return Died(reason="the loss became nan", permanent=True)

    async with serving(tmp_path, trainer=Trainer(before=before)) as service:
        accepted = await service.book.create(study_spec(failures_max=2, trials_max=10))
        done = await service.end(accepted.uid)
    assert (done.state, done.counts) == (FAILED, Counts(failed=3))
    assert "the loss became nan" in done.error


async def test_a_trial_whose_process_dies_is_retried_by_its_job(tmp_path: Path) -> None:
    died: list[str] = []

    async def before(task: TrainingTask, epoch: int) -> Outcome | None:
        if epoch == 2 and task.uid not in died:
            died.append(task.uid)
            return Died(reason="killed by SIGKILL")
        return None

    async with serving(tmp_path, trainer=Trainer(before=before)) as service:
        accepted = await service.book.create(study_spec(**GRID))
        done = await service.end(accepted.uid)
        trials = await service.trials(done.uid)
    assert done.counts == Counts(complete=4)
    assert len(died) == 4
    assert [trial.epoch for trial in trials] == [2] * 4


async def test_a_stopped_study_cancels_its_trials_and_publishes_the_best_so_far(tmp_path: Path) -> None:
    trainer = Trainer(lingers=lambda task, _epoch: trainer.attempts.index(task.uid) == 2)
    async with serving(tmp_path, trainer=trainer) as service:
        accepted = await service.book.create(study_spec(trials_max=9, **PUBLISHED))
        await service.until(accepted.uid, lambda study: study.counts.complete == 2 and study.counts.running == 1)
        stopping = await service.book.stop(accepted.uid)
        assert stopping.state is StudyState.STOPPING
        done = await service.end(accepted.uid)
        assert (await service.book.stop(accepted.uid)) == done
        assert (done.state, done.counts) == (STOPPED, Counts(complete=2, failed=1))
        assert done.model_version == "models/digits/versions/1"
        assert done.best is not None
        assert set(service.registry.versions) == {done.best.job}
        assert trainer.running == 0


async def test_a_trials_job_that_somebody_cancels_is_a_failed_trial(tmp_path: Path) -> None:
    async with serving(tmp_path, trainer=Trainer(lingers=lambda _task, _epoch: True)) as service:
        accepted = await service.book.create(study_spec(trials_max=1))
        await service.until(accepted.uid, lambda study: study.last_sequence >= 4)
        (trial,) = await service.trials(accepted.uid)
        await service.queue.cancel(trial.job)
        done = await service.end(accepted.uid)
    assert (done.state, done.counts) == (FAILED, Counts(failed=1))
    assert "trial 0: its job was cancelled" in done.error


async def test_what_passes_holds_a_study_up_and_does_not_end_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        real, refusals = service.queue.create, 0

        async def create(*args: object, **options: object) -> object:
            nonlocal refusals
            refusals += 1
            if refusals % 3:
                raise NotReady("the registry does not answer")
            return await real(*args, **options)  # type: ignore[arg-type]

        service.queue.create = create  # type: ignore[method-assign, assignment]
        accepted = await service.book.create(study_spec(**GRID))
        done = await service.end(accepted.uid)
    assert done.counts == Counts(complete=4)


async def test_a_job_that_is_refused_for_good_fails_the_study_and_says_why(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:

        async def create(*args: object, **options: object) -> object:
            raise InvalidInput("no such recipe any more")

        service.queue.create = create  # type: ignore[method-assign, assignment]
        accepted = await service.book.create(study_spec(**GRID, parallel_max=2))
        done = await service.end(accepted.uid)
        assert done.state is FAILED
        assert "no such recipe any more" in done.error
        assert done.counts.failed == done.chosen


@pytest.mark.parametrize("failure", [NotReady("away"), Denied("not you")])
async def test_publishing_is_tried_again_unless_that_is_hopeless(tmp_path: Path, failure: NotReady | Denied) -> None:
    registry = Registry(failures=[failure, failure])
    async with serving(tmp_path, registry=registry) as service:
        accepted = await service.book.create(study_spec(**GRID, **PUBLISHED))
        done = await service.end(accepted.uid)
        if isinstance(failure, Denied):
            assert done.state is FAILED
            assert "not you" in done.error
            assert registry.versions == {}
        else:
            assert done.state is SUCCEEDED
            assert len(registry.files_seen) == 3
            assert len(registry.versions) == 1


async def test_a_best_trial_whose_job_was_deleted_cannot_be_published_and_that_is_said(tmp_path: Path) -> None:
    registry = Registry(failures=[NotReady("away")])
    async with serving(tmp_path, registry=registry) as service:
        accepted = await service.book.create(study_spec(**GRID, **PUBLISHED))
        done = await service.until(accepted.uid, lambda study: study.state is StudyState.PUBLISHING)
        assert done.best is not None
        registry.failures += [NotReady("away")] * 20
        await service.queue.delete(done.best.job)
        done = await service.end(accepted.uid)
    assert done.state is FAILED
    assert "gone" in done.error


async def test_a_study_that_ended_can_be_stopped_no_more(tmp_path: Path) -> None:
    async with serving(tmp_path) as service:
        accepted = await service.book.create(study_spec(**GRID))
        await service.end(accepted.uid)
        with pytest.raises(WrongState):
            await service.book.stop(accepted.uid)


async def test_trials_that_never_fit_are_refused_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path, running=False) as service:
        with pytest.raises(InvalidInput) as raised:
            await service.book.create(study_spec(job={"resources": Resources(gpus=9)}))
    assert (raised.value.reason, raised.value.field) == ("RESOURCES_TOO_LARGE", "spec.job.resources.gpus")
