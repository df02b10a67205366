"""Composition: a backend on a cluster out of its parts, opened and closed in order."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

from mlmesh_runtime.chunks import fsync_directory
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.executors import BoundedExecutor, run_blocking
from mlmesh_training.backends.kubernetes.backend import KubernetesBackend
from mlmesh_training.backends.kubernetes.cluster import Cluster
from mlmesh_training.backends.kubernetes.config import KubernetesSettings
from mlmesh_training.backends.kubernetes.hub import WorkerHub

KEY_FILE = "workers.key"
_KEY_BYTES = 32


@contextlib.asynccontextmanager
async def open_kubernetes(
    settings: KubernetesSettings, *, folder: Path, executor: BoundedExecutor
) -> AsyncIterator[tuple[KubernetesBackend, WorkerHub]]:
    """The backend, and the hub that its workers meet.

    Args:
        folder: the service's; jobs are in `jobs` below it.

    Errors: ConfigError when there is no way to a cluster.
    """
    hub = WorkerHub(await run_blocking(executor, key_of, folder))
    async with Cluster(settings.placement.namespace, kubeconfig=settings.kubeconfig or None) as cluster:
        backend = KubernetesBackend(
            folder / "jobs",
            cluster=cluster,
            hub=hub,
            placement=settings.placement,
            executor=executor,
            limits=settings.limits,
        )
        yield backend, hub


def key_of(folder: Path) -> bytes:
    """The secret by which this service knows its workers, made at the first start. It outlives restarts, as they do.

    Errors: ConfigError when the file is not one of ours.
    """
    path = folder / KEY_FILE
    try:
        with contextlib.suppress(FileExistsError):
            partial = path.with_suffix(".part")
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            # A link, not a rename: a key that is there stays.
            os.link(partial, path)
            fsync_directory(folder)
        path.with_suffix(".part").unlink(missing_ok=True)
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"MLMESH_DATA_DIR: {path} cannot be used: {error.strerror}") from None
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"{path}: expected {_KEY_BYTES} bytes, found {len(key)}; remove it to have a new one made")
    return key
