"""The ledger: every accepted job and everything that happened to it, durable before it is answered.

SQLite in WAL mode with full synchronisation: when a method returns, what it wrote survives kill -9 and power loss. All
methods block; run them on an executor of one thread, which makes the writers a queue instead of a fight for the lock.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from mlmesh_runtime.chunks import disk_full
from mlmesh_runtime.errors import AlreadyExists, InvalidInput, NotFound, Overloaded, RevisionLost
from mlmesh_training import documents, tables
from mlmesh_training.jobs import FINAL, Event, Job, JobChanged, JobState
from mlmesh_training.moves import Decision

BUSY_TIMEOUT_S = 5.0
_MIGRATIONS = Path(__file__).parent / "migrations"
# SQLite says "full" for ENOSPC, and an I/O error of these kinds for a quota or a file size limit.
_SQLITE_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLimits:
    """Bounds of the ledger."""

    queued_jobs_max: int = 1000
    """Jobs that may wait; one more is refused with QUEUE_FULL."""
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
        self._engine = _engine(url)

    def migrate(self) -> None:
        """Bring the schema up to date, in one transaction. Call it before anything else."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self._transaction() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close the database."""
        self._engine.dispose()

    def create(self, job: Job, *, request_id: str = "") -> Job:
        """Store a new job as QUEUED with its first event, or return what the same request stored before.

        Errors: AlreadyExists (REQUEST_ID_REUSED) when the request id came with other content or from another caller,
        Overloaded (QUEUE_FULL).
        """
        digest = hashlib.sha256(
            documents.dumps({"spec": documents.spec_document(job.spec), "creator": job.creator}).encode()
        ).hexdigest()
        first = replace(job, last_sequence=1)
        with self._transaction() as connection:
            if request_id and (earlier := self._earlier(connection, request_id, digest)):
                return earlier
            queued = sa.select(sa.func.count()).where(tables.jobs.c.state == JobState.QUEUED)
            if connection.execute(queued).scalar_one() >= self._limits.queued_jobs_max:
                raise Overloaded(
                    f"{self._limits.queued_jobs_max} jobs wait already", reason="QUEUE_FULL", retry_after_s=30.0
                )
            number = connection.execute(
                tables.jobs.insert()
                .values(
                    uid=job.uid,
                    state=job.state,
                    request_id=request_id or None,
                    request_digest=digest,
                    first_sequence=1,
                    last_sequence=1,
                    document=documents.dumps(documents.job_document(first)),
                )
                .returning(tables.jobs.c.number)
            ).scalar_one()
            self._insert(connection, number, [Event(sequence=1, time=job.create_time, body=JobChanged(job=first))])
        self._on_commit(job.uid, 1)
        return first

    def get(self, uid: str) -> Job:
        """Read one job. Errors: NotFound (JOB_NOT_FOUND)."""
        with self._transaction() as connection:
            return _job(self._row(connection, uid))

    def page(self, *, size: int, before: int | None = None) -> tuple[Sequence[Job], int | None]:
        """Jobs newest first, at most size, older than number `before`; and the next `before`, None at the end."""
        statement = sa.select(tables.jobs).order_by(tables.jobs.c.number.desc()).limit(size + 1)
        if before is not None:
            statement = statement.where(tables.jobs.c.number < before)
        with self._transaction() as connection:
            rows = connection.execute(statement).all()
        return [_job(row) for row in rows[:size]], (rows[size - 1].number if len(rows) > size else None)

    def unfinished(self) -> Sequence[Job]:
        """All jobs that have not ended, oldest first."""
        statement = sa.select(tables.jobs).where(tables.jobs.c.state.not_in(FINAL)).order_by(tables.jobs.c.number)
        with self._transaction() as connection:
            return [_job(row) for row in connection.execute(statement)]

    def next_runnable(self, *, excluding: Sequence[str]) -> Job | None:
        """The oldest job that waits to run, None when there is none."""
        statement = (
            sa.select(tables.jobs)
            .where(tables.jobs.c.state.in_([JobState.QUEUED, JobState.RETRYING]), tables.jobs.c.uid.not_in(excluding))
            .order_by(tables.jobs.c.number)
            .limit(1)
        )
        with self._transaction() as connection:
            row = connection.execute(statement).one_or_none()
        return None if row is None else _job(row)

    def change(self, uid: str, decide: Callable[[Job, datetime], Decision]) -> Job:
        """Read a job, decide, write what was decided: all in one transaction. Returns the job as stored.

        Errors: NotFound (JOB_NOT_FOUND), and what `decide` raises; then nothing is changed.
        """
        with self._transaction() as connection:
            row = self._row(connection, uid)
            before = _job(row)
            now = self._clock()
            after, bodies = decide(before, now)
            if after == before and not bodies:
                return before
            after = replace(after, last_sequence=before.last_sequence + len(bodies))
            entries = []
            for sequence, body in enumerate(bodies, before.last_sequence + 1):
                entry = JobChanged(job=replace(after, last_sequence=sequence)) if isinstance(body, JobChanged) else body
                entries.append(Event(sequence=sequence, time=now, body=entry))
            self._insert(connection, row.number, entries)
            first = self._trimmed(connection, row, after.last_sequence)
            connection.execute(
                tables.jobs.update()
                .where(tables.jobs.c.number == row.number)
                .values(
                    state=after.state,
                    first_sequence=first,
                    last_sequence=after.last_sequence,
                    document=documents.dumps(documents.job_document(after)),
                )
            )
        self._on_commit(uid, after.last_sequence)
        return after

    def events(self, uid: str, *, from_sequence: int, limit: int) -> tuple[Sequence[Event], bool]:
        """Events from a sequence on, at most limit; and whether the job has ended and these are its last.

        Sequence 0 is the oldest event kept. Errors: NotFound (JOB_NOT_FOUND), RevisionLost (SEQUENCE_LOST) when
        from_sequence is no longer kept or was never reached.
        """
        columns = tables.events.c
        with self._transaction() as connection:
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
        now = _job(row)
        # The first answer again: the job as it was when it was accepted.
        return Job(
            uid=now.uid,
            spec=now.spec,
            hyperparameters=now.hyperparameters,
            create_time=now.create_time,
            creator=now.creator,
            last_sequence=1,
        )

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

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            if getattr(error.orig, "sqlite_errorcode", None) in _SQLITE_FULL:
                raise disk_full("a change of a job") from error
            raise


