"""The ledger: every accepted job and everything that happened to it, durable before it is answered.

SQLite in WAL mode with full synchronisation: when a method returns, what it wrote survives kill -9 and power loss. All
methods block; run them on an executor of one thread, which makes the writers a queue instead of a fight for the lock.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from mlmesh_runtime.errors import AlreadyExists, NotFound, Overloaded, RevisionLost
from mlmesh_training import documents, tables
from mlmesh_training.database import Database
from mlmesh_training.expiry import SqlExpiry
from mlmesh_training.jobs import FINAL, WAITING, Event, Job, JobChanged, JobSpec, JobState
from mlmesh_training.moves import Decision
from mlmesh_training.options import Resources
from mlmesh_training.schedule import Choice, Waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLimits:
    """Bounds of the ledger."""

    queued_jobs_max: int = 1000
    """Jobs that may wait or be paused; one more is refused with QUEUE_FULL."""
    events_per_job_max: int = 100_000
    """Events kept of a job; its oldest are dropped beyond that."""


class SqlJobLedger:
    """Jobs and events in a database.

    Args:
        url: SQLAlchemy URL; SQLite, with the file's folder in place.
        clock: the present time, timezone-aware UTC.
        on_commit: called after each commit, on the calling thread, with the uid and the last sequence.

    Errors of every method: Overloaded (DISK_FULL) when there is no room; nothing was changed then.
    """

    def __init__(
        self,
        url: str,
        *,
        clock: Callable[[], datetime],
        on_commit: Callable[[str, int], None] = lambda _uid, _sequence: None,
        limits: LedgerLimits = LedgerLimits(),
    ) -> None:
        self._clock = clock
        self._on_commit = on_commit
        self._limits = limits
        self._database = Database(url)
        self.transaction = self._database.transaction
        self.expiry = SqlExpiry(self.transaction, on_commit=on_commit)

    def migrate(self) -> None:
        """Bring the schema up to date, in one transaction. Call it before anything else."""
        self._database.migrate()

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def earlier(self, spec: JobSpec, *, creator: str = "", study: str = "", request_id: str = "") -> Job | None:
        """What the same request stored before, as it was answered then. Errors: AlreadyExists (REQUEST_ID_REUSED)."""
        if not request_id:
            return None
        with self.transaction() as connection:
            return self._earlier(connection, request_id, _digest(spec, creator, study))

    def create(self, job: Job, *, request_id: str = "") -> Job:
        """Store a new job as QUEUED with its first event, or return what the same request stored before.

        Errors: AlreadyExists (REQUEST_ID_REUSED) when the request id came with other content or from another caller,
        Overloaded (QUEUE_FULL).
        """
        digest = _digest(job.spec, job.creator, job.study)
        with self.transaction() as connection:
            if request_id and (earlier := self._earlier(connection, request_id, digest)):
                return earlier
            self._refuse_more(connection)
            ahead = connection.execute(_ahead(job.spec.priority, None)).scalar_one()
            first = replace(job, last_sequence=1, queue_position=ahead)
            number = connection.execute(
                tables.jobs.insert()
                .values(
                    uid=job.uid,
                    request_id=request_id or None,
                    request_digest=digest,
                    first_sequence=1,
                    study=job.study,
                    priority=job.spec.priority,
                    cpus=job.spec.resources.cpus,
                    memory_bytes=job.spec.resources.memory_bytes,
                    gpus=job.spec.resources.gpus,
                    processes=job.spec.distribution.processes,
                    **_kept(first),
                )
                .returning(tables.jobs.c.number)
            ).scalar_one()
            self._insert(connection, number, [Event(sequence=1, time=job.create_time, body=JobChanged(job=first))])
        self._on_commit(job.uid, 1)
        return first

    def get(self, uid: str) -> Job:
        """Read one job. Errors: NotFound (JOB_NOT_FOUND)."""
        with self.transaction() as connection:
            row = self._row(connection, uid)
            return self._shown(connection, [row])[0]

    def page(
        self, *, size: int, before: int | None = None, states: Collection[JobState] = (), study: str = ""
    ) -> tuple[Sequence[Job], int | None]:
        """Jobs newest first, at most size, older than number `before`; and the next `before`, None at the end.

        Args:
            states: only jobs in these; empty means all.
            study: only trials of this one; empty means all jobs.
        """
        columns = tables.jobs.c
        with self.transaction() as connection:
            # One short look into an index for each state is faster than sorting all jobs of several states.
            found = [
                connection.execute(statement).scalars().all()
                for statement in _newest(size + 1, before=before, states=states, study=study)
            ]
            numbers = list(heapq.merge(*found, reverse=True))[: size + 1]
            chosen = sa.select(tables.jobs).where(columns.number.in_(numbers[:size])).order_by(columns.number.desc())
            jobs = self._shown(connection, connection.execute(chosen).all())
        return jobs, (numbers[size - 1] if len(numbers) > size else None)

    def unfinished(self) -> Sequence[Job]:
        """All jobs that have not ended, oldest first."""
        columns = tables.jobs.c
        present = [state for state in JobState if state not in FINAL]
        statement = sa.select(tables.jobs).where(columns.state.in_(present)).order_by(columns.number)
        with self.transaction() as connection:
            return [_job(row) for row in connection.execute(statement)]

    def choose(
        self, decide: Callable[[Sequence[Waiting]], Choice | None], *, excluding: Collection[str]
    ) -> Choice | None:
        """Have one of the jobs that wait chosen, and note who was passed; nothing else changes.

        Args:
            excluding: uids that are not to be chosen from.
        """
        columns = tables.jobs.c
        wanted = (
            "uid", "number", "state", "priority", "cpus", "memory_bytes", "gpus", "processes", "light", "passed"
        )  # fmt: skip
        statement = sa.select(*(columns[name] for name in wanted)).where(columns.state.in_(WAITING))
        with self.transaction() as connection:
            waiting = [_waiting(row) for row in connection.execute(statement) if row.uid not in excluding]
            choice = decide(waiting)
            if choice is not None and choice.passed:
                numbers = [job.number for job in choice.passed]
                connection.execute(
                    tables.jobs.update().where(columns.number.in_(numbers)).values(passed=columns.passed + 1)
                )
        return choice

    def change(self, uid: str, decide: Callable[[Job, datetime], Decision]) -> Job:
        """Read a job, decide, write what was decided: all in one transaction. Returns the job as stored.

        Errors: NotFound (JOB_NOT_FOUND), Overloaded (QUEUE_FULL) when it would wait and too many do, and what `decide`
        raises; then nothing is changed.
        """
        with self.transaction() as connection:
            row = self._row(connection, uid)
            before = _job(row)
            now = self._clock()
            after, bodies = decide(before, now)
            if after == before and not bodies:
                return self._shown(connection, [row])[0]
            if before.final and not after.final:
                self._refuse_more(connection)
            after = replace(after, last_sequence=before.last_sequence + len(bodies), queue_position=0)
            shown = after
            if after.state is JobState.QUEUED:
                ahead = connection.execute(_ahead(row.priority, row.number)).scalar_one()
                shown = replace(after, queue_position=ahead)
            entries = []
            for sequence, body in enumerate(bodies, before.last_sequence + 1):
                entry = JobChanged(job=replace(shown, last_sequence=sequence)) if isinstance(body, JobChanged) else body
                entries.append(Event(sequence=sequence, time=now, body=entry))
            self._insert(connection, row.number, entries)
            first = self._trimmed(connection, row, after.last_sequence)
            passed = row.passed if after.state in WAITING else 0
            connection.execute(
                tables.jobs.update()
                .where(tables.jobs.c.number == row.number)
                .values(first_sequence=first, passed=passed, **_kept(after))
            )
        self._on_commit(uid, after.last_sequence)
        return shown

    def events(self, uid: str, *, from_sequence: int, limit: int) -> tuple[Sequence[Event], bool]:
        """Events from a sequence on, at most limit; and whether the job has ended and these are its last.

        Sequence 0 is the oldest event kept. Errors: NotFound (JOB_NOT_FOUND), RevisionLost (SEQUENCE_LOST) when
        from_sequence is no longer kept or was never reached.
        """
        columns = tables.events.c
        with self.transaction() as connection:
            row = self._row(connection, uid)
            start = from_sequence or row.first_sequence
            if not row.first_sequence <= start <= row.last_sequence + 1:
                raise RevisionLost(
                    f"jobs/{uid} has events {row.first_sequence} to {row.last_sequence}, not {from_sequence}",
                    reason="SEQUENCE_LOST",
                    metadata={"first_sequence": str(row.first_sequence), "last_sequence": str(row.last_sequence)},
                )
            found = connection.execute(
                sa.select(tables.events)
                .where(columns.job == row.number, columns.sequence >= start)
                .order_by(columns.sequence)
                .limit(limit)
            ).all()
        reached = found[-1].sequence if found else start - 1
        return [_event(entry) for entry in found], row.state in FINAL and reached == row.last_sequence

    def _earlier(self, connection: sa.Connection, request_id: str, digest: str) -> Job | None:
        row = connection.execute(sa.select(tables.jobs).where(tables.jobs.c.request_id == request_id)).one_or_none()
        if row is None:
            return None
        if row.request_digest != digest:
            raise AlreadyExists(f"request_id {request_id!r} was used for another job", reason="REQUEST_ID_REUSED")
        first = connection.execute(
            sa.select(tables.events).where(tables.events.c.job == row.number, tables.events.c.sequence == 1)
        ).one_or_none()
        if first is not None and isinstance(body := _event(first).body, JobChanged):
            return body.job
        now = _job(row)
        # The first answer again, as far as it is known yet: the job as it was when it was accepted.
        return Job(
            uid=now.uid,
            spec=now.spec,
            hyperparameters=now.hyperparameters,
            create_time=now.create_time,
            creator=now.creator,
            study=now.study,
            resolved_dataset=now.resolved_dataset,
            resolved_source=now.resolved_source,
            last_sequence=1,
        )

    def _refuse_more(self, connection: sa.Connection) -> None:
        """Errors: Overloaded (QUEUE_FULL)."""
        states = tables.jobs.c.state
        held = sa.select(sa.func.count()).where(states.in_([JobState.QUEUED, JobState.PAUSED]))
        if connection.execute(held).scalar_one() >= self._limits.queued_jobs_max:
            raise Overloaded(
                f"{self._limits.queued_jobs_max} jobs wait already", reason="QUEUE_FULL", retry_after_s=30.0
            )

    def _shown(self, connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> list[Job]:
        """Jobs of rows, with the places of those that are queued."""
        queued = [row.number for row in rows if row.state == JobState.QUEUED]
        columns = tables.jobs.c
        places: dict[int, int] = {}
        if len(queued) == 1:
            row = next(row for row in rows if row.number == queued[0])
            places = {row.number: connection.execute(_ahead(row.priority, row.number)).scalar_one()}
        elif queued:
            order = (
                sa.select(columns.number)
                .where(columns.state == JobState.QUEUED)
                .order_by(columns.priority.desc(), columns.number)
            )
            places = {number: place for place, number in enumerate(connection.execute(order).scalars())}
        return [replace(_job(row), queue_position=places.get(row.number, 0)) for row in rows]

    def _row(self, connection: sa.Connection, uid: str) -> sa.Row[Any]:
        row = connection.execute(sa.select(tables.jobs).where(tables.jobs.c.uid == uid)).one_or_none()
        if row is None:
            raise NotFound(f"no job 'jobs/{uid}'", reason="JOB_NOT_FOUND")
        return row

    def _insert(self, connection: sa.Connection, number: int, entries: Sequence[Event]) -> None:
        rows = []
        for entry in entries:
            kind, document = documents.body_document(entry.body)
            rows.append(
                {
                    "job": number,
                    "sequence": entry.sequence,
                    "time": entry.time.isoformat(),
                    "kind": kind,
                    "document": documents.dumps(document),
                }
            )
        if rows:
            connection.execute(tables.events.insert(), rows)

    def _trimmed(self, connection: sa.Connection, row: sa.Row[Any], last: int) -> int:
        """Drop the oldest events beyond the bound, a tenth at a time; return the first sequence kept."""
        most = self._limits.events_per_job_max
        if last - row.first_sequence < most + most // 10:
            return int(row.first_sequence)
        first = last - most + 1
        columns = tables.events.c
        connection.execute(tables.events.delete().where(columns.job == row.number, columns.sequence < first))
        return first


def _digest(spec: JobSpec, creator: str, study: str) -> str:
    """SHA-256 over who asked for what."""
    asked = {"spec": documents.spec_document(spec), "creator": creator, **({"study": study} if study else {})}
    return hashlib.sha256(documents.dumps(asked).encode()).hexdigest()


def _kept(job: Job) -> dict[str, Any]:
    """Columns that follow from the job as it is."""
    return {
        "state": job.state,
        "last_sequence": job.last_sequence,
        "light": job.trained is not None,
        "end_time": None if job.end_time is None else job.end_time.isoformat(),
        "files": job.files,
        "document": documents.dumps(documents.job_document(job)),
    }


def _ahead(priority: int, number: int | None) -> sa.Select[int]:
    """How many queued jobs come before one; None for the number of one that is yet to come."""
    columns = tables.jobs.c
    earlier = (
        columns.priority == priority if number is None else ((columns.priority == priority) & (columns.number < number))
    )
    return sa.select(sa.func.count()).where(columns.state == JobState.QUEUED, (columns.priority > priority) | earlier)


def _newest(limit: int, *, before: int | None, states: Collection[JobState], study: str) -> Iterator[sa.Select[int]]:
    """Statements, each of which an index answers in order, that together find the newest jobs."""
    columns = tables.jobs.c
    base = sa.select(columns.number).order_by(columns.number.desc()).limit(limit)
    if before is not None:
        base = base.where(columns.number < before)
    if study:
        base = base.where(columns.study == study)
        states = states or tuple(JobState)
    if not states:
        yield base
    for state in sorted(set(states)):
        yield base.where(columns.state == state)


def _waiting(row: sa.Row[Any]) -> Waiting:
    return Waiting(
        uid=row.uid,
        number=row.number,
        priority=row.priority,
        asked=Resources(cpus=row.cpus, memory_bytes=row.memory_bytes, gpus=row.gpus),
        processes=row.processes,
        retrying=row.state == JobState.RETRYING,
        light=row.light,
        passed=row.passed,
    )


def _job(row: sa.Row[Any]) -> Job:
    return documents.read_job(json.loads(row.document))


def _event(row: sa.Row[Any]) -> Event:
    return Event(
        sequence=row.sequence,
        time=documents.read_time(row.time),
        body=documents.read_body(row.kind, json.loads(row.document)),
    )
