"""TrainJobs as values: what is created, and what their status says. Pure.

The API is Kubeflow Trainer's, trainer.kubeflow.org/v1alpha1 (2.3). Everything under `trainer` is immutable once
created, also while suspended; `suspend` is not.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.options import Resources

GROUP = "trainer.kubeflow.org"
VERSION = "v1alpha1"
JOB_LABEL = "mlmesh.dev/job"
MANAGER = "mlmesh.dev/training"
NODE = "node"
"""Name of the replicated job of trainers in Kubeflow's own runtimes."""

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and as what the pods of jobs run.

    Attributes:
        namespace: of the TrainJobs.
        image: with mlmesh[training] installed.
        runtime: a ClusterTrainingRuntime, or with "namespaced/NAME" a TrainingRuntime.
        service_account: the pods' identity; the mesh lets it call the training service's worker RPCs and nothing else.
        target: the training service as the pods reach it, host:port.
        queue: Kueue's LocalQueue; empty where Kueue does not admit.
    """

    namespace: str
    image: str
    runtime: str = "torch-distributed"
    service_account: str = "trainer"
    target: str = "training.mlmesh.svc.cluster.local:9000"
    queue: str = ""


def job_name(uid: str) -> str:
    """Name of a job's TrainJob: readable, unique, and short enough for what is derived from it (RFC 1035 label)."""
    digest = hashlib.sha256(uid.encode()).hexdigest()[:8]
    return f"mlmesh-{uid[:30].strip('-')}-{digest}"


def train_job(task: TrainingTask, resources: Resources, placement: Placement, token: str) -> dict[str, Any]:
    """The TrainJob of a task. `distribution.processes` are spread evenly over `distribution.nodes`.

    Args:
        resources: of the whole job; each node asks for its share.
        token: by which the pods prove that they are this job's.
    """
    nodes = task.distribution.nodes
    namespaced, _, runtime = placement.runtime.rpartition("/")
    labels = {JOB_LABEL: task.uid[:63].rstrip("-"), "app.kubernetes.io/managed-by": "mlmesh"}
    if placement.queue:
        labels["kueue.x-k8s.io/queue-name"] = placement.queue
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": job_name(task.uid), "namespace": placement.namespace, "labels": labels},
        "spec": {
            "suspend": False,
            "runtimeRef": {
                "apiGroup": GROUP,
                "kind": "TrainingRuntime" if namespaced else "ClusterTrainingRuntime",
                "name": runtime,
            },
            "trainer": {
                "image": placement.image,
                "command": ["python", "-m", "mlmesh_training.worker"],
                "numNodes": nodes,
                "numProcPerNode": max(1, task.distribution.processes // nodes),
                "resourcesPerNode": _resources(resources, nodes),
                "env": [
                    {"name": "MLMESH_WORKER_JOB", "value": f"jobs/{task.uid}"},
                    {"name": "MLMESH_WORKER_TARGET", "value": placement.target},
                    {"name": "MLMESH_WORKER_TOKEN", "value": token},
                ],
            },
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": {"template": _template(placement)}}],
        },
    }


def _template(placement: Placement) -> dict[str, Any]:
    pod = {
        # The sidecar must come up before the worker dials and must not outlive it: a native sidecar does both.
        "metadata": {
            "labels": {"sidecar.istio.io/inject": "true", "app": "trainer"},
            "annotations": {
                "sidecar.istio.io/nativeSidecar": "true",
                # Only calls to the training service go through the sidecar: collectives of torch between the pods use
                # ports that nobody can name beforehand.
                "traffic.sidecar.istio.io/includeInboundPorts": "",
                "traffic.sidecar.istio.io/includeOutboundIPRanges": "",
                "traffic.sidecar.istio.io/includeOutboundPorts": placement.target.rpartition(":")[2],
            },
        },
        "spec": {"serviceAccountName": placement.service_account},
    }
    return {"spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": pod}}}]}}


def _resources(resources: Resources, nodes: int) -> dict[str, Any]:
    requests: dict[str, str | int] = {}
    limits: dict[str, str | int] = {}
    if resources.cpus:
        requests["cpu"] = f"{round(resources.cpus * 1000 / nodes)}m"
    if resources.memory_bytes:
        requests["memory"] = limits["memory"] = str(-(-resources.memory_bytes // nodes))
    if resources.gpus:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = max(1, resources.gpus // nodes)
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


class Stage(enum.Enum):
    """Where a TrainJob stands."""

    PENDING = "pending"
    RUNNING = "running"
    SUSPENDED = "suspended"
    COMPLETE = "complete"
    FAILED = "failed"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the status of a TrainJob says, with the reason and message of the condition that decides."""

    stage: Stage
    message: str = ""


def standing(found: Object | None) -> Standing:
    """Read a status.

    The controller says Suspended as soon as it was asked, and resumed some time after it was: pods may still run in the
    first case, and none may yet in the second. So a TrainJob is suspended when that is wanted and said, and no pod is
    left.
    """
    if found is None:
        return Standing(stage=Stage.GONE)
    status = found.get("status") or {}
    true = {each["type"]: each for each in status.get("conditions") or () if each.get("status") == "True"}
    children = status.get("jobsStatus") or ()
    running = any(child.get("active") or child.get("ready") for child in children)
    for kind, stage in (("Failed", Stage.FAILED), ("Complete", Stage.COMPLETE)):
        if kind in true:
            return Standing(stage=stage, message=f"{true[kind].get('reason', kind)}: {true[kind].get('message', '')}")
    if (found.get("spec") or {}).get("suspend") and "Suspended" in true and not running:
        return Standing(stage=Stage.SUSPENDED)
    return Standing(stage=Stage.RUNNING if running else Stage.PENDING)
