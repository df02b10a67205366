"""The few things that are asked of a cluster: create, read, suspend, delete and watch one TrainJob.

Errors of all methods: Denied (the service account may not), InvalidInput (the API server refuses the object), NotReady
(the API server does not answer or is overloaded).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import Any

import httpx2
from lightkube import AsyncClient, KubeConfig
from lightkube.core.exceptions import ApiError, ConfigError
from lightkube.generic_resource import create_namespaced_resource
from lightkube.types import CascadeType, PatchType

from mlmesh_runtime import config
from mlmesh_runtime.errors import Denied, InvalidInput, NotReady
from mlmesh_training.backends.kubernetes.objects import GROUP, VERSION

_NOT_FOUND, _CONFLICT, _GONE = 404, 409, 410
_DENIED = frozenset({401, 403})
_REFUSED = frozenset({400, 422})
_TRAIN_JOB = create_namespaced_resource(GROUP, VERSION, "TrainJob", "trainjobs")
QUIET_S = 60.0
"""A watch that tells nothing for this long is begun anew."""


class Cluster:
    """TrainJobs of one namespace. An async context manager.

    Args:
        kubeconfig: a file; None takes the pod's own service account.

    Errors: mlmesh_runtime.config.ConfigError when there is neither.
    """

    def __init__(self, namespace: str, *, kubeconfig: str | None = None) -> None:
        self._namespace = namespace
        try:
            known = KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_service_account()
        except (ConfigError, OSError, ValueError) as error:
            raise config.ConfigError(
                f"the Kubernetes backend needs a pod's service account or MLMESH_TRAINING_KUBECONFIG: {error}"
            ) from None
        self._client = AsyncClient(config=known, namespace=namespace, trust_env=False, field_manager="mlmesh")

    async def __aenter__(self) -> Cluster:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def get(self, name: str) -> dict[str, Any] | None:
        """The TrainJob as it is now."""
        with _mapped():
            try:
                return dict(await self._client.get(_TRAIN_JOB, name))
            except ApiError as error:
                if error.status.code != _NOT_FOUND:
                    raise
        return None

    async def create(self, wanted: dict[str, Any]) -> None:
        """Create it; one of that name that is there already is left as it is."""
        with _mapped():
            try:
                await self._client.create(_TRAIN_JOB(**wanted))
            except ApiError as error:
                if error.status.code != _CONFLICT:
                    raise

    async def suspend(self, name: str, wanted: bool) -> None:
        """Ask for it to be suspended, or to go on. One that is gone is passed over."""
        with _mapped():
            try:
                await self._client.patch(_TRAIN_JOB, name, {"spec": {"suspend": wanted}}, patch_type=PatchType.MERGE)
            except ApiError as error:
                if error.status.code != _NOT_FOUND:
                    raise

    async def delete(self, name: str) -> None:
        """Delete it after all that it made (foreground). One that is gone is passed over."""
        with _mapped():
            try:
                await self._client.delete(_TRAIN_JOB, name, cascade=CascadeType.FOREGROUND)
            except ApiError as error:
                if error.status.code != _NOT_FOUND:
                    raise

    async def watch(self, name: str) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The TrainJob now, None when there is none, and again after each change. It has no end of its own.

        Each round begins with a read of the present state, so nothing is missed; a round in which nothing comes for
        QUIET_S is begun anew, so a connection that died without a word is noticed. Errors: as all.
        """
        while True:
            found = await self.get(name)
            yield found
            version = found["metadata"]["resourceVersion"] if found else None
            async with contextlib.aclosing(self._changes(name, version)) as changes:
                async for changed in changes:
                    yield changed

    async def _changes(self, name: str, version: str | None) -> AsyncGenerator[dict[str, Any] | None, None]:
        """Changes behind a version until there is none for QUIET_S, or the version is too old."""
        stream = self._client.watch(_TRAIN_JOB, fields={"metadata.name": name}, resource_version=version)
        changes = aiter(stream)
        while True:
            with _mapped():
                try:
                    async with asyncio.timeout(QUIET_S):
                        operation, changed = await anext(changes)
                except TimeoutError:
                    return
                except ApiError as error:
                    if error.status.code == _GONE:
                        return
                    raise
            yield None if operation == "DELETED" else dict(changed)


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        text = f"Kubernetes says {error.status.code}: {error.status.message}"
        if error.status.code in _DENIED:
            raise Denied(text) from error
        if error.status.code in _REFUSED:
            raise InvalidInput(text) from error
        raise NotReady(text) from error
    except httpx2.HTTPError as error:
        raise NotReady(f"Kubernetes does not answer: {error or type(error).__name__}") from error
