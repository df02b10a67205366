"""TrainJobs as values: what is asked for, and what a status says."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.backends.kubernetes.objects import Placement, Stage, job_name, standing, train_job
from mlmesh_training.options import Distribution, Resources

PLACEMENT = Placement(namespace="mlmesh", image="mlmesh/training:0.1.0")


def task(*, processes: int = 1, nodes: int = 1) -> TrainingTask:
    return TrainingTask(
        uid="cnn-mnist-0123456789",
        recipe="cnn",
        dataset="mnist",
        hyperparameters={},
        seed=0,
        distribution=Distribution(processes=processes, nodes=nodes),
    )


@given(st.from_regex(r"[0-9a-z]([0-9a-z-]{0,62}[0-9a-z])?", fullmatch=True))
def test_a_trainjobs_name_is_a_label_with_room_for_what_is_derived_from_it(uid: str) -> None:
    name = job_name(uid)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)
    assert len(name) <= 63 - len("-node-0-0")


def test_names_of_long_jobs_that_begin_alike_differ() -> None:
    assert job_name("a" * 60 + "1") != job_name("a" * 60 + "2")


def test_processes_and_resources_are_spread_over_the_nodes() -> None:
    resources = Resources(cpus=6, memory_bytes=9_000_000_001, gpus=8)
    trainer = train_job(task(processes=8, nodes=2), resources, PLACEMENT, "t")["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"] == {
        "requests": {"cpu": "3000m", "memory": "4500000001", "nvidia.com/gpu": 4},
        "limits": {"memory": "4500000001", "nvidia.com/gpu": 4},
    }


def test_a_namespaced_runtime_and_a_queue_are_named() -> None:
    placement = Placement(namespace="x", image="i", runtime="namespaced/mine", queue="team")
    made = train_job(task(), Resources(), placement, "t")
    assert made["spec"]["runtimeRef"]["kind"] == "TrainingRuntime"
    assert made["spec"]["runtimeRef"]["name"] == "mine"
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"


def job(*true: str, suspend: bool = False, active: int = 0) -> dict[str, Any]:
    conditions = [{"type": kind, "status": "True", "reason": "Why", "message": "because"} for kind in true]
    return {
        "spec": {"suspend": suspend},
        "status": {"conditions": conditions, "jobsStatus": [{"name": "node", "active": active, "ready": 0}]},
    }


@pytest.mark.parametrize(
    ("found", "stage"),
    [
        (None, Stage.GONE),
        ({}, Stage.PENDING),
        (job(), Stage.PENDING),
        (job(active=1), Stage.RUNNING),
        (job("Complete"), Stage.COMPLETE),
        (job("Failed", active=1), Stage.FAILED),
        (job("Suspended", suspend=True), Stage.SUSPENDED),
        # Said at once, while pods still run.
        (job("Suspended", suspend=True, active=1), Stage.RUNNING),
        # Asked, not said yet.
        (job(suspend=True), Stage.PENDING),
        # Asked to go on, and the old word still stands.
        (job("Suspended"), Stage.PENDING),
    ],
)
def test_what_a_status_says(found: dict[str, Any] | None, stage: Stage) -> None:
    assert standing(found).stage is stage


def test_a_failure_tells_its_reason() -> None:
    assert standing(job("Failed")).message == "Why: because"
