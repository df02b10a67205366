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
from dataclasses import replace
from typing import Final

from mlmesh_inference.catalog import ReadyModel, State, Status
from mlmesh_inference.desired import RegistryView, Selector, VersionRecord, Wanted, wanted
from mlmesh_inference.follow import Follower
from mlmesh_inference.loading import Loading, Prepared
from mlmesh_inference.overrides import Override, chosen, overlaid, uploaded
from mlmesh_inference.residency import Resident, make_room
from mlmesh_runtime.calls import detached
from mlmesh_runtime.errors import MeshError, NotFound, NotReady, WrongState
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
        self._overrides: dict[str, Override] = {}
        self._brought: dict[str, tuple[VersionRecord, ...]] = {}
        self._orders: dict[str, set[_Key]] = {}
        """Models being loaded anew by hand, and the versions that this is about."""
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[_Key, asyncio.Task[None]] = {}
        self._leaving: set[ReadyModel] = set()
        self._aliases: dict[str, dict[str, int]] = {}
        self._asleep: set[_Key] = set()
        self._catalog.on_wanted = self._wake

    @property
    def _view(self) -> RegistryView | None:
        return overlaid(self._follower.view or self._remembered, self._brought)

    async def run(self) -> None:
        """Follow the registry for ever. Cancel it to stop; loads under way are given up, what serves goes on."""
        async with asyncio.TaskGroup() as group:
            self._group = group
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
        target = wanted(selectors, view)
        for model, override in self._overrides.items():
            if (want := chosen(model, override.config, view, target.get(model))) is not None:
                target[model] = want
        return {model: want for model, want in target.items() if model not in self._excluded}

    def _reconcile(self, group: asyncio.TaskGroup) -> None:
        view = self._view
        if view is None:
            return
        target = self._target()
        ordered = {key for keys in self._orders.values() for key in keys}
        keys = ordered | {(model, version) for model, want in target.items() for version in want.versions}
        for key in list(self._tasks):
            status = self._catalog.status(*key)
            task = self._tasks[key]
            if key not in keys and status is not None and status.state is not State.DRAINING and not task.cancelling():
                task.cancel()
        self._asleep &= keys
        for model, version in sorted(keys - ordered):
            if (model, version) in self._tasks:
                continue
            status = self._catalog.status(model, version)
            record = view.versions[model, version]
            if status is None and not self._catalog.synced and not self._fits(record, view):
                file = record.model_file
                self._asleep.add((model, version))
                self._catalog.rest(model, version, total_bytes=record.size, sha256=file.sha256 if file else "")
            elif status is None or (status.state is State.ASLEEP and (model, version) not in self._asleep):
                self._start(group, record)
        self._keep_budget(group)
        for model in {status.model for status in self._catalog.statuses()}:
            self._point(model, target.get(model), view)
        for status in self._catalog.statuses():
            wanted_here = (status.model, status.version) in keys or self._stands_in(status, target, view)
            if not wanted_here and not self._composes(status, view):
                self._retire(group, status)
        if not self._catalog.synced and all(_settled(self._catalog.status(*key)) for key in keys):
            self._catalog.synced = True
            self._on_synced()

    def _fits(self, record: VersionRecord, view: RegistryView) -> bool:
        """Whether a version may be loaded at the start, as far as sizes of files tell."""
        budget = self._loading.settings.memory_bytes
        taken = sum(view.versions[key].size for key in self._tasks if key in view.versions)
        taken += sum(model.facts.memory_bytes for model in self._catalog.ready_models())
        return not budget or not taken or taken + record.size <= budget

    def _wake(self, model: str, version: int) -> None:
        """Somebody asked for a version that sleeps."""
        self._asleep.discard((model, version))
        self._changed.set()

    def _keep_budget(self, group: asyncio.TaskGroup) -> None:
        """Put the longest unused versions to sleep when all together, with those on their way, take too much."""
        view, budget = self._view, self._loading.settings.memory_bytes
        if not budget or view is None:
            return
        ready = self._catalog.ready_models()
        needed = {key for model in ready for key in model.composing}
        residents = [
            Resident(
                key=(model.name, model.version),
                memory_bytes=model.facts.memory_bytes,
                used_s=self._used_s(model),
                pinned=(model.name, model.version) in needed
                or (model.name, model.version) in self._tasks
                # Sleep would forget them; nobody's sequence rests longer than its model's idle time.
                or getattr(model.runner, "sequences", 0) > 0,
            )
            for model in ready
        ]
        present = {resident.key for resident in residents}
        coming = sum(view.versions[key].size for key in self._tasks if key not in present and key in view.versions)
        for key in make_room(residents, budget_bytes=budget, coming_bytes=coming):
            asleep = self._catalog.sleep(*key)
            if asleep is not None:
                self._asleep.add(key)
                self._tasks[key] = group.create_task(self._put_to_sleep(asleep))

    def _used_s(self, ready: ReadyModel) -> float:
        """When a version was last asked, or came."""
        status = self._catalog.status(ready.name, ready.version)
        return max(ready.statistics.last_inference_s, status.updated_s if status is not None else 0.0)

    async def _put_to_sleep(self, ready: ReadyModel) -> None:
        key = (ready.name, ready.version)
        try:
            await ready.runner.drain()
        finally:
            ready.statistics.close()
            self._catalog.asleep(*key)
            del self._tasks[key]
            self._changed.set()
        _LOG.info("model asleep", extra={"model": ready.name, "version": ready.version})

    def _start(self, group: asyncio.TaskGroup, record: VersionRecord) -> None:
        key = (record.model, record.version)

        async def load() -> None:
            try:
                override = self._overrides.get(record.model)
                await self._loading.load(record, self._changed.set, config=override.config if override else None)
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
        statuses = [status for status in self._catalog.statuses(model) if self._answers(status)]
        ready = {status.version for status in statuses if view.servable(model, status.version)}
        present = self._catalog.default_version(model)
        choices = [want.default if want else 0, present, *(want.versions if want else ())]
        default = next((version for version in choices if version in ready), 0)
        aliases = _aliases(view.aliases_of(model), self._aliases.get(model, {}), ready)
        if default != present or aliases != self._aliases.get(model):
            self._aliases[model] = aliases
            self._catalog.point(model, default=default, aliases=aliases)

    def _answers(self, status: Status) -> bool:
        """Whether requests for it are answered, if only after it was woken."""
        return status.state is State.READY or self._catalog.sleeps(status.model, status.version)

    def _stands_in(self, status: Status, target: Mapping[str, Wanted], view: RegistryView) -> bool:
        """Whether a version that is not wanted answers for one that is wanted and does not answer yet."""
        model, version = status.model, status.version
        want = target.get(model)
        if want is None or not self._answers(status) or not view.servable(model, version):
            return False
        if self._catalog.default_version(model) == version:
            return True
        said = view.aliases_of(model)
        return any(
            number == version and said.get(alias) != version and said.get(alias) in want.versions
            for alias, number in self._aliases.get(model, {}).items()
        )

    def _composes(self, status: Status, view: RegistryView) -> bool:
        """Whether an ensemble that answers, or still drains, is made of this version."""
        model, version = status.model, status.version
        if status.state is not State.READY or not view.servable(model, version) or model in self._excluded:
            return False
        ensembles = (*self._catalog.ready_models(), *self._leaving)
        return any((model, version) in ready.composing for ready in ensembles)

    def _retire(self, group: asyncio.TaskGroup, status: Status) -> None:
        key = (status.model, status.version)
        if status.state in (State.FAILED, State.ASLEEP):
            self._catalog.forget(*key)
        elif status.state is State.READY:
            ready = self._catalog.withdraw(*key)
            if ready is not None:
                self._tasks[key] = group.create_task(self._drain(ready))

    async def _drain(self, ready: ReadyModel) -> None:
        key = (ready.name, ready.version)
        self._leaving.add(ready)
        try:
            await ready.runner.drain()
            await run_blocking(self._loading.disk, self._cache.remove, *key)
            await run_blocking(self._loading.disk, self._cache.sweep, self._digests_kept())
        except OSError as error:
            _LOG.warning("old files stay", extra={"error": str(error)})
        finally:
            self._leaving.discard(ready)
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

    def record(self, model: str, version: int) -> VersionRecord | None:
        """What is known of a version, None when nothing is."""
        return None if self._view is None else self._view.versions.get((model, version))

    async def load(self, model: str, override: Override | None = None) -> None:
        """Load by hand; see oip.repository.Repository. Raises WrongState (ENGINE_FAILED) when it cannot be loaded."""
        if override is not None or model in self._overrides:
            await self._load_anew(model, override)
            return
        view = self._view
        if view is None or not view.numbers(model):
            raise _unknown(model)
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

    async def _load_anew(self, model: str, override: Override | None) -> None:
        """Load under another configuration, beside what serves; whoever asked may go, the load goes on."""
        if self._group is None:
            raise NotReady("the server has not started yet", reason="MODEL_NOT_READY")
        if model in self._orders:
            raise WrongState(f"failed to load '{model}', it is being loaded already", reason="MODEL_NOT_READY")
        self._orders[model] = set()
        with detached():
            task = self._group.create_task(self._order(self._group, model, override))
        error = await asyncio.shield(task)
        if error is not None:
            raise error

    async def _order(self, group: asyncio.TaskGroup, model: str, override: Override | None) -> MeshError | None:
        try:
            return await self._switch(group, model, override)
        except MeshError as error:
            return error
        except Exception as error:  # the other models must go on
            _LOG.exception("loading failed unexpectedly", extra={"model": model})
            return WrongState(
                f"load failed for model '{model}': {type(error).__name__}; the log says more", reason="ENGINE_FAILED"
            )
        finally:
            del self._orders[model]
            self._changed.set()

    async def _switch(self, group: asyncio.TaskGroup, model: str, override: Override | None) -> MeshError | None:
        """Prepare every version that is to serve, then let all of them answer in one step; or change nothing."""
        records: tuple[VersionRecord, ...] = ()
        config = override.config if override is not None else None
        if override is not None and override.files:
            records = await run_blocking(self._loading.disk, uploaded, model, override)
            for record in records:
                for file in record.files:
                    await self._loading.fetching.keep(file, override.files[record.version][file.path])
        brought = {**{name: there for name, there in self._brought.items() if name != model}, model: records}
        view = overlaid(self._follower.view or self._remembered, brought)
        if view is None or not view.numbers(model):
            return _unknown(model)
        selectors = (*self._loading.settings.selectors, *self._added)
        want = chosen(model, config, view, wanted(selectors, view).get(model))
        if want is None:
            return NotFound(f"failed to load '{model}', no version is available", reason="MODEL_NOT_FOUND")
        self._orders[model] |= {(model, version) for version in want.versions}
        await self._settle(model)
        prepared: list[Prepared] = []
        for version in want.versions:
            record = view.versions[model, version]
            found = await self._loading.prepare(record, self._changed.set, config=config)
            if isinstance(found, str):
                self._catalog.fail(model, version, found)
                for one in prepared:
                    one.built.engine.close()
                return _failed(model, version, found)
            prepared.append(found)
        for one in prepared:
            replaced = self._loading.install(one)
            if replaced is not None:
                group.create_task(replaced.runner.drain())
        self._hold(model, override, records)
        self._reconcile(group)
        return None

    async def _settle(self, model: str) -> None:
        """Wait until nothing else happens to the versions that an order is about; loads under way are given up."""
        while tasks := {key: self._tasks[key] for key in self._orders[model] if key in self._tasks}:
            for key, task in tasks.items():
                status = self._catalog.status(*key)
                if status is None or status.state is not State.DRAINING:
                    task.cancel()
            await asyncio.wait(tasks.values())

    def _hold(self, model: str, override: Override | None, records: tuple[VersionRecord, ...]) -> None:
        """From now on this is how the model is wanted."""
        self._excluded.discard(model)
        self._brought.pop(model, None)
        self._overrides.pop(model, None)
        if override is not None:
            self._overrides[model] = replace(override, files={})
            if records:
                self._brought[model] = records
        elif model not in self._target():
            self._added.append(Selector(model=model))

    def _loaded(self, model: str, versions: tuple[int, ...]) -> bool:
        statuses = [self._catalog.status(model, version) for version in versions]
        for status in statuses:
            if status is not None and status.state is State.FAILED:
                raise _failed(model, status.version, status.error)
        ready = all(status is not None and status.state is State.READY for status in statuses)
        return ready and self._catalog.default_version(model) in versions

    async def unload(self, model: str, *, dependents: bool = False) -> None:
        """Unload by hand; see oip.repository.Repository."""
        if not self._catalog.statuses(model):
            raise NotFound(f"failed to unload '{model}', it is not served", reason="MODEL_NOT_FOUND")
        together = [model, *(self._parts(model) if dependents else ())]
        for name in together:
            self._excluded.add(name)
            self._overrides.pop(name, None)
            self._brought.pop(name, None)
        for name in together:
            async with self._catalog.watch(name) as changes:
                self._changed.set()
                while self._catalog.statuses(name):
                    await anext(changes)

    def _parts(self, model: str) -> list[str]:
        """Models that the served versions of an ensemble are made of, themselves or through others."""
        found: dict[str, None] = {}
        names = [model]
        while names:
            for ready in self._catalog.versions(names.pop()):
                steps = [step.model for step in ready.config.steps if self._catalog.statuses(step.model)]
                names += [name for name in steps if name not in found and name != model]
                found.update(dict.fromkeys(steps))
        return [name for name in found if name != model]

    def known(self) -> list[tuple[str, int, str]]:
        """(model, version, why it is not served) of every version of the repository, whether it is served or not."""
        view = self._view or RegistryView()
        return [
            (model, version, "quarantined" if record.quarantined else "unloaded")
            for (model, version), record in sorted(view.versions.items())
            if model not in view.datasets
        ]


def _unknown(model: str) -> NotFound:
    return NotFound(f"failed to load '{model}', failed to poll from model repository", reason="MODEL_NOT_FOUND")


def _failed(model: str, version: int, error: str) -> WrongState:
    return WrongState(
        f"load failed for model '{model}': version {version} is at UNAVAILABLE state: {error};", reason="ENGINE_FAILED"
    )


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
        status.state in (State.READY, State.FAILED, State.ASLEEP)
        or (status.state is State.FETCHING and bool(status.error))
    )
