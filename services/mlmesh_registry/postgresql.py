"""PostgreSQL as the registry uses it: one writer at a time over all processes, reads of one moment, news by NOTIFY."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import tables
from mlmesh_registry.backends import unavailable
from mlmesh_runtime.chunks import disk_full
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.errors import MeshError

log = logging.getLogger(__name__)

VARIABLE = "MLMESH_REGISTRY_DATABASE_URL"
CHANNEL = "mlmesh_registry"
READERS_MAX = 8
RECONNECT_S_MAX = 5.0

# "mlmesh" in ASCII: any number that nobody else is likely to have chosen.
_MIGRATION_LOCK = 0x6D6C6D657368
# What a process may hold up: the others wait this long for the one row that every writer locks; the server ends a
# transaction that its client has forgotten (a stopped process) before they give up.
_SESSION = {
    "lock_timeout": "8s",
    "idle_in_transaction_session_timeout": "5s",
    "statement_timeout": "30s",
    "client_min_messages": "warning",
    "TimeZone": "UTC",
}
# A server that went away without a word is given up after about half a minute, not after hours.
_CONNECT = {
    "application_name": "mlmesh-registry",
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
_DISK_FULL = frozenset({"53100"})
_CONFLICTS = frozenset({"40001", "40P01"})
# 08: connection, 53: resources, 57: an operator or a timeout ended it; a server that became a standby after a failover;
# a transaction ended for idling; the turn to write that did not come.
_AWAY_CLASSES = frozenset({"08", "53", "57"})
_NOT_WRITABLE = "25006"
_AWAY = frozenset({_NOT_WRITABLE, "25P03", "55P03"})


def parse_url(text: str) -> sa.URL:
    """Parse `postgresql://user:password@host/database`. Errors: ConfigError; it never shows the text."""
    try:
        url = sa.make_url(text)
    except (sa.exc.ArgumentError, ValueError):
        raise ConfigError(f"{VARIABLE}: expected postgresql://user:password@host:port/database") from None
    if url.drivername not in {"postgresql", "postgres", "postgresql+psycopg"}:
        raise ConfigError(f"{VARIABLE}: expected postgresql://...; got {url.drivername.split(':')[0]}://...")
    if "@" in (url.host or ""):
        raise ConfigError(f"{VARIABLE}: a password with @, : or / is written percent-encoded (%40, %3A, %2F)")
    if not url.database:
        raise ConfigError(f"{VARIABLE}: names no database; expected postgresql://user:password@host:port/database")
    return url.set(drivername="postgresql+psycopg")


def may_come_back(refusal: str) -> bool:
    """Whether a server that refused a connection may take it later: by its words, since libpq tells no code."""
    passing = ("the database system is", "too many")
    return "FATAL:" not in refusal or any(words in refusal for words in passing)


class PostgresBackend:
    """Implements Backend. Connects lazily; errors of the driver are mapped by `translated`.

    Errors: ConfigError when the driver is not installed.
    """

    shared = True

    def __init__(self, url: sa.URL) -> None:
        self._url = url.update_query_dict({name: value for name, value in _CONNECT.items() if name not in url.query})
        try:
            self.write_engine = self._engine(1, isolation_level="READ COMMITTED")
            self.read_engine = self._engine(READERS_MAX, isolation_level="REPEATABLE READ", postgresql_readonly=True)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{VARIABLE}: the driver is missing; install mlmesh[postgresql]") from error

    def _engine(self, connections_max: int, **options: Any) -> sa.Engine:
        engine = sa.create_engine(
            self._url,
            poolclass=sa.QueuePool,
            pool_size=connections_max,
            max_overflow=0,
            execution_options=options,
        )
        sa.event.listen(engine, "connect", _configure)
        sa.event.listen(engine, "handle_error", _leave_a_standby)
        return engine

    def begin_write(self, connection: sa.Connection) -> None:
        """See Backend: by the lock of the one row of the log's head, held until the commit."""
        connection.execute(sa.select(tables.log_head.c.id).with_for_update())

    def announce(self, connection: sa.Connection, revision: int) -> None:
        """See Backend."""
        connection.execute(sa.select(sa.func.pg_notify(CHANNEL, str(revision))))

    def begin_migration(self, connection: sa.Connection) -> None:
        """See Backend."""
        # Another process may take its time: it migrates what is there.
        for name in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
            connection.exec_driver_sql(f"SET LOCAL {name} = '10min'")
        if (encoding := connection.exec_driver_sql("SHOW server_encoding").scalar()) != "UTF8":
            raise ConfigError(f"{VARIABLE}: the database is encoded in {encoding}; expected UTF8")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))

    def finish_migration(self, connection: sa.Connection) -> None:
        """See Backend: make text compare by its bytes, as SQLite does; orders then are the same everywhere, for ever.

        A collation of the operating system changes with its updates and leaves indexes wrong.
        """
        columns = sa.text(
            "SELECT table_name, column_name FROM information_schema.columns"
            " WHERE table_schema = current_schema() AND data_type = 'text' AND collation_name IS NULL"
            " AND table_name = ANY(:names)"
        )
        quote = connection.dialect.identifier_preparer.quote
        for table, column in connection.execute(columns, {"names": list(tables.metadata.tables)}).all():
            # Of the database's own kind; where that is "C" nothing is rewritten.
            connection.exec_driver_sql(f'ALTER TABLE {quote(table)} ALTER COLUMN {quote(column)} TYPE text COLLATE "C"')

    def translated(self, error: sa.exc.DBAPIError) -> MeshError | None:
        """See Backend."""
        state = _state(error)
        if state in _DISK_FULL:
            return disk_full("a change")
        gone = error.connection_invalidated or (not state and isinstance(error, sa.exc.OperationalError))
        return unavailable() if gone or state[:2] in _AWAY_CLASSES or state in _AWAY | _CONFLICTS else None

    def conflicted(self, error: sa.exc.DBAPIError) -> bool:
        """See Backend."""
        return _state(error) in _CONFLICTS

    async def listen(self, heard: Callable[[int], None]) -> None:
        """Call `heard` with each revision announced, on the event loop, for ever.

        The connection is made again when it is lost. 0 stands for what may have been announced while nobody listened.
        """
        driver: Any = self.write_engine.dialect.dbapi
        arguments, keywords = self.write_engine.dialect.create_connect_args(self._url)
        wait_s, told = 0.1, False
        while True:
            try:
                async with await driver.AsyncConnection.connect(*arguments, autocommit=True, **keywords) as connection:
                    await connection.execute(f"LISTEN {CHANNEL}")
                    if told:
                        log.info("the database can be listened to again")
                    wait_s, told = 0.1, False
                    heard(0)
                    async for notification in connection.notifies():
                        with contextlib.suppress(ValueError):
                            heard(int(notification.payload))
            except (driver.Error, OSError) as error:
                if not told:
                    log.warning("the database cannot be listened to; it is tried again", extra={"error": str(error)})
                told = True
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, RECONNECT_S_MAX)


def _configure(connection: Any, _record: object) -> None:
    """Set a new session up; what the server or the role says otherwise would break a promise."""
    connection.autocommit = True
    settings = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in _SESSION.items())
    connection.execute(f"SELECT {settings}").close()
    # "on" or stricter may have been chosen; "off" would lose what was answered.
    connection.execute(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    ).close()
    connection.autocommit = False


def _leave_a_standby(context: sa.engine.ExceptionContext) -> None:
    """Drop every connection to a server that became read-only in a failover: a new one may find its successor."""
    if getattr(context.original_exception, "sqlstate", None) == _NOT_WRITABLE:
        context.is_disconnect = True


def _state(error: sa.exc.DBAPIError) -> str:
    return getattr(error.orig, "sqlstate", None) or ""
