"""Composition: one training service out of its parts, opened and closed in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from mlmesh_runtime.config import ConfigError, Settings
from mlmesh_runtime.executors import BoundedExecutor, Executors, run_blocking
from mlmesh_training.backends.local import LocalBackend, LocalLimits
from mlmesh_training.capacity import present
from mlmesh_training.config import TrainingSettings, trainer_environment
from mlmesh_training.fetching import RegistryFetcher
from mlmesh_training.ledger import LedgerLimits, SqlJobLedger
from mlmesh_training.options import Resources
from mlmesh_training.publish import RegistryPublisher
from mlmesh_training.queue import JobQueue, Wakeups
from mlmesh_training.retention import Retention, RetentionLimits, sweep
from mlmesh_training.runner import Runner, RunnerLimits
from mlmesh_training.schedule import Capacity
from mlmesh_training.studies.book import StudyBook
from mlmesh_training.studies.controller import StudyController
from mlmesh_training.studies.drive import DriveLimits, Means
from mlmesh_training.studies.ledger import SqlStudyLedger, StudyLimits

if TYPE_CHECKING:
    from mlmesh_training.backends.kubernetes.backend import KubernetesBackend
    from mlmesh_training.backends.kubernetes.hub import WorkerHub

KUBERNETES = "kubernetes"
_CLUSTER = Resources(cpus=1e6, memory_bytes=1 << 60, gpus=4096)
_CLUSTER_NODES_MAX = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """An open training service: its queue serves the RPCs, `run` is to be awaited beside them."""

    queue: JobQueue
    runner: Runner
    retention: Retention
    book: StudyBook
    studies: StudyController
    workers: Workers | None = None

    async def run(self) -> None:
        """Work on the queue, and remove what expires. Never returns."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.runner.run(), name="runner")
            group.create_task(self.retention.run(), name="retention")
            group.create_task(self.studies.run(), name="studies")


@contextlib.asynccontextmanager
async def open_training(
    settings: Settings, own: TrainingSettings, *, registry: grpc.aio.Channel
) -> AsyncIterator[Training]:
    """Open the service in settings.data_dir. Errors: ConfigError when the folder is unusable or in use."""
    with _folder(settings.data_dir) as folder:
        async with Executors({"ledger": 1, "disk": 4, "studies": 1}) as executors:
            wakeups = Wakeups()
            ledger = SqlJobLedger(
                f"sqlite:///{folder / 'training.sqlite'}",
                clock=_now,
                on_commit=lambda uid, _sequence: wakeups.announce(uid),
                limits=LedgerLimits(queued_jobs_max=own.queue_items_max, events_per_job_max=own.events_per_job_max),
            )
            capacity = capacity_of(settings, own)
            try:
                await run_blocking(executors["ledger"], ledger.migrate)
                fetcher = RegistryFetcher(registry, executor=executors["disk"])
                queue = JobQueue(
                    ledger,
                    executor=executors["ledger"],
                    wakeups=wakeups,
                    clock=_now,
                    new_uid=_new_uid,
                    capacity=capacity,
                    fetcher=fetcher,
                )
                book = StudyBook(
                    SqlStudyLedger(
                        ledger.transaction,
                        clock=_now,
                        on_commit=lambda uid, _sequence: wakeups.announce(f"studies/{uid}"),
                        limits=StudyLimits(studies_max=own.studies_max, events_per_study_max=own.events_per_study_max),
                    ),
                    executor=executors["ledger"],
                    wakeups=wakeups,
                    capacity=capacity,
                    fetcher=fetcher,
                    clock=_now,
                    new_uid=_new_uid,
                )
                async with _backend(settings, own, folder=folder, executor=executors["disk"]) as (backend, workers):
                    await sweep(queue, present=await backend.kept(), discard=backend.discard)
                    publisher = RegistryPublisher(registry, folder=backend.folder, executor=executors["disk"])
                    limits = RunnerLimits(retry_s=own.retry_s, publish_s=own.publish_s, time_limit_s=own.time_limit_s)
                    retention = Retention(
                        queue, discard=backend.discard, clock=_now, needed=book.keeps, limits=_kept(own)
                    )
                    runner = Runner(
                        queue,
                        backend=backend,
                        publisher=publisher,
                        retention=retention,
                        fetcher=fetcher,
                        limits=limits,
                    )
                    means = Means(
                        book=book,
                        queue=queue,
                        publisher=publisher,
                        discard=retention.drop_files,
                        executor=executors["studies"],
                        limits=DriveLimits(
                            retry_s=own.retry_s,
                            publish_s=own.publish_s,
                            finished_kept_s=own.finished_kept_s,
                            finished_max=own.finished_max,
                        ),
                    )
                    studies = StudyController(means)
                    yield Training(
                        queue=queue,
                        runner=runner,
                        retention=retention,
                        book=book,
                        studies=studies,
                        workers=workers,
                    )
            finally:
                await run_blocking(executors["ledger"], ledger.close)


