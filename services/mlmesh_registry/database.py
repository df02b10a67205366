"""The database as the registry uses it: short transactions, one writer, every change numbered.

SQLite in WAL mode: readers never wait for the writer, a commit is on disk before it is answered. Transactions run on
named executors; callers pass a function of the transaction and get its result.
"""

import contextlib
import functools
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from mlmesh_registry import tables
from mlmesh_registry.audit import chained, root
from mlmesh_registry.events import Change, Subject, encode, to_micros
from mlmesh_registry.versions import canonical
from mlmesh_runtime.chunks import disk_full
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

T = TypeVar("T")

BUSY_TIMEOUT_S = 5.0
_MIGRATIONS = Path(__file__).parent / "migrations"
# SQLite says "full" for ENOSPC, and an I/O error of these kinds for a quota or a file size limit.
_SQLITE_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})


@dataclass(slots=True, kw_only=True)
class Write:
    """A write transaction: its connection, its one time, its author, and the changes it made so far."""

    connection: sa.Connection
    now: datetime
    actor: str
    changes: list[Change] = field(default_factory=list)

    def next_revision(self) -> int:
        """Take the next number of the log."""
        head = tables.log_head
        statement = head.update().values(revision=head.c.revision + 1).returning(head.c.revision)
        return int(self.connection.execute(statement).scalar_one())

    def record(self, revision: int, subject: Subject) -> None:
        """Write a change to the log under a revision just taken."""
        change = Change(revision=revision, time=self.now, actor=self.actor, subject=subject)
        kind, plain = encode(subject)
        self.connection.execute(
            tables.changes.insert().values(
                revision=revision,
                time=to_micros(self.now),
                actor=self.actor,
                kind=kind,
                model=change.model,
                subject=canonical(plain).decode(),
            )
        )
        self.changes.append(change)

    def audit(self, method: str, resource: str, detail: Mapping[str, object]) -> None:
        """Write what was changed to the audit log: plain JSON values, never bytes or secrets.

        The head's row is the one that revisions are taken from, so entries are chained in commit order.
        """
        head = tables.log_head
        taken = head.update().values(audit_sequence=head.c.audit_sequence + 1)
        before = self.connection.execute(taken.returning(head.c.audit_sequence, head.c.audit_digest)).one()
        entry = chained(
            sequence=before.audit_sequence,
            time=self.now,
            actor=self.actor,
            method=method,
            resource=resource,
            detail=detail,
            previous_digest=before.audit_digest,
        )
        self.connection.execute(
            tables.audit_entries.insert().values(
                sequence=entry.sequence,
                time=to_micros(entry.time),
                actor=entry.actor,
                method=entry.method,
                resource=entry.resource,
                root=root(entry.resource),
                detail=entry.detail,
                previous_digest=entry.previous_digest,
                digest=entry.digest,
            )
        )
        self.connection.execute(head.update().values(audit_digest=entry.digest))


class Database:
    """Opens, migrates and serialises access to one database.

    Args:
        url: SQLAlchemy URL; SQLite, with the file's folder in place.
        writer: executor of exactly one thread, which makes writes a queue instead of a fight for the lock.
        readers: executor of as many threads as may read at once.
        clock: the present time, timezone-aware UTC.
        changes_kept: entries of the log that are kept; older ones are dropped with each write.
        on_commit: called on the writer's thread, in commit order, with the changes of each commit.

    Errors: Overloaded (DISK_FULL) when there is no room; the transaction is rolled back and the next one may succeed.
    """

    def __init__(
        self,
        url: str,
        *,
        writer: BoundedExecutor,
        readers: BoundedExecutor,
        clock: Callable[[], datetime],
        changes_kept: int,
        on_commit: Callable[[Sequence[Change]], None],
    ) -> None:
        self._writer = writer
        self._readers = readers
        self._clock = clock
        self._changes_kept = changes_kept
        self._on_commit = on_commit
        self._write_engine = _engine(url, begin="BEGIN IMMEDIATE", connections_max=1)
        self._read_engine = _engine(url, begin="BEGIN", connections_max=8)

    def migrate(self) -> None:
        """Bring the schema up to date, in one transaction. Blocking; call it before serving."""
        # Its two lines at every start say nothing to an operator.
        logging.getLogger("alembic").setLevel(logging.WARNING)
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self._write_engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    async def write(self, fn: Callable[[Write], T], *, actor: str = "") -> T:
        """Run fn in a write transaction. It is committed and durable when this returns; an error rolls it back.

        A cancelled caller does not stop a transaction that has begun.
        """
        return await run_blocking(self._writer, self._write, fn, actor)

    async def read(self, fn: Callable[[sa.Connection], T]) -> T:
        """Run fn in a read transaction: all that it reads is of one moment."""
        return await run_blocking(self._readers, self._read, fn)

    def close(self) -> None:
        """Close every connection."""
        self._read_engine.dispose()
        self._write_engine.dispose()

    def _write(self, fn: Callable[[Write], T], actor: str) -> T:
        with _mapped(), self._write_engine.begin() as connection:
            write = Write(connection=connection, now=self._clock(), actor=actor)
            result = fn(write)
            if write.changes:
                oldest = write.changes[-1].revision - self._changes_kept
                connection.execute(tables.changes.delete().where(tables.changes.c.revision <= oldest))
        if write.changes:
            self._on_commit(write.changes)
        return result

    def _read(self, fn: Callable[[sa.Connection], T]) -> T:
        with _mapped(), self._read_engine.begin() as connection:
            return fn(connection)


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """Translate the database's errors at its edge."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlite_errorcode", None) in _SQLITE_FULL:
            raise disk_full("a change") from error
        raise


def _engine(url: str, *, begin: str, connections_max: int) -> sa.Engine:
    engine = sa.create_engine(
        url,
        poolclass=sa.QueuePool,
        pool_size=connections_max,
        max_overflow=0,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    def configure(connection: Any, _record: object) -> None:
        # The driver's own idea of when to begin is switched off; SQLAlchemy's "begin" event says how.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
            connection.execute(f"PRAGMA {pragma}").close()

    sa.event.listen(engine, "connect", configure)
    sa.event.listen(engine, "begin", functools.partial(_begin, begin))
    return engine


def _begin(statement: str, connection: sa.Connection) -> None:
    connection.exec_driver_sql(statement)
