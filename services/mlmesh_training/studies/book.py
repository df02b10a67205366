"""Studies as the service uses them: accepted, told about and moved, off the event loop; commits wake up watchers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timedelta

from mlmesh_runtime.errors import InvalidInput, Overloaded, RevisionLost
from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training import recipes
from mlmesh_training.ports import Fetcher
from mlmesh_training.queue import WATCH_PAGE_ITEMS, Wakeups
from mlmesh_training.schedule import Capacity
from mlmesh_training.studies import acceptance, study
from mlmesh_training.studies.ledger import SqlStudyLedger
from mlmesh_training.studies.study import Decision, Event, Recorded, Study, StudySpec, Trial


class StudyBook:
    """Accepts studies, tells about them, and lets the controller move them.

    Args:
        ledger: of studies, migrated.
        executor: the one thread of the ledgers.
        wakeups: told of every commit by the ledger, the study's name being the topic.
        capacity: what jobs may occupy; a study whose trials never fit is refused.
        fetcher: says what references to the registry mean.
        clock: the present time, timezone-aware UTC.
        new_uid: a fresh unique suffix of a study's name, [0-9a-z]{8,}.
    """

    def __init__(
        self,
        ledger: SqlStudyLedger,
        *,
        executor: BoundedExecutor,
        wakeups: Wakeups,
        capacity: Capacity,
        fetcher: Fetcher,
        clock: Callable[[], datetime],
        new_uid: Callable[[], str],
    ) -> None:
        self._ledger = ledger
        self._executor = executor
        self._wakeups = wakeups
        self._capacity = capacity
        self._fetcher = fetcher
        self._clock = clock
        self._new_uid = new_uid
        self.arrived = asyncio.Event()

    async def create(self, spec: StudySpec, *, request_id: str = "", creator: str = "") -> Study:
        """Check and store a study; then it is durable.

        Errors: as `acceptance.accepted`, `Fetcher.resolve_dataset` and `SqlStudyLedger.create`.
        """
        accepted = acceptance.accepted(
            spec,
            uid=f"{spec.job.recipe}-{self._new_uid()}",
            creator=creator,
            now=self._clock(),
            capacity=self._capacity,
        )
        earlier = await run_blocking(self._executor, self._ledger.earlier, spec, creator=creator, request_id=request_id)
        if earlier is not None:
            return earlier
        dataset, source = await self._resolved(spec)
        accepted = dataclasses.replace(accepted, dataset=dataset, source=source)
        stored = await run_blocking(self._executor, self._ledger.create, accepted, request_id=request_id)
        self.arrived.set()
        return stored

    async def get(self, uid: str) -> Study:
        """Read one study. Errors: NotFound (STUDY_NOT_FOUND)."""
        return await run_blocking(self._executor, self._ledger.get, uid)

    async def page(self, *, size: int, before: int | None) -> tuple[Sequence[Study], int | None]:
        """Studies newest first; and the key of the next page, None at the end."""
        return await run_blocking(self._executor, self._ledger.page, size=size, before=before)

    async def trials(self, uid: str, *, size: int, after: int) -> tuple[Sequence[Trial], int | None]:
        """Trials by number, from `after` on; and the key of the next page, None at the end."""
        return await run_blocking(self._executor, self._ledger.trials, uid, size=size, after=after)

    async def trial(self, uid: str, number: int) -> Trial:
        """Read one trial. Errors: NotFound (STUDY_NOT_FOUND), KeyError when there is no such trial."""
        (found,), _ = await self.trials(uid, size=1, after=number - 1)
        return found

    async def history(self, uid: str) -> tuple[Study, Sequence[Recorded]]:
        """A study with all of its trials and their values."""
        return await run_blocking(self._executor, self._ledger.history, uid)

    async def unfinished(self) -> Sequence[Study]:
        """All studies that have not ended, oldest first."""
        return await run_blocking(self._executor, self._ledger.unfinished)

    async def keeps(self, job: str) -> bool:
        """Whether a study may still need the files of this job (its uid), though it ended."""
        return await run_blocking(self._executor, self._ledger.keeps, job)

    async def change(self, uid: str, decide: Callable[[Study, datetime], Decision]) -> Study:
        """Move a study by a pure decision, in one transaction."""
        return await run_blocking(self._executor, self._ledger.change, uid, decide)

    async def change_trial(
        self,
        uid: str,
        number: int,
        decide: Callable[[Study, Trial, datetime], Decision],
        *,
        reading: tuple[int, float] | None = None,
    ) -> Trial:
        """Move a trial by a pure decision, in one transaction; see `SqlStudyLedger.change_trial`."""
        return await run_blocking(self._executor, self._ledger.change_trial, uid, number, decide, reading=reading)

    async def forget(self, *, kept_s: float, finished_max: int) -> None:
        """Forget studies that ended so long ago, and the oldest of more than so many."""
        before = self._clock() - timedelta(seconds=kept_s)
        while await run_blocking(self._executor, self._ledger.forget, ended_before=before, finished_max=finished_max):
            pass

    async def stop(self, uid: str) -> Study:
        """Ask a study to stop. Errors: NotFound (STUDY_NOT_FOUND), WrongState (STUDY_FINISHED)."""
        return await self.change(uid, study.stop_requested)

    def ticket(self, uid: str) -> AbstractContextManager[asyncio.Event]:
        """An event that is set when the study changes; clear it before looking."""
        return self._wakeups.ticket(f"studies/{uid}")

    async def watch(self, uid: str, *, from_sequence: int = 0) -> AsyncGenerator[Event]:
        """Events of a study from a sequence on, as they are committed; ends after the one that ended the study.

        A watcher holds at most WATCH_PAGE_ITEMS events, whatever its pace. Errors: NotFound (STUDY_NOT_FOUND),
        RevisionLost (SEQUENCE_LOST), Overloaded (WATCHER_TOO_SLOW) when the events it has not read yet were dropped.
        """
        following = False
        with self.ticket(uid) as changed:
            while True:
                changed.clear()
                try:
                    page, ended = await run_blocking(
                        self._executor, self._ledger.events, uid, from_sequence=from_sequence, limit=WATCH_PAGE_ITEMS
                    )
                except RevisionLost as error:
                    if not following:
                        raise
                    raise Overloaded(
                        f"studies/{uid}: event {from_sequence} was dropped before it was read",
                        reason="WATCHER_TOO_SLOW",
                    ) from error
                for event in page:
                    yield event
                    from_sequence = event.sequence + 1
                if ended:
                    return
                following = True
                if len(page) < WATCH_PAGE_ITEMS:
                    await changed.wait()

    async def _resolved(self, spec: StudySpec) -> tuple[str, str]:
        """What the data set and the source mean now: an alias that moves later does not move the study's trials."""
        job = spec.job
        try:
            dataset = job.dataset
            if job.registered_dataset:
                kind = recipes.known()[job.recipe].dataset_kind
                dataset = await self._fetcher.resolve_dataset(job.dataset, kind=kind)
            source = await self._fetcher.resolve_source(job.optimization.source) if job.optimization else ""
        except InvalidInput as error:
            raise acceptance.about_study(error, spec) from error
        return dataset, source
