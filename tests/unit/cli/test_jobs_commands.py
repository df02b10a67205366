"""`mlmesh jobs`: what each command sends, prints, and exits with."""

from __future__ import annotations

import json
from typing import Any

import grpc
import pytest

from mlmesh.training.v1 import training_pb2 as pb
from tests.unit.cli.conftest import FakeMesh, abort


def test_jobs_are_listed_over_pages_by_state_and_study(mesh: FakeMesh) -> None:
    def answer(request: pb.ListJobsRequest, _context: Any) -> pb.ListJobsResponse:
        if request.page_token:
            return pb.ListJobsResponse(jobs=[pb.Job(name="jobs/1", state=pb.JOB_STATE_PAUSED)])
        queued = pb.Job(name="jobs/2", state=pb.JOB_STATE_QUEUED, queue_position=4)
        return pb.ListJobsResponse(jobs=[queued], next_page_token="more")

    mesh.training["ListJobs"] = answer
    result = mesh.run("jobs", "list", "--state", "queued", "-s", "paused", "--study", "s1", "-n", "5")
    assert result.exit_code == 0, result.stderr
    assert "4 ahead" in result.stdout
    assert "paused" in result.stdout
    first, second = mesh.training.requests["ListJobs"]
    assert list(first.states) == [pb.JOB_STATE_QUEUED, pb.JOB_STATE_PAUSED]
    assert (first.study, first.page_size, second.page_size, second.page_token) == ("studies/s1", 5, 4, "more")
    listed = json.loads(mesh.run("jobs", "list", "-n", "1", "-o", "json").stdout)
    assert [job["name"] for job in listed["jobs"]] == ["jobs/2"]


@pytest.mark.parametrize("what", ["pause", "resume", "retry", "cancel"])
def test_several_jobs_are_asked_the_same(mesh: FakeMesh, what: str) -> None:
    method = f"{what.capitalize()}Job"

    def answer(request: Any, _context: Any) -> Any:
        return getattr(pb, f"{method}Response")(job=pb.Job(name=request.name, state=pb.JOB_STATE_RUNNING))

    mesh.training[method] = answer
    result = mesh.run("jobs", what, "1", "jobs/2")
    assert result.exit_code == 0, result.stderr
    assert [request.name for request in mesh.training.requests[method]] == ["jobs/1", "jobs/2"]
    assert "jobs/1" in result.stdout
    assert "jobs/2" in result.stdout


def test_a_job_is_shown_and_deleted(mesh: FakeMesh) -> None:
    job = pb.Job(name="jobs/1", state=pb.JOB_STATE_FAILED, error="the loss became nan", attempts=1)
    job.attempt_history.add(number=1, reason="the loss became nan", charged=True)
    mesh.training["GetJob"] = lambda _request, _context: pb.GetJobResponse(job=job)
    mesh.training["DeleteJob"] = lambda _request, _context: pb.DeleteJobResponse()
    shown = mesh.run("jobs", "get", "1").stdout
    assert "the loss became nan" in shown
    assert "charged" in shown
    assert json.loads(mesh.run("jobs", "get", "1", "-o", "json").stdout)["job"]["attempt_history"][0]["charged"]
    assert "jobs/1 is deleted" in mesh.run("jobs", "delete", "1").stdout
    assert mesh.training.requests["DeleteJob"][0].name == "jobs/1"


def test_a_watch_starts_where_it_is_asked_to(mesh: FakeMesh) -> None:
    def watch(_request: Any, _context: Any) -> Any:
        yield pb.WatchJobResponse(sequence=7, job=pb.Job(name="jobs/1", state=pb.JOB_STATE_SUCCEEDED))

    mesh.training["WatchJob"] = watch
    result = mesh.run("jobs", "watch", "1", "--from", "7", "-o", "json")
    assert json.loads(result.stdout)["sequence"] == "7"
    assert mesh.training.requests["WatchJob"][0].from_sequence == 7


def test_a_refusal_comes_with_what_to_do(mesh: FakeMesh) -> None:
    def refuse(_request: Any, context: Any) -> None:
        abort(context, grpc.StatusCode.ABORTED, "jobs/1 is still PAUSING", reason="JOB_NOT_PAUSED")

    mesh.training["ResumeJob"] = refuse
    result = mesh.run("jobs", "resume", "1")
    assert result.exit_code == 1
    assert "still PAUSING" in result.stderr
    assert "mlmesh jobs watch" in result.stderr
