"""Training on a cluster, behind the same port as on this machine.

A job is one TrainJob for all its attempts: it is created, suspended to pause, resumed, and deleted when the job ends or
is tried anew. Its pods run `python -m mlmesh_training.worker`, which fetches the task and its files from the hub of
this service, reports back over one stream, and brings checkpoints and the model into the job's folder here: so
publishing, resuming and evaluating see no difference, and no checkpoint is lost with a pod.

A TrainJob outlives this service: when the service comes back, the next attempt finds it and goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlmesh_runtime.errors import Denied, InvalidInput, NotReady
from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training.backends.base import Died, Finished, Outcome, Paused, Report, Stopped, TrainingTask
from mlmesh_training.backends.kubernetes.cluster import Cluster
from mlmesh_training.backends.kubernetes.hub import Command, Session, WorkerHub
from mlmesh_training.backends.kubernetes.objects import Placement, Stage, Standing, job_name, standing, train_job
from mlmesh_training.backends.results import prepare, read_result
from mlmesh_training.jobs import JobPhase, LogLine

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RECONNECT_S = 2.0
_DELETED_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesLimits:
    """Bounds of an attempt on a cluster, seconds."""

    pause_s: float = 60.0
    """Between asking workers to pause and suspending the TrainJob whether they have or not."""
    silence_s_max: float = 1800.0
    """Running pods that report nothing for this long hang: the attempt has died."""
    delete_s: float = 120.0
    """How long a deletion is waited for."""


class KubernetesBackend:
    """Runs attempts as TrainJobs.

    Args:
        folder: one folder a job is made in it.
        cluster: where TrainJobs are.
        hub: where the workers meet this service.
        executor: threads for the disk.
    """

    def __init__(
        self,
        folder: Path,
        *,
        cluster: Cluster,
        hub: WorkerHub,
        placement: Placement,
        executor: BoundedExecutor,
        limits: KubernetesLimits = KubernetesLimits(),
    ) -> None:
        self._folder = folder.resolve()
        self._cluster = cluster
        self._hub = hub
        self._placement = placement
        self._executor = executor
        self._limits = limits

    def folder(self, uid: str) -> Path:
        """The folder of one job."""
        return self._folder / uid

    async def run(
        self,
        task: TrainingTask,
        *,
        report: Callable[[Report], Awaitable[None]],
        stop: asyncio.Event,
        pause: asyncio.Event,
    ) -> Outcome:
        """Run one attempt; see `Backend.run`. Cancelled, it leaves the TrainJob running for the next attempt."""
        folder = self.folder(task.uid)
        try:
            await run_blocking(self._executor, prepare, folder, task)
        except OSError as error:
            return Died(reason=f"cannot write the task: {error.strerror}")
        await report(JobPhase.LOADING_DATA)
        with self._hub.attempt(task.uid, folder, report) as session:
            attempt = _Attempt(self._cluster, job_name(task.uid), session, self._limits, stop=stop, pause=pause)
            try:
                wanted = train_job(task, task.resources, self._placement, self._hub.token(task.uid))
                await attempt.begin(wanted)
                end = await attempt.follow(report)
            except InvalidInput as error:
                return Died(reason=error.message, permanent=True)
            except Denied as error:
                return Died(reason=error.message)
            if end is not None:
                return end
        try:
            return Finished(model=await run_blocking(self._executor, read_result, folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Died(reason=f"training left no usable result: {error}")

    async def discard(self, uid: str) -> None:
        """Delete the job's TrainJob and folder."""
        try:
            await self._cluster.delete(job_name(uid))
        except (NotReady, Denied) as error:
            logger.warning("a TrainJob is left behind", extra={"job": f"jobs/{uid}", "error": error.message})
        await run_blocking(self._executor, shutil.rmtree, self.folder(uid), ignore_errors=True)

    async def kept(self) -> list[str]:
        """The jobs of which something is kept."""
        return await run_blocking(
            self._executor, lambda: sorted(path.name for path in self._folder.glob("*/") if path.is_dir())
        )


