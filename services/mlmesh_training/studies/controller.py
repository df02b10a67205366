"""Drives all studies for as long as it is awaited; one that something cut off is rebuilt from the ledger."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.executors import run_blocking
from mlmesh_training import metrics
from mlmesh_training.patience import backoff_s, being_cancelled
from mlmesh_training.studies.drive import Drive, Means
from mlmesh_training.studies.study import Recorded, Study, StudyState

if TYPE_CHECKING:
    from mlmesh_training.studies.search import Search

logger = logging.getLogger(__name__)


class StudyController:
    """Sees every study to its end. One a ledger."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._driven: set[str] = set()

    async def run(self) -> None:
        """Take up unfinished studies, then those that come. Never returns."""
        book = self._means.book
        async with asyncio.TaskGroup() as group:
            group.create_task(self._forget(), name="forgetting studies")
            while True:
                book.arrived.clear()
                for study in await book.unfinished():
                    if study.uid not in self._driven:
                        self._driven.add(study.uid)
                        metrics.STUDIES_ACTIVE.set(len(self._driven))
                        group.create_task(self._see_through(study.uid), name=study.name)
                await book.arrived.wait()

    async def _see_through(self, uid: str) -> None:
        """One study to its end, whatever fails on the way."""
        failures = 0
        try:
            while True:
                try:
                    study = await self._drive(uid)
                except Exception as error:
                    if being_cancelled():
                        raise asyncio.CancelledError from error
                    # The ledger, the disk or Optuna failed, not the study: go on as after a restart.
                    logger.exception("work on a study was cut off", exc_info=error, extra={"study": f"studies/{uid}"})
                    await asyncio.sleep(backoff_s(self._means.limits.retry_s, failures))
                    failures += 1
                else:
                    logger.info("study ended", extra={"study": study.name, "state": study.state.value})
                    return
        finally:
            self._driven.discard(uid)
            metrics.STUDIES_ACTIVE.set(len(self._driven))

    async def _forget(self) -> None:
        limits = self._means.limits
        while True:
            try:
                await self._means.book.forget(kept_s=limits.finished_kept_s, finished_max=limits.finished_max)
            except MeshError as error:
                logger.warning("cannot forget what has expired", exc_info=error)
            await asyncio.sleep(limits.look_s)

    async def _drive(self, uid: str) -> Study:
        study, history = await self._means.book.history(uid)
        search = None
        if study.state is StudyState.RUNNING:
            search = await run_blocking(self._means.executor, _searching, study, history)
        return await Drive(self._means, study, search).run([recorded.trial for recorded in history])


def _searching(study: Study, history: Sequence[Recorded]) -> Search:
    from mlmesh_training.studies.search import Search  # noqa: PLC0415  Optuna is loaded with the first study, not sooner

    return Search(study, history)
