"""Composition: one training service out of its parts, opened and closed in order."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc

from mlmesh_runtime.config import ConfigError, Settings
from mlmesh_runtime.executors import Executors, run_blocking
from mlmesh_training.backends.local import LocalBackend, LocalLimits
from mlmesh_training.config import TrainingSettings, trainer_environment
from mlmesh_training.ledger import LedgerLimits, SqlJobLedger
from mlmesh_training.publish import RegistryPublisher
from mlmesh_training.queue import JobQueue, Wakeups
from mlmesh_training.runner import Runner, RunnerLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """An open training service: its queue serves the RPCs, its runner is to be awaited beside them."""

    queue: JobQueue
    runner: Runner


@contextlib.asynccontextmanager
async def open_training(
    settings: Settings, own: TrainingSettings, *, registry: grpc.aio.Channel
) -> AsyncIterator[Training]:
    """Open the service in settings.data_dir. Errors: ConfigError when the folder is unusable or in use."""
    with _folder(settings.data_dir) as folder:
        async with Executors({"ledger": 1, "disk": 4}) as executors:
            wakeups = Wakeups()
            ledger = SqlJobLedger(
                f"sqlite:///{folder / 'training.sqlite'}",
                clock=_now,
                on_commit=lambda uid, _sequence: wakeups.announce(uid),
                limits=LedgerLimits(queued_jobs_max=own.queue_items_max, events_per_job_max=own.events_per_job_max),
            )
            try:
                await run_blocking(executors["ledger"], ledger.migrate)
                queue = JobQueue(ledger, executor=executors["ledger"], wakeups=wakeups, clock=_now, new_uid=_new_uid)
                backend = LocalBackend(
                    folder / "jobs",
                    executor=executors["disk"],
                    environ=trainer_environment(settings.environ),
                    limits=LocalLimits(
                        stop_grace_s=own.stop_s,
                        silence_s_max=own.silence_s,
                        threads=own.threads,
                        warm=own.warm > 0,
                    ),
                )
                await _sweep(queue, backend)
                publisher = RegistryPublisher(registry, folder=backend.folder, executor=executors["disk"])
                limits = RunnerLimits(jobs_max=own.jobs_max, retry_s=own.retry_s, publish_s=own.publish_s)
                async with backend:
                    runner = Runner(queue, backend=backend, publisher=publisher, limits=limits)
                    yield Training(queue=queue, runner=runner)
            finally:
                await run_blocking(executors["ledger"], ledger.close)


async def _sweep(queue: JobQueue, backend: LocalBackend) -> None:
    """Remove what a crash between a job's end and the removal of its files left behind."""
    unfinished = {job.uid for job in await queue.unfinished()}
    for uid in await backend.kept():
        if uid not in unfinished:
            await backend.discard(uid)


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