def capacity_of(settings: Settings, own: TrainingSettings) -> Capacity:
    """What jobs may occupy: what was said, else what the machine has, or whatever a cluster will give."""
    here = _CLUSTER if own.backend == KUBERNETES else present(settings.environ)
    total = Resources(
        cpus=own.cpus or here.cpus, memory_bytes=own.memory_bytes or here.memory_bytes, gpus=own.gpus or here.gpus
    )
    if own.backend == KUBERNETES:
        return Capacity(
            total=total, jobs_max=own.jobs_max, threads=own.threads, nodes_max=_CLUSTER_NODES_MAX, shares=False
        )
    return Capacity(total=total, jobs_max=own.jobs_max, threads=own.threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """What serves the workers of a cluster."""

    hub: WorkerHub
    executor: BoundedExecutor
    threads: int
    file_bytes_max: int


@contextlib.asynccontextmanager
async def _backend(
    settings: Settings, own: TrainingSettings, *, folder: Path, executor: BoundedExecutor
) -> AsyncIterator[tuple[LocalBackend | KubernetesBackend, Workers | None]]:
    """The place where jobs run, closed at the end of the block, and what its workers need. Errors: ConfigError."""
    if own.backend == KUBERNETES:
        # Only where it is used: it needs a package that a service beside its trainers does not.
        try:
            from mlmesh_training.backends.kubernetes.config import KubernetesSettings  # noqa: PLC0415
            from mlmesh_training.backends.kubernetes.opening import open_kubernetes  # noqa: PLC0415
        except ImportError as error:
            raise ConfigError(
                f"MLMESH_TRAINING_BACKEND: kubernetes needs mlmesh[kubernetes], which is not installed ({error.name})"
            ) from None
        cluster = KubernetesSettings.from_environment(settings.environ)
        async with open_kubernetes(cluster, folder=folder, executor=executor) as (backend, hub):
            workers = Workers(hub=hub, executor=executor, threads=own.threads, file_bytes_max=cluster.file_bytes_max)
            yield backend, workers
        return
    limits = LocalLimits(stop_grace_s=own.stop_s, silence_s_max=own.silence_s, threads=own.threads, warm=own.warm > 0)
    async with LocalBackend(
        folder / "jobs", executor=executor, environ=trainer_environment(settings.environ), limits=limits
    ) as local:
        yield local, None


def _kept(own: TrainingSettings) -> RetentionLimits:
    return RetentionLimits(
        kept_s=own.kept_s,
        finished_kept_s=own.finished_kept_s,
        finished_max=own.finished_max,
        look_s=min(60.0, own.kept_s + 1),
    )


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[Path]:
    """The data folder, made where it is missing and locked: two services on one ledger would run jobs twice."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "service.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"MLMESH_DATA_DIR: {folder} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder.resolve()
    except BlockingIOError:
        raise ConfigError(f"MLMESH_DATA_DIR: another training service uses {folder}") from None
    finally:
        os.close(fd)


def _now() -> datetime:
    return datetime.now(UTC)


def _new_uid() -> str:
    return secrets.token_hex(5)
