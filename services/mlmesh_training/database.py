"""The database under the ledgers: SQLite in WAL mode with full synchronisation, migrated by Alembic.

When a transaction has ended, what it wrote survives kill -9 and power loss.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from mlmesh_runtime.chunks import disk_full

BUSY_TIMEOUT_S = 5.0
_MIGRATIONS = Path(__file__).parent / "migrations"
# SQLite says "full" for ENOSPC, and an I/O error of these kinds for a quota or a file size limit.
_SQLITE_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE})


class Database:
    """One connection to a database; use it from one thread at a time.

    Args:
        url: SQLAlchemy URL; SQLite, with the file's folder in place.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)

    def migrate(self) -> None:
        """Bring the schema up to date, in one transaction."""
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self.transaction() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Close it."""
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """A transaction that commits at the end of the block and is undone by an error.

        Errors: Overloaded (DISK_FULL) when there is no room; nothing was changed then.
        """
        try:
            with self.engine.begin() as connection:
                yield connection
        except sa.exc.DBAPIError as error:
            if getattr(error.orig, "sqlite_errorcode", None) in _SQLITE_FULL:
                raise disk_full("a change of a job") from error
            raise


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
