"""SQLite as the registry uses it: a file of one process; WAL, so readers never wait for the writer."""

import functools
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mlmesh_registry.backends import unavailable
from mlmesh_runtime.chunks import disk_full
from mlmesh_runtime.errors import MeshError

BUSY_TIMEOUT_S = 5.0
READERS_MAX = 8
# SQLite says "full" for ENOSPC, and an I/O error of these kinds for a quota or a file size limit.
_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})
# A backup, or a person with the shell, holds the file longer than the time above.
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_BUSY_SNAPSHOT})


class SqliteBackend:
    """Implements Backend on a file, whose folder is in place. A commit is on disk before it is answered."""

    shared = False

    def __init__(self, path: Path) -> None:
        url = sa.URL.create("sqlite", database=str(path))
        # IMMEDIATE: a transaction that begins to write later could find that another has been faster.
        self.write_engine = _engine(url, begin="BEGIN IMMEDIATE", connections_max=1)
        self.read_engine = _engine(url, begin="BEGIN", connections_max=READERS_MAX)

    def begin_write(self, connection: sa.Connection) -> None:
        """See Backend: BEGIN IMMEDIATE has waited already."""

    def announce(self, connection: sa.Connection, revision: int) -> None:
        """See Backend: there is no other process."""

    def begin_migration(self, connection: sa.Connection) -> None:
        """See Backend."""

    def finish_migration(self, connection: sa.Connection) -> None:
        """See Backend."""

    def translated(self, error: sa.exc.DBAPIError) -> MeshError | None:
        """See Backend."""
        code = getattr(error.orig, "sqlite_errorcode", None)
        if code in _FULL:
            return disk_full("a change")
        return unavailable() if code in _BUSY else None

    def conflicted(self, error: sa.exc.DBAPIError) -> bool:  # noqa: ARG002
        """See Backend: a transaction that has begun is not undone for another."""
        return False


def _engine(url: sa.URL, *, begin: str, connections_max: int) -> sa.Engine:
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
