"""What the runner and the queue need of the registry, as ports. Pure."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Protocol

from mlmesh_runtime.errors import InvalidInput
from mlmesh_training.jobs import Job

DATASET_FOLDER = "dataset"
"""In a job's folder: the files of a registered data set."""
SOURCE_FOLDER = "source"
"""In a job's folder: the files of the version that is optimised."""
VERSION_FILE = "_version.json"
"""In each of both, written last: "version", its name; "digest"; "labels"; "files", their paths. The registry allows no
file of that name."""


class Publisher(Protocol):
    """Where trained models go. Every method may be repeated with the same job, and then changes nothing more."""

    def upload(self, job: Job) -> Coroutine[Any, Any, None]:
        """Make sure that the model and the files of its version are there."""
        ...

    async def register(self, job: Job) -> str:
        """Create the version, "models/{model}/versions/{number}"."""
        ...

    async def point(self, job: Job) -> None:
        """Move the aliases that were asked for to the job's version."""
        ...


class Fetcher(Protocol):
    """Where registered data sets and sources of optimisations come from."""

    async def resolve_dataset(self, reference: str, *, kind: str = "") -> str:
        """The version that a registered data set means now, "models/{model}/versions/{number}".

        Called when a job is accepted. Args: a version or an alias, "models/{model}/aliases/{alias}"; the kind of data
        set that the recipe takes, such as "IMAGE", empty for any.
        Errors: InvalidInput (UNKNOWN_DATASET) when it is no usable data set; the registry's while it does not answer.
        """
        ...

    async def resolve_source(self, reference: str) -> str:
        """The version that the source of an optimisation means now; as `resolve_dataset`, with INVALID_FIELD."""
        ...

    async def fetch(self, job: Job, folder: Path) -> None:
        """Make sure that the files of `job.resolved_dataset` are in `folder`/dataset, and those of
        `job.resolved_source` in `folder`/source, each where it is a version; whole and verified.

        Called before each attempt: what an earlier call left whole is kept. May be cancelled at any moment.
        Errors: MeshError; Corrupt, Denied, InvalidInput, NotFound, Unauthenticated, Unsupported and WrongState end the
        job, all others are tried again.
        """
        ...


class NamedOnly:
    """A fetcher of a service without a registry: named data sets need nothing."""

    async def resolve_dataset(self, reference: str, *, kind: str = "") -> str:  # noqa: ARG002
        """Refuse."""
        raise InvalidInput(
            f"registered data sets such as {reference!r} need a registry",
            field="spec.dataset",
            reason="UNKNOWN_DATASET",
        )

    async def resolve_source(self, reference: str) -> str:
        """Refuse."""
        raise InvalidInput(f"sources such as {reference!r} need a registry", field="spec.optimization.source")

    async def fetch(self, job: Job, folder: Path) -> None:
        """Nothing to do."""
