"""No space left: it is said, nothing is half there, and all goes on once there is room again."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_runtime.errors import Overloaded
from tests.support.training_process import PAUSED, connected, refused, running, spec

COLD = {"MLMESH_TRAINING_WARM": "0"}


@contextlib.contextmanager
def file_size_limit(size: int, pid: int = 0) -> Iterator[None]:
    """Files of a process (0: this one) end at this size, as they do on a full disk."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


async def test_a_job_that_cannot_be_stored_is_refused_and_later_ones_are_fine(tmp_path: Path) -> None:
    with running(tmp_path, env=COLD) as (service, address):
        async with connected(address) as client:
            first = await client.create(spec())
            await client.cancel(first.name)
            await client.end(first.name)
            resting = await client.create(spec(seed=8))
            await client.pause(resting.name)
            paused = await client.reaches(resting.name, PAUSED)
            with file_size_limit(4096, service.pid):
                for call in (
                    client.create(spec(), "again"),
                    client.resume(resting.name),
                    client.retry(first.name),
                    client.delete(first.name),
                ):
                    async with refused(Overloaded, "DISK_FULL"):
                        await call
                # What is there can still be read.
                assert (await client.get(first.name)).name == first.name
                assert await client.get(resting.name) == paused
            await client.cancel(resting.name)
            job = await client.create(spec(), "again")
            await client.cancel(job.name)
            await client.end(job.name)
            listed = (await client.stub.ListJobs(pb.ListJobsRequest())).jobs
            assert [found.name for found in listed] == [job.name, resting.name, first.name]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from mlmesh_training.trainer import checkpoint

    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    checkpoint.save(tmp_path, 1, {"epoch": 1, "model": {"w": torch.ones(10)}})
    with file_size_limit(64 * 1024), pytest.raises(OSError, match="too large"):
        checkpoint.save(tmp_path, 2, {"epoch": 2, "model": {"w": torch.ones(100_000)}})
    (kept,) = checkpoint.stored(tmp_path)
    state = checkpoint.load(kept)
    assert state is not None
    assert state["epoch"] == 1
    assert sorted(os.listdir(tmp_path)) == [kept.path.name]


def test_a_trainer_without_room_says_so_and_may_be_tried_again(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from mlmesh_training import convert, documents, recipes
    from mlmesh_training.backends.base import Died, TrainingTask
    from mlmesh_training.backends.reports import read_report
    from mlmesh_training.trainer.__main__ import work
    from mlmesh_training.trainer.reporter import Reporter

    asked = convert.spec(spec())
    task = TrainingTask(
        uid=tmp_path.name,
        recipe=asked.recipe,
        dataset=asked.dataset,
        hyperparameters=recipes.resolve(asked),
        seed=asked.seed,
    )
    (tmp_path / "task.json").write_text(documents.dumps(documents.task_document(task)))
    pipe = io.BytesIO()
    with file_size_limit(16 * 1024):
        assert work(tmp_path, Reporter(pipe), threads=1) == 1
    died = read_report(pipe.getvalue().splitlines()[-1])
    assert isinstance(died, Died)
    assert not died.permanent
    assert "too large" in died.reason
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not list(tmp_path.glob("*.part"))
