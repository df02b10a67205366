"""What the registry needs of a kind of database, beside SQL that both kinds know."""

import logging
from typing import Protocol

import sqlalchemy as sa

from mlmesh_runtime.errors import MeshError, NotReady

log = logging.getLogger(__name__)


class Backend(Protocol):
    """A kind of database. All methods block.

    Attributes:
        write_engine: one connection, for write transactions.
        read_engine: connections for read transactions; all that one reads is of one moment.
        shared: whether other processes may write to the database at the same time.
    """

    write_engine: sa.Engine
    read_engine: sa.Engine
    shared: bool

    def begin_write(self, connection: sa.Connection) -> None:
        """Wait for the turn of this write transaction: from here to its end it is the only one anywhere.

        So it reads what all before it committed, and revisions are committed in their order.
        """

    def announce(self, connection: sa.Connection, revision: int) -> None:
        """Tell other processes, when the transaction is committed, that the log has reached a revision."""

    def begin_migration(self, connection: sa.Connection) -> None:
        """Wait until no other process migrates; it then waits for the end of this transaction.

        Errors: ConfigError when the database is not one that can be used.
        """

    def finish_migration(self, connection: sa.Connection) -> None:
        """Do what migrations cannot say for both kinds."""

    def translated(self, error: sa.exc.DBAPIError) -> MeshError | None:
        """The error that a caller is to see: Overloaded (DISK_FULL), NotReady (STORAGE_UNAVAILABLE); None for a bug."""

    def conflicted(self, error: sa.exc.DBAPIError) -> bool:
        """Whether the database undid a transaction that may succeed when it is done again."""


def unavailable() -> NotReady:
    """Build the error for a database that does not answer now. Whether a change was stored may then be unknown."""
    return NotReady("the registry's database does not answer at the moment", reason="STORAGE_UNAVAILABLE")


class Outage:
    """Tells the log once when the database goes away, and once when it is back."""

    def __init__(self) -> None:
        self._away = False

    def begins(self, error: Exception) -> None:
        """It did not answer."""
        if not self._away:
            self._away = True
            log.warning("the database does not answer", extra={"error": str(getattr(error, "orig", error)).strip()})

    def ends(self) -> None:
        """It answered."""
        if self._away:
            self._away = False
            log.info("the database answers again")
