"""The registry put together: one folder, one database, its executors, and what must go on while it serves."""

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mlmesh_registry.artifacts import Artifacts
from mlmesh_registry.config import RegistrySettings
from mlmesh_registry.database import Database
from mlmesh_registry.events import Change
from mlmesh_registry.garbage import Garbage
from mlmesh_registry.ledger import SqlBlobLedger
from mlmesh_registry.places import open_blobs
from mlmesh_registry.postgresql import PostgresBackend, may_come_back, parse_url
from mlmesh_registry.search import Search
from mlmesh_registry.signatures import KeyFolder, Signatures
from mlmesh_registry.signing import BadKeyError, TrustedKeys
from mlmesh_registry.sqlite import SqliteBackend
from mlmesh_registry.store import SqlModelStore
from mlmesh_registry.verification import Verification
from mlmesh_registry.watch import ChangeFeed
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.errors import MeshError, NotReady
from mlmesh_runtime.executors import BoundedExecutor, Executors, run_blocking

log = logging.getLogger(__name__)

# SQLite has one writer; more threads would only wait for it. An object store answers late, so many ask it at a time.
_THREADS = {"sql-write": 1, "sql-read": 4, "disk": 16, "bulk": 4}
_UPKEEP_S_MAX = 600.0
# How long a start waits for a database that does not answer yet.
START_S = 10.0
_RETRY_S = 0.2


def utc_now() -> datetime:
    """The present time."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """A registry that is open."""

    store: SqlModelStore
    artifacts: Artifacts
    feed: ChangeFeed
    search: Search
    signatures: Signatures
    garbage: Garbage
    verification: Verification


@contextlib.asynccontextmanager
async def open_registry(
    data_dir: Path,
    settings: RegistrySettings,
    *,
    clock: Callable[[], datetime] = utc_now,
    new_id: Callable[[], str] = lambda: secrets.token_hex(16),
) -> AsyncIterator[Registry]:
    """Open the registry of a folder, made when it is not there; sweep what a crash left; keep it tidy while open.

    Errors: ConfigError when the folder cannot be used, or another process uses it.
    """
    loop = asyncio.get_running_loop()
    published: list[ChangeFeed] = []

    def tell(method: Callable[..., None], *arguments: object) -> None:
        # Calls from the one writer thread keep their order. A loop that is gone has no watchers.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(method, *arguments)

    def on_commit(changes: Sequence[Change]) -> None:
        tell(published[0].publish, changes)

    def on_doubt() -> None:
        if published:
            tell(published[0].heard, 0)

    postgres = PostgresBackend(parse_url(settings.database_url)) if settings.database_url else None
    async with contextlib.AsyncExitStack() as stack:
        held = stack.enter_context(contextlib.closing(_Folder(data_dir)))
        await held.hold(shared=postgres is not None)
        folder = held.path
        pools = Executors(_THREADS)
        database = Database(
            postgres or SqliteBackend(folder / "registry.sqlite"),
            writer=pools["sql-write"],
            readers=pools["sql-read"],
            clock=clock,
            changes_kept=settings.changes_kept,
            on_commit=on_commit,
            on_doubt=on_doubt,
        )
        stack.callback(database.close)
        await stack.enter_async_context(pools)
        await _migrated(database, pools["sql-write"])
        signatures = Signatures(database, _trusted_keys(settings.trusted_keys))
        store = SqlModelStore(
            database,
            deleted_kept=timedelta(seconds=settings.deleted_kept_s),
            valid_key_ids=signatures.valid_key_ids,
        )
        artifacts = Artifacts(
            await run_blocking(pools["disk"], open_blobs, settings.blobs_url, folder / "blobs"),
            SqlBlobLedger(database, upload_ttl_s=settings.upload_ttl_s, new_id=new_id),
            disk=pools["disk"],
            bulk=pools["bulk"],
            clock=clock,
            blob_bytes_max=settings.blob_bytes_max,
            commit_bytes=settings.commit_bytes,
            quarantine=store.quarantine_blob,
        )
        feed = ChangeFeed(
            store, queue_items_max=settings.watch_queue_items_max, bookmark_s=settings.bookmark_s, clock=clock
        )
        published.append(feed)
        await feed.open()
        # Elsewhere it may take its time, or the store not answer: there it is swept while it serves.
        if swept := held.alone and not settings.blobs_url:
            await artifacts.sweep()
        if postgres:
            held.share()
        await stack.enter_async_context(_beside(feed.follow(poll_s=settings.poll_s if postgres else None)))
        if postgres:
            await stack.enter_async_context(_beside(postgres.listen(feed.heard)))
        garbage = Garbage(
            database, remove=artifacts.remove, clock=clock, grace=timedelta(seconds=settings.garbage_grace_s)
        )
        await stack.enter_async_context(_beside(_upkeep(store, artifacts, garbage, settings, swept=swept)))
        yield Registry(
            store=store,
            artifacts=artifacts,
            feed=feed,
            search=Search(database),
            signatures=signatures,
            garbage=garbage,
            verification=Verification(store, verify=artifacts.verify, clock=clock),
        )


def _trusted_keys(folder: str) -> Callable[[], TrustedKeys]:
    try:
        return KeyFolder(Path(folder)) if folder else TrustedKeys
    except BadKeyError as error:
        raise ConfigError(f"MLMESH_REGISTRY_TRUSTED_KEYS: {error}") from None


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run work for the length of a block. Not a TaskGroup, which would hide what the block raises in a group."""
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work beside the registry ended early", exc_info=error)


