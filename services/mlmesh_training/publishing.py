"""Brings a trained model to the registry: upload, register, move aliases; again until it works or is hopeless."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime

from mlmesh_runtime.errors import MeshError, WrongState
from mlmesh_training import moves
from mlmesh_training.jobs import Job, LogLine
from mlmesh_training.moves import Decision
from mlmesh_training.patience import backoff_s, first_of, hopeless, unless
from mlmesh_training.ports import Publisher
from mlmesh_training.queue import JobQueue, Signals

logger = logging.getLogger(__name__)


async def publish(
    queue: JobQueue, publisher: Publisher, job: Job, signals: Signals, *, retry_s: float, publish_s: float
) -> Job:
    """See a trained job to its end, or to the pause or cancellation that was asked for.

    Args:
        retry_s: before the first further try; doubled for each one after it.
        publish_s: a registry that has not answered by then is given up, and the job has failed.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + publish_s
    tries = 0
    while True:
        try:
            return await _once(queue, publisher, job.uid, signals)
        except MeshError as error:
            if isinstance(error, WrongState) and error.reason == "JOB_STOPPED":
                return await queue.change(job.uid, moves.paused)
            reason = f"publishing to {job.spec.publication.model if job.spec.publication else ''}: {error.message}"
            if hopeless(error) or loop.time() >= until:
                return await queue.change(job.uid, _failed(reason))
            logger.warning("publishing is retried", extra={"job": job.name, "error": error.message})
            if tries == 0:
                await queue.change(job.uid, _told(f"{reason}; it is tried again"))
        job = await queue.get(job.uid)
        # Once the version may exist, what is asked of the job no longer counts.
        events = () if job.registering else (signals.stop, signals.pause)
        await first_of(*events, asyncio.Event(), timeout_s=backoff_s(retry_s, tries))
        tries += 1


async def _once(queue: JobQueue, publisher: Publisher, uid: str, signals: Signals) -> Job:
    job = await queue.get(uid)
    if not job.model_version:
        if job.registering:
            # The version may exist by now: being asked to stop no longer stops it.
            await publisher.upload(job)
        else:
            await unless(publisher.upload(job), signals.stop, signals.pause)
            job = await queue.change(uid, lambda job, _now: moves.registration_begun(job))
        version = await publisher.register(job)
        job = await queue.change(uid, lambda job, _now: moves.registered(job, version))
    await publisher.point(job)
    return await queue.change(uid, moves.succeeded)


def _failed(reason: str) -> Callable[[Job, datetime], Decision]:
    return lambda job, now: moves.failed(job, reason, now)


def _told(message: str) -> Callable[[Job, datetime], Decision]:
    return lambda job, _now: moves.logged(job, LogLine(severity="warning", message=message))