def page_key(token: str) -> int | None:
    """The number in a page token, None for the first page. Errors: InvalidInput."""
    if not token:
        return None
    head, _, number = token.partition("-")
    if head != "before" or not (number.isascii() and number.isdigit()) or len(number) > 18:
        raise InvalidInput("page_token: not a token of this list; start without one", field="page_token")
    return int(number)


def page_token(key: int | None) -> str:
    """The token of the page that goes on before a number; empty for none."""
    return "" if key is None else f"before-{key}"


def _job(row: sa.Row[Any]) -> Job:
    return documents.read_job(json.loads(row.document))


def _event(row: sa.Row[Any]) -> Event:
    return Event(
        sequence=row.sequence,
        time=documents.read_time(row.time),
        body=documents.read_body(row.kind, json.loads(row.document)),
    )


def _engine(url: str) -> sa.Engine:
    engine = sa.create_engine(
        url,
        poolclass=sa.QueuePool,
        pool_size=1,
        max_overflow=0,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    def configure(connection: Any, _record: object) -> None:
        # The driver's own idea of when to begin is switched off; SQLAlchemy's "begin" event says how.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
            connection.execute(f"PRAGMA {pragma}").close()

    sa.event.listen(engine, "connect", configure)
    sa.event.listen(engine, "begin", functools.partial(_begin, "BEGIN IMMEDIATE"))
    return engine


def _begin(statement: str, connection: sa.Connection) -> None:
    connection.exec_driver_sql(statement)