async def _upkeep(
    store: SqlModelStore, artifacts: Artifacts, garbage: Garbage, settings: RegistrySettings, *, swept: bool
) -> None:
    """Discard what is past its time, now and then; a full disk or a busy moment does not end it."""
    for round_number in itertools.count():
        try:
            if not swept:
                await artifacts.sweep()
                swept = True
            await artifacts.examine()
            await artifacts.expire()
            await store.forget_requests(keep_s=settings.request_ttl_s)
            if round_number:
                # Not in the first: who has just started has more urgent things to do.
                await garbage.collect(grace=None, dry_run=False)
        except (MeshError, OSError):
            log.warning("upkeep failed; it is tried again", exc_info=True)
            # What it could not remove has no row any more.
            swept = False
        await asyncio.sleep(min(_UPKEEP_S_MAX, settings.upload_ttl_s / 4))


async def _migrated(database: Database, writer: BoundedExecutor) -> None:
    """Migrate; a database that starts or fails over at this moment is waited for.

    Errors: ConfigError when it cannot be used, with the driver's words.
    """
    loop = asyncio.get_running_loop()
    give_up = loop.time() + START_S
    while True:
        try:
            return await run_blocking(writer, database.migrate)
        except NotReady as error:
            cause = error.__cause__
            text = str(getattr(cause, "orig", cause)).strip()
            if loop.time() > give_up or not may_come_back(text):
                raise ConfigError(f"MLMESH_REGISTRY_DATABASE_URL: the database cannot be used: {text}") from error
        except sa.exc.DBAPIError as error:
            raise ConfigError(f"MLMESH_REGISTRY_DATABASE_URL: the database cannot be used: {error.orig}") from error
        await asyncio.sleep(_RETRY_S)


class _Folder:
    """A data folder that this process holds: `alone`, until it shares it.

    Registries that share a database may share its folder. Otherwise a second process would sweep away what the first is
    writing, and a SQLite database would have two masters.
    """

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir.absolute()
        self._in_use = f"MLMESH_DATA_DIR: {data_dir} is used by another registry process"
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"MLMESH_DATA_DIR: cannot use {data_dir}: {error.strerror}") from error
        self.alone = self._locked(fcntl.LOCK_EX)

    async def hold(self, *, shared: bool) -> None:
        """Wait for those who hold it only while they start. Errors: ConfigError when it is used by others."""
        loop = asyncio.get_running_loop()
        give_up = loop.time() + START_S
        while not self.alone and not (shared and self._locked(fcntl.LOCK_SH)):
            if not shared or loop.time() > give_up:
                raise ConfigError(self._in_use)
            await asyncio.sleep(_RETRY_S)

    def share(self) -> None:
        """Let other registries of the same database in."""
        # Linux gives the one lock up before it takes the other, so somebody may come in between.
        if self.alone and not self._locked(fcntl.LOCK_SH):
            raise ConfigError(self._in_use)

    def close(self) -> None:
        """Let go."""
        os.close(self._fd)

    def _locked(self, kind: int) -> bool:
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
