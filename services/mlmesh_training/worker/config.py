"""What a worker is told by its environment, beside mlmesh_runtime.config. The training service sets it in the pods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlmesh_runtime.config import ConfigError, Variable

VARIABLES: tuple[Variable, ...] = (
    Variable(name="MLMESH_WORKER_JOB", default="", meaning='Job that a worker belongs to, "jobs/{job}".'),
    Variable(
        name="MLMESH_WORKER_TARGET", default="", meaning="The training service as the worker reaches it, host:port."
    ),
    Variable(name="MLMESH_WORKER_TOKEN", default="", meaning="By which the worker proves that it is this job's."),
    Variable(
        name="PET_NODE_RANK",
        default="0",
        meaning="Number of the worker's machine, from 0; set by Kubeflow Trainer. Only number 0 reports.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """A worker's job, the service, its token, and the number of its machine."""

    job: str
    target: str
    token: str
    node_rank: int

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> WorkerSettings:
        """Read and check. Raises ConfigError that names the first wrong variable."""
        values = {variable.name: environ.get(variable.name, "").strip() or variable.default for variable in VARIABLES}
        for name, value in values.items():
            if not value:
                raise ConfigError(f"{name}: not set; the training service sets it in the pods of its jobs")
        if not values["PET_NODE_RANK"].isdecimal():
            raise ConfigError(f"PET_NODE_RANK: expected a whole number, got {values['PET_NODE_RANK']!r}")
        return cls(
            job=values["MLMESH_WORKER_JOB"],
            target=values["MLMESH_WORKER_TARGET"],
            token=values["MLMESH_WORKER_TOKEN"],
            node_rank=int(values["PET_NODE_RANK"]),
        )
