from __future__ import annotations

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.render import jobs as view
from tests.support.cli import NOW, at
from tests.unit.cli.conftest import text_of
from tests.unit.cli.test_render_training import _draw


def _job(state: pb.JobState.ValueType = pb.JOB_STATE_RUNNING) -> pb.Job:
    job = pb.Job(name="jobs/cnn-1", state=state, phase=pb.JOB_PHASE_TRAINING, attempts=2, resolved_dataset="mnist")
    job.spec.recipe, job.spec.dataset, job.spec.priority = "cnn", "mnist", 5
    job.spec.distribution.processes = 2
    job.spec.time_limit.seconds = 7200
    job.spec.labels["team"] = "vision"
    job.spec.hyperparameters["epochs"] = 3
    job.resources.CopyFrom(pb.Resources(cpus=2, memory_bytes=4 << 30))
    job.progress.CopyFrom(pb.Progress(epoch=1, epochs=3))
    job.create_time.CopyFrom(at(-60))
    job.run_duration.seconds = 95
    job.attempt_history.add(number=1, start_time=at(0), end_time=at(12), reason="ended by SIGKILL", charged=True)
    return job


def test_the_queue_says_where_each_job_stands() -> None:
    queued = _job(pb.JOB_STATE_QUEUED)
    queued.queue_position = 3
    text = text_of(view.queue_table([_job(), queued], NOW))
    for wanted in ("jobs/cnn-1", "running", "training, attempt 2", "3 ahead", "1/3", "1 min 35 s", "1 min ago"):
        assert wanted in text
    assert "priority 5, 2 processes, at most 2 h" in text
    assert "no such jobs" in text_of(view.queue_table([], NOW))


def test_a_job_is_shown_with_all_that_is_known() -> None:
    text = text_of(view.job_card(_job(), NOW))
    for wanted in (
        *("cnn on mnist, seed 0", "epochs 3", "2 CPUs, 4.0 GiB", "team=vision", "nothing", "1 min 35 s in 2 attempts"),
        *("ended by SIGKILL", "charged", "12 s"),
    ):
        assert wanted in text, text


def _told(job: pb.Job) -> pb.WatchJobResponse:
    return pb.WatchJobResponse(sequence=1, job=job)


def test_progress_tells_of_pauses_attempts_and_turns() -> None:
    queued = _job(pb.JOB_STATE_QUEUED)
    queued.queue_position = 2
    assert "queued  2 ahead" in _draw([_told(queued)])
    assert "attempt 2  training" in _draw([_told(_job())])
    assert "pausing" in _draw([_told(_job(pb.JOB_STATE_PAUSING))])
    assert "mlmesh jobs resume jobs/cnn-1" in _draw([_told(_job(pb.JOB_STATE_PAUSED))])
    retrying = _job(pb.JOB_STATE_RETRYING)
    retrying.error = "its process was ended by SIGKILL"
    assert "retrying  its process was ended by SIGKILL" in _draw([_told(retrying)])
