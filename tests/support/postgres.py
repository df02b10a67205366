"""A throw-away PostgreSQL server of the distribution's package, and databases in it. Tests skip where it is missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import psycopg
import pytest

from mlmesh_registry import postgresql

MISSING = "PostgreSQL is not installed: `make tools` installs it on Debian and its kin"
_READY = "database system is ready to accept connections"
_START_S = 60.0
# Who the server runs as when the tests run as root, which initdb refuses.
_USER = "postgres"
# `locked` needs a password, everybody else is trusted: only this user's processes reach the socket's folder.
_HBA = "local all locked scram-sha-256\nlocal all all trust\n"
# Of Debian's util-linux, as the server is of Debian's package. Python's own `user` would fork, which gRPC's threads do
# not like; and the server goes when the tests are killed.
_AS_USER = ["setpriv", "--pdeathsig", "QUIT"]
if os.geteuid() == 0:
    _AS_USER += [f"--reuid={_USER}", f"--regid={_USER}", "--init-groups"]
_UNSAFE = {"fsync": "off", "full_page_writes": "off"}
_SETTINGS = {
    "listen_addresses": "",
    "shared_buffers": "32MB",
    "max_connections": "100",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "log_min_messages": "warning",
    "password_encryption": "scram-sha-256",
}


def programs() -> Path | None:
    """Folder of the newest server's programs, None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class PostgresServer:
    """A server on a Unix socket in a folder of its own. Use `postgres_running`."""

    def __init__(self, binaries: Path, folder: Path, *, durable: bool) -> None:
        self._binaries = binaries
        self._folder = folder
        # Through the write-ahead log is for those who keep it.
        self._strategy = "WAL_LOG" if durable else "FILE_COPY"
        self._settings = _SETTINGS | ({} if durable else _UNSAFE)
        self._names = count(1)
        self._popen: subprocess.Popen[str] | None = None
        self._log: deque[str] = deque(maxlen=1000)

    @property
    def folder(self) -> Path:
        """Where its socket is."""
        return self._folder

    def init(self) -> None:
        """Make the cluster."""
        arguments = ["-D", str(self._folder / "data"), "-U", _USER, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8"]
        self._run("initdb", *arguments, "--no-sync", "--no-instructions")
        (self._folder / "data" / "pg_hba.conf").write_text(_HBA)

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        options = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        command = [str(self._binaries / "postgres"), "-D", str(self._folder / "data"), "-k", str(self._folder)]
        self._popen = subprocess.Popen(
            [*_AS_USER, *command, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self._folder,
        )
        ready = threading.Event()
        threading.Thread(target=self._read, args=(self._popen, ready), daemon=True).start()
        if not ready.wait(_START_S) or self._popen.poll() is not None:
            raise RuntimeError(f"PostgreSQL did not start ({self._popen.poll()}):\n{self.log()}")

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """Stop it: SIGQUIT at once, as a crash would; SIGINT after telling its clients."""
        if self._popen is not None:
            self._popen.send_signal(signal.SIGCONT)
            self._popen.send_signal(how)
            self._popen.wait(_START_S)
            self._popen = None

    def restart(self) -> None:
        """Crash it and start it again."""
        self.stop()
        self.start()

    def log(self) -> str:
        """What it said."""
        return "\n".join(self._log)

    def url(self, database: str, user: str = _USER) -> str:
        """URL of a database, as the registry takes it."""
        return f"postgresql://{user}@/{database}?host={self._folder}"

    def create(self, *, template: str = "template0") -> str:
        """Make a database from a template that nobody uses; its URL."""
        name = f"test_{next(self._names)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY {self._strategy}")
        return self.url(name)

    def create_in(self, folder: Path) -> str:
        """Make a database whose files are in a folder that every user may write to; its URL. `drop` it in the end."""
        name = f"test_{next(self._names)}"
        self.execute(f"CREATE TABLESPACE {name} LOCATION '{_made(folder / name)}'")
        self.execute(f"CREATE DATABASE {name} TEMPLATE template0 TABLESPACE {name}")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove what `create` or `create_in` made."""
        name = name_of(url)
        self.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        self.execute(f"DROP TABLESPACE IF EXISTS {name}")

    def disconnect(self, database: str, clients: str = "true") -> int:
        """End the connections to a database, of those clients for whom a condition on pg_stat_activity holds."""
        whose = f"{clients} AND datname = '{database}'"
        ended = self.execute(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {whose}")  # noqa: S608
        return sum(done is True for (done,) in ended)

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run one statement, outside of a transaction; its rows."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _read(self, popen: subprocess.Popen[str], ready: threading.Event) -> None:
        assert popen.stderr is not None
        with popen.stderr as lines:
            for line in lines:
                self._log.append(line.rstrip("\n"))
                if _READY in line:
                    ready.set()
        ready.set()

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*_AS_USER, str(self._binaries / program), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            cwd=self._folder,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}{done.stderr}")


def name_of(url: str) -> str:
    """The database that a server's URL names."""
    return url.partition("@/")[2].partition("?")[0]


def _made(folder: Path) -> Path:
    folder.mkdir()
    if os.geteuid() == 0:
        shutil.chown(folder, _USER, _USER)
    return folder


@contextlib.contextmanager
def postgres_running(*, durable: bool = False) -> Iterator[PostgresServer]:
    """A server for the length of a block; `durable`: it syncs to disk. Skips the test where it is not installed."""
    binaries = programs()
    if binaries is None:
        pytest.skip(MISSING)
    # Not in pytest's folder, which another user may not enter; and a socket's path is at most 107 bytes.
    memory = None if durable or not os.access("/dev/shm", os.W_OK) else "/dev/shm"
    with tempfile.TemporaryDirectory(prefix="mlmesh-pg-", dir=memory, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if os.geteuid() == 0:
            shutil.chown(folder, _USER, _USER)
        server = PostgresServer(binaries, folder, durable=durable)
        server.init()
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for all tests that do not stop it."""
    with postgres_running() as server, pytest.MonkeyPatch.context() as patch:
        # On a busy machine a test may get no processor for seconds, in the middle of a transaction.
        patch.setitem(postgresql._SESSION, "idle_in_transaction_session_timeout", "60s")
        yield server


@pytest.fixture
def shared_url(postgres: PostgresServer, registry_template: str) -> Iterator[str]:
    """URL of a database of this test's own, with the registry's schema."""
    url = postgres.create(template=registry_template)
    yield url
    postgres.drop(url)


@pytest.fixture(scope="session")
def registry_template(postgres: PostgresServer) -> str:
    """Name of a database with the registry's schema, to make others from."""
    name = "registry_template"
    postgres.execute(f"CREATE DATABASE {name} TEMPLATE template0")
    migrate_registry(postgres.url(name))
    return name


def migrate_registry(url: str) -> None:
    """Make the registry's schema in a database."""
    # Every test imports this module; few need the registry.
    from mlmesh_registry.database import Database
    from mlmesh_registry.postgresql import PostgresBackend, parse_url
    from mlmesh_runtime.executors import Executors

    pools = Executors({"writer": 1, "readers": 1})
    database = Database(
        PostgresBackend(parse_url(url)),
        writer=pools["writer"],
        readers=pools["readers"],
        clock=lambda: datetime.now(UTC),
        changes_kept=1,
        on_commit=lambda _changes: None,
    )
    try:
        database.migrate()
    finally:
        database.close()
