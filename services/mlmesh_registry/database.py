"""The database as the registry uses it: short transactions, one writer, every change numbered.

Readers never wait for the writer, a commit is on disk before it is answered. Transactions run on named executors;
callers pass a function of the transaction and get its result. The function may be run again when the database undid
what it did, so it has no effect but by its transaction.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.util import CommandError

from mlmesh_registry import tables
from mlmesh_registry.audit import chained, root
from mlmesh_registry.backends import Backend, Outage
from mlmesh_registry.events import Change, Subject, encode, to_micros
from mlmesh_registry.versions import canonical
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.errors import NotReady
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

T = TypeVar("T")

ATTEMPTS_MAX = 5
_PAUSE_S = 0.02
_MIGRATIONS = Path(__file__).parent / "migrations"
# Alembic keeps what it migrates in a global of its module.
_ALEMBIC = threading.Lock()


@dataclass(slots=True, kw_only=True)
class Write:
    """A write transaction: its connection, its one time, its author, and the changes it made so far."""

    connection: sa.Connection
    now: datetime
    actor: str
    changes: list[Change] = field(default_factory=list)

    def next_revision(self) -> int:
        """Take the next number of the log."""
        return self.next_revisions(1)[0]

    def next_revisions(self, count: int) -> range:
        """Take that many numbers at once."""
        head = tables.log_head
        statement = head.update().values(revision=head.c.revision + count).returning(head.c.revision)
        last = int(self.connection.execute(statement).scalar_one())
        return range(last - count + 1, last + 1)

    def record(self, revision: int, subject: Subject) -> None:
        """Write a change to the log under a revision just taken."""
        self.record_all([(revision, subject)])

    def record_all(self, made: Sequence[tuple[int, Subject]]) -> None:
        """Write changes to the log, in the order of their revisions."""
        values = []
        for revision, subject in made:
            change = Change(revision=revision, time=self.now, actor=self.actor, subject=subject)
            kind, plain = encode(subject)
            values.append(
                {
                    "revision": revision,
                    "time": to_micros(self.now),
                    "actor": self.actor,
                    "kind": kind,
                    "model": change.model,
                    "subject": canonical(plain).decode(),
                }
            )
            self.changes.append(change)
        if values:
            self.connection.execute(tables.changes.insert(), values)

    def audit(self, method: str, resource: str, detail: Mapping[str, object]) -> None:
        """Write what was changed to the audit log: plain JSON values, never bytes or secrets."""
        self.audit_all([(method, resource, detail)])

    def audit_all(self, changed: Sequence[tuple[str, str, Mapping[str, object]]]) -> None:
        """Write methods, resources and details to the audit log, in this order.

        The head's row is the one that revisions are taken from, so entries are chained in commit order.
        """
        if not changed:
            return
        head = tables.log_head
        taken = head.update().values(audit_sequence=head.c.audit_sequence + len(changed))
        last = self.connection.execute(taken.returning(head.c.audit_sequence, head.c.audit_digest)).one()
        digest, values = last.audit_digest, []
        for sequence, (method, resource, detail) in enumerate(changed, last.audit_sequence - len(changed) + 1):
            entry = chained(
                sequence=sequence,
                time=self.now,
                actor=self.actor,
                method=method,
                resource=resource,
                detail=detail,
                previous_digest=digest,
            )
            digest = entry.digest
            values.append({**asdict(entry), "time": to_micros(entry.time), "root": root(entry.resource)})
        self.connection.execute(tables.audit_entries.insert(), values)
        self.connection.execute(head.update().values(audit_digest=digest))


class Database:
    """Opens, migrates and serialises access to one database.

    Args:
        backend: the kind of database, and where it is.
        writer: executor of exactly one thread, which makes writes a queue instead of a fight for the lock.
        readers: executor of as many threads as may read at once.
        clock: the present time, timezone-aware UTC.
        changes_kept: entries of the log that are kept; older ones are dropped with each write.
        on_commit: called on the writer's thread, in commit order, with the changes of each commit.
        on_doubt: called on the writer's thread when a transaction may have been committed, and nobody will ever say.

    Errors: Overloaded (DISK_FULL) when there is no room; the transaction is rolled back and the next one may succeed.
    NotReady (STORAGE_UNAVAILABLE) while the database does not answer; connections are made again by themselves.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        writer: BoundedExecutor,
        readers: BoundedExecutor,
        clock: Callable[[], datetime],
        changes_kept: int,
        on_commit: Callable[[Sequence[Change]], None],
        on_doubt: Callable[[], None] = lambda: None,
    ) -> None:
        self._backend = backend
        self._writer = writer
        self._readers = readers
        self._clock = clock
        self._changes_kept = changes_kept
        self._on_commit = on_commit
        self._on_doubt = on_doubt
        self._away = Outage()

    def migrate(self) -> None:
        """Bring the schema up to date, in one transaction. Blocking; call it before serving.

        Processes that start together wait for one another. Errors: ConfigError when a newer release made the schema.
        """
        # Its two lines at every start say nothing to an operator.
        logging.getLogger("alembic").setLevel(logging.WARNING)
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))

        def transact(connection: sa.Connection) -> None:
            self._backend.begin_migration(connection)
            config.attributes["connection"] = connection
            try:
                with _ALEMBIC:
                    command.upgrade(config, "head")
            except CommandError as error:
                text = f"the registry's database was made by a newer release: {error}"
                raise ConfigError(text) from error
            self._backend.finish_migration(connection)

        self._run(self._backend.write_engine, _nothing, transact)

    async def write(self, fn: Callable[[Write], T], *, actor: str = "") -> T:
        """Run fn in a write transaction. It is committed and durable when this returns; an error rolls it back.

        A cancelled caller does not stop a transaction that has begun. After NotReady (STORAGE_UNAVAILABLE) it may have
        been committed or not; asked again with the same request_id, it is done once.
        """
        return await run_blocking(self._writer, self._write, fn, actor)

    async def read(self, fn: Callable[[sa.Connection], T]) -> T:
        """Run fn in a read transaction: all that it reads is of one moment."""
        return await run_blocking(self._readers, self._run, self._backend.read_engine, _nothing, fn)

    def close(self) -> None:
        """Close every connection."""
        self._backend.read_engine.dispose()
        self._backend.write_engine.dispose()

    def _write(self, fn: Callable[[Write], T], actor: str) -> T:
        changes: list[Change] = []

        def transact(connection: sa.Connection) -> T:
            write = Write(connection=connection, now=self._clock(), actor=actor, changes=changes)
            changes.clear()
            result = fn(write)
            if changes:
                oldest = changes[-1].revision - self._changes_kept
                connection.execute(tables.changes.delete().where(tables.changes.c.revision <= oldest))
                self._backend.announce(connection, changes[-1].revision)
            return result

        result = self._run(self._backend.write_engine, self._backend.begin_write, transact)
        if changes:
            self._on_commit(changes)
        return result

    def _run(self, engine: sa.Engine, begin: Callable[[sa.Connection], object], fn: Callable[[sa.Connection], T]) -> T:
        """Run fn in a transaction, again when the database undid it or the connection was stale."""
        for attempt in range(1, ATTEMPTS_MAX + 1):
            step = _Step()
            try:
                result = _transact(engine, begin, fn, step)
            except sa.exc.DBAPIError as error:
                if step.committing:
                    self._on_doubt()
                # A connection lost while nobody used it tells so at its next use; reading twice changes nothing.
                stale = error.connection_invalidated and (not step.begun or engine is self._backend.read_engine)
                if (stale or self._backend.conflicted(error)) and attempt < ATTEMPTS_MAX:
                    time.sleep(_PAUSE_S * attempt * random.random())  # noqa: S311  to keep two from meeting again
                    continue
                if (told := self._backend.translated(error)) is None:
                    raise
                if isinstance(told, NotReady):
                    self._away.begins(error)
                raise told from error
            self._away.ends()
            return result
        raise AssertionError("unreachable")


@dataclass(slots=True)
class _Step:
    """How far a transaction has come."""

    begun: bool = False
    committing: bool = False


def _transact(
    engine: sa.Engine, begin: Callable[[sa.Connection], object], fn: Callable[[sa.Connection], T], step: _Step
) -> T:
    with engine.connect() as connection:
        begin(connection)
        step.begun = True
        result = fn(connection)
        step.committing = True
        connection.commit()
        return result


def _nothing(_connection: sa.Connection) -> None:
    """Begin a transaction that waits for no turn."""
