"""The registry put together: one folder, one database, its executors, and what must go on while it serves."""

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlmesh_registry.artifacts import Artifacts
from mlmesh_registry.blobs import LocalBlobs
from mlmesh_registry.config import RegistrySettings
from mlmesh_registry.database import Database
from mlmesh_registry.events import Change
from mlmesh_registry.ledger import SqlBlobLedger
from mlmesh_registry.store import SqlModelStore
from mlmesh_registry.watch import ChangeFeed
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.executors import Executors, run_blocking

log = logging.getLogger(__name__)

# SQLite has one writer; more threads would only wait for it.
_THREADS = {"sql-write": 1, "sql-read": 4, "disk": 8}
_UPKEEP_S_MAX = 600.0


def utc_now() -> datetime:
    """The present time."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """A registry that is open."""

    store: SqlModelStore
    artifacts: Artifacts
    feed: ChangeFeed


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

    def on_commit(changes: Sequence[Change]) -> None:
        # Calls from the one writer thread keep their order. A loop that is gone has no watchers.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(published[0].publish, changes)

    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(_only_user(data_dir))
        pools = Executors(_THREADS)
        database = Database(
            f"sqlite:///{folder / 'registry.sqlite'}",
            writer=pools["sql-write"],
            readers=pools["sql-read"],
            clock=clock,
            changes_kept=settings.changes_kept,
            on_commit=on_commit,
        )
        stack.callback(database.close)
        await stack.enter_async_context(pools)
        await run_blocking(pools["sql-write"], database.migrate)
        store = SqlModelStore(database)
        artifacts = Artifacts(
            await run_blocking(pools["disk"], LocalBlobs, folder / "blobs"),
            SqlBlobLedger(database, upload_ttl_s=settings.upload_ttl_s, new_id=new_id),
            disk=pools["disk"],
            clock=clock,
            blob_bytes_max=settings.blob_bytes_max,
            commit_bytes=settings.commit_bytes,
        )
        feed = ChangeFeed(
            store, queue_items_max=settings.watch_queue_items_max, bookmark_s=settings.bookmark_s, clock=clock
        )
        published.append(feed)
        await feed.open()
        await artifacts.sweep()
        await stack.enter_async_context(_beside(_upkeep(store, artifacts, settings)))
        yield Registry(store=store, artifacts=artifacts, feed=feed)


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


async def _upkeep(store: SqlModelStore, artifacts: Artifacts, settings: RegistrySettings) -> None:
    """Discard what is past its time, now and then; a full disk or a busy moment does not end it."""
    while True:
        try:
            await artifacts.expire()
            await store.forget_requests(keep_s=settings.request_ttl_s)
        except (MeshError, OSError):
            log.warning("upkeep failed; it is tried again", exc_info=True)
        await asyncio.sleep(min(_UPKEEP_S_MAX, settings.upload_ttl_s / 4))


@contextlib.contextmanager
def _only_user(data_dir: Path) -> Iterator[Path]:
    """Hold the folder and give its absolute path: a second process would sweep away what this one is writing."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"MLMESH_DATA_DIR: cannot use {data_dir}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise ConfigError(f"MLMESH_DATA_DIR: {data_dir} is used by another registry process") from error
    try:
        yield data_dir.absolute()
    finally:
        os.close(fd)