class _Attempt:
    """One attempt: a TrainJob, the session of its workers, and the events that may end it."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        session: Session,
        limits: KubernetesLimits,
        *,
        stop: asyncio.Event,
        pause: asyncio.Event,
    ) -> None:
        self._cluster = cluster
        self._name = name
        self._session = session
        self._limits = limits
        self._stop = stop
        self._pause = pause
        self._now = Standing(stage=Stage.PENDING)
        self._changed = asyncio.Event()

    async def begin(self, wanted: dict[str, object]) -> None:
        """Create the TrainJob, or go on with the one that is there unless it has ended."""
        found = await _patiently(lambda: self._cluster.get(self._name))
        if standing(found).stage in {Stage.COMPLETE, Stage.FAILED}:
            await _patiently(lambda: self._cluster.delete(self._name))
            await self._until_gone()
            found = None
        if found is None:
            await _patiently(lambda: self._cluster.create(wanted))
        elif (found.get("spec") or {}).get("suspend"):
            await _patiently(lambda: self._cluster.suspend(self._name, False))

    async def follow(self, report: Callable[[Report], Awaitable[None]]) -> Outcome | None:
        """Until the attempt has ended; None when the TrainJob is complete."""
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch(report))
            try:
                return await self._end()
            finally:
                watching.cancel()

    async def _watch(self, report: Callable[[Report], Awaitable[None]]) -> None:
        """Keep `_now` up to date, whatever the API server does."""
        told: Stage | None = None
        while True:
            try:
                async with contextlib.aclosing(self._cluster.watch(self._name)) as states:
                    async for found in states:
                        self._now = standing(found)
                        if self._now.stage is not told:
                            told = self._now.stage
                            line = f"TrainJob {self._name}: {self._now.stage.value}"
                            await report(LogLine(severity="info", message=f"{line} {self._now.message}".rstrip()))
                        self._changed.set()
            except (NotReady, Denied) as error:
                logger.warning("the TrainJob cannot be watched", extra={"trainjob": self._name, "error": error.message})
                await asyncio.sleep(_RECONNECT_S)

    async def _end(self) -> Outcome | None:
        loop = asyncio.get_running_loop()
        heard, quiet_until = self._session.heard, loop.time() + self._limits.silence_s_max
        while True:
            if self._stop.is_set():
                return await self._stopped()
            if self._now.stage is Stage.COMPLETE:
                return None
            if self._now.stage in {Stage.FAILED, Stage.GONE}:
                return self._session.died or Died(reason=f"its TrainJob has {_ended(self._now)}")
            if self._pause.is_set():
                outcome = await self._paused()
                if outcome is not None:
                    return outcome
                continue
            if (self._session.heard, self._now.stage) != (heard, Stage.RUNNING):
                heard = self._session.heard
                quiet_until = loop.time() + self._limits.silence_s_max
            if loop.time() >= quiet_until:
                await self._delete()
                return Died(reason=f"its pods said nothing for {self._limits.silence_s_max:g} s")
            await self._until(quiet_until - loop.time())

    async def _paused(self) -> Outcome | None:
        """Have the workers store a checkpoint, then suspend; None when the TrainJob ended meanwhile."""
        self._session.order(Command.PAUSE)
        deadline = asyncio.get_running_loop().time() + self._limits.pause_s
        while not (self._session.paused.is_set() or self._stop.is_set() or self._over()):
            left_s = deadline - asyncio.get_running_loop().time()
            # Without a worker there is nothing to wait for.
            if left_s <= 0 or (not self._session.workers and self._now.stage is not Stage.RUNNING):
                break
            await self._until(left_s, self._session.paused)
        if self._stop.is_set() or self._over():
            return None
        await _patiently(lambda: self._cluster.suspend(self._name, True))
        while self._now.stage is not Stage.SUSPENDED:
            if self._stop.is_set() or self._over():
                return None
            await self._until(self._limits.silence_s_max)
        return Paused()

    def _over(self) -> bool:
        return self._now.stage in {Stage.COMPLETE, Stage.FAILED, Stage.GONE}

    async def _stopped(self) -> Outcome:
        self._session.order(Command.STOP)
        await self._delete()
        return Stopped()

    async def _delete(self) -> None:
        await _patiently(lambda: self._cluster.delete(self._name))
        await self._until_gone()

    async def _until_gone(self) -> None:
        """Wait until nothing of it runs any more. Errors: NotReady when that takes too long."""
        try:
            async with asyncio.timeout(self._limits.delete_s):
                while await _patiently(lambda: self._cluster.get(self._name)) is not None:  # noqa: ASYNC110
                    await asyncio.sleep(_DELETED_POLL_S)
        except TimeoutError:
            raise NotReady(f"TrainJob {self._name} was not gone within {self._limits.delete_s:g} s") from None

    async def _until(self, timeout_s: float, *more: asyncio.Event) -> None:
        """Wait until the TrainJob, a wish or a worker changed something, or for so long."""
        waiting = [self._changed, self._stop, *more]
        if not self._pause.is_set():
            waiting.append(self._pause)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(timeout_s, 5.0))), asyncio.TaskGroup() as group:
                tasks = [group.create_task(event.wait()) for event in waiting]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
        self._changed.clear()


def _ended(now: Standing) -> str:
    return "been deleted" if now.stage is Stage.GONE else f"failed: {now.message}"


async def _patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Again and again while the API server does not answer: a job does not fail for that."""
    while True:
        try:
            return await call()
        except NotReady as error:
            logger.warning("Kubernetes does not answer; it is tried again", extra={"error": error.message})
            await asyncio.sleep(_RECONNECT_S)
