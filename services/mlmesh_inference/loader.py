"""Keeps the catalog at what the registry and the selectors ask for.

`Loader` compares what is wanted with what is here whenever either changes, and acts: versions that lack are loaded, the
default moves when its version answers, and only then are versions that nobody wants any more drained. A version that
cannot be loaded changes nothing for the one that serves.

At the start, when the registry does not answer, what it said last is served from the verified cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Final

from mlmesh_inference.catalog import ReadyModel, State, Status
from mlmesh_inference.desired import RegistryView, Selector, VersionRecord, Wanted, wanted
from mlmesh_inference.follow import Follower
from mlmesh_inference.loading import Loading
from mlmesh_runtime.errors import NotFound, WrongState
from mlmesh_runtime.executors import run_blocking

_LOG = logging.getLogger(__name__)

FALLBACK_S: Final = 3.0
"""How long the registry may take to say its first word before the cache is served."""

_Key = tuple[str, int]


class Loader:
    """Loads and unloads versions, for as long as `run` runs.

    Args:
        loading: how one version is loaded. on_synced: is called once, when the start is over.
        fallback_s: how long to wait for the registry's first word.
    """

    def __init__(
        self, loading: Loading, *, on_synced: Callable[[], None] = lambda: None, fallback_s: float = FALLBACK_S
    ) -> None:
        self._loading = loading
        self._catalog = loading.catalog
        self._cache = loading.cache
        self._on_synced = on_synced
        self._fallback_s = fallback_s
        self._changed = asyncio.Event()
        self._follower = Follower(loading.source, self._changed, sleep=loading.sleep)
        self._remembered: RegistryView | None = None
        self._saved: RegistryView | None = None
        self._added: list[Selector] = []
        self._excluded: set[str] = set()
        self._tasks: dict[_Key, asyncio.Task[None]] = {}
        self._aliases: dict[str, dict[str, int]] = {}

    @property
    def _view(self) -> RegistryView | None:
        return self._follower.view or self._remembered

    async def run(self) -> None:
        """Follow the registry for ever. Cancel it to stop; loads under way are given up, what serves goes on."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follower.run())
            await self._first_word()
            while True:
                self._changed.clear()
                self._reconcile(group)
                await self._remember()
                await self._changed.wait()

    async def _first_word(self) -> None:
        """Wait until the registry has spoken, or for too long; then fall back on what it said last."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._fallback_s):
                while self._follower.view is None:
                    self._changed.clear()
                    await self._changed.wait()
        if self._follower.view is None:
            self._remembered = await run_blocking(self._loading.disk, self._cache.remembered)
            if self._remembered is not None:
                _LOG.warning(
                    "the registry does not answer: serving from the cache",
                    extra={"revision": self._remembered.revision},
                )

    async def _remember(self) -> None:
        view = self._follower.view
        if view is None or view is self._saved:
            return
        self._saved = view
        try:
            await run_blocking(self._loading.disk, self._cache.save, view)
        except OSError as error:
            _LOG.warning("the registry's state cannot be kept", extra={"error": str(error)})

    def _target(self) -> dict[str, Wanted]:
        view = self._view
        if view is None:
            return {}
        selectors = (*self._loading.settings.selectors, *self._added)
        return {model: want for model, want in wanted(selectors, view).items() if model not in self._excluded}

    def _reconcile(self, group: asyncio.TaskGroup) -> None:
        view = self._view
        if view is None:
            return
        target = self._target()
        keys = {(model, version) for model, want in target.items() for version in want.versions}
        for key in list(self._tasks):
            status = self._catalog.status(*key)
            task = self._tasks[key]
            if key not in keys and status is not None and status.state is not State.DRAINING and not task.cancelling():
                task.cancel()
        for model, version in sorted(keys):
            if self._catalog.status(model, version) is None and (model, version) not in self._tasks:
                self._start(group, view.versions[model, version])
        for model in {status.model for status in self._catalog.statuses()}:
            self._point(model, target.get(model), view)
        for status in self._catalog.statuses():
            if (status.model, status.version) not in keys and not self._stands_in(status, target, view):
                self._retire(group, status)
        if not self._catalog.synced and all(_settled(self._catalog.status(*key)) for key in keys):
            self._catalog.synced = True
            self._on_synced()

    def _start(self, group: asyncio.TaskGroup, record: VersionRecord) -> None:
        key = (record.model, record.version)

        async def load() -> None:
            try:
                await self._loading.load(record, self._changed.set)
            finally:
                if self._catalog.ready(*key) is None:
                    status = self._catalog.status(*key)
                    if status is not None and status.state is not State.FAILED:
                        self._catalog.forget(*key)
                del self._tasks[key]
                self._changed.set()

        self._tasks[key] = group.create_task(load())

    def _point(self, model: str, want: Wanted | None, view: RegistryView) -> None:
        """Move default and aliases to what is wanted as soon as it answers; until then they stay where they may."""
        statuses = [status for status in self._catalog.statuses(model) if status.state is State.READY]
        ready = {status.version for status in statuses if view.servable(model, status.version)}
        present = self._catalog.default_version(model)
        choices = [want.default if want else 0, present, *(want.versions if want else ())]
        default = next((version for version in choices if version in ready), 0)
        aliases = _aliases(view.aliases_of(model), self._aliases.get(model, {}), ready)
        if default != present or aliases != self._aliases.get(model):
            self._aliases[model] = aliases
            self._catalog.point(model, default=default, aliases=aliases)

    def _stands_in(self, status: Status, target: Mapping[str, Wanted], view: RegistryView) -> bool:
        """Whether a version that is not wanted answers for one that is wanted and does not answer yet."""
        model, version = status.model, status.version
        want = target.get(model)
        if want is None or status.state is not State.READY or not view.servable(model, version):
            return False
        if self._catalog.default_version(model) == version:
            return True
        said = view.aliases_of(model)
        return any(
            number == version and said.get(alias) != version and said.get(alias) in want.versions
            for alias, number in self._aliases.get(model, {}).items()
        )

    def _retire(self, group: asyncio.TaskGroup, status: Status) -> None:
        key = (status.model, status.version)
        if status.state is State.FAILED:
            self._catalog.forget(*key)
        elif status.state is State.READY:
            ready = self._catalog.withdraw(*key)
            if ready is not None:
                self._tasks[key] = group.create_task(self._drain(ready))

    async def _drain(self, ready: ReadyModel) -> None:
        key = (ready.name, ready.version)
        try:
            await ready.runner.drain()
            await run_blocking(self._loading.disk, self._cache.remove, *key)
            await run_blocking(self._loading.disk, self._cache.sweep, self._digests_kept())
        except OSError as error:
            _LOG.warning("old files stay", extra={"error": str(error)})
        finally:
            ready.statistics.close()
            self._catalog.forget(*key)
            del self._tasks[key]
            self._changed.set()

    def _digests_kept(self) -> set[str]:
        """Digests of what is here and of what an alias names: a way back should not need a fetch."""
        view = self._view or RegistryView()
        keys = {(status.model, status.version) for status in self._catalog.statuses()}
        keys |= {(model, version) for (model, _), version in view.aliases.items()}
        return {file.sha256 for key in keys if key in view.versions for file in view.versions[key].files}

    async def load(self, model: str) -> None:
        """Load by hand; see oip.servicer.Repository. Raises WrongState (ENGINE_FAILED) when it cannot be loaded."""
        view = self._view
        if view is None or not view.numbers(model):
            raise NotFound(f"failed to load '{model}', failed to poll from model repository", reason="MODEL_NOT_FOUND")
        self._excluded.discard(model)
        if model not in self._target():
            self._added.append(Selector(model=model))
        versions = self._target()[model].versions
        for version in versions:
            status = self._catalog.status(model, version)
            if status is not None and status.state is State.FAILED:
                self._catalog.forget(model, version)
        async with self._catalog.watch(model) as changes:
            self._changed.set()
            while not self._loaded(model, versions):
                await anext(changes)

    def _loaded(self, model: str, versions: tuple[int, ...]) -> bool:
        statuses = [self._catalog.status(model, version) for version in versions]
        for status in statuses:
            if status is not None and status.state is State.FAILED:
                raise WrongState(
                    f"load failed for model '{model}': version {status.version} is at UNAVAILABLE state: "
                    f"{status.error}",
                    reason="ENGINE_FAILED",
                )
        ready = all(status is not None and status.state is State.READY for status in statuses)
        return ready and self._catalog.default_version(model) in versions

    async def unload(self, model: str) -> None:
        """Unload by hand; see oip.servicer.Repository."""
        if not self._catalog.statuses(model):
            raise NotFound(f"failed to unload '{model}', it is not served", reason="MODEL_NOT_FOUND")
        self._excluded.add(model)
        async with self._catalog.watch(model) as changes:
            self._changed.set()
            while self._catalog.statuses(model):
                await anext(changes)


def _aliases(said: Mapping[str, int], before: Mapping[str, int], ready: set[int]) -> dict[str, int]:
    """Aliases whose version answers; one that moved to a version on its way stays where it was."""
    result = {}
    for alias, version in said.items():
        if version in ready:
            result[alias] = version
        elif before.get(alias) in ready:
            result[alias] = before[alias]
    return result


def _settled(status: Status | None) -> bool:
    """Ready or failed, or waiting for bytes that do not come: nothing that the start should wait for."""
    return status is not None and (
        status.state in (State.READY, State.FAILED) or (status.state is State.FETCHING and bool(status.error))
    )
