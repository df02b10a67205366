"""Models and versions of this process: what answers, what is on its way, and who wants to know.

Requests look a model up in one dictionary that is replaced whole on every change, so a swap is atomic: a request that
found a version before the swap is answered by it. Everything happens on the event loop.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from mlmesh_inference.engines.base import EngineFacts
from mlmesh_inference.engines.selection import Trial
from mlmesh_inference.running import Runner
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.serving import ServingConfig
from mlmesh_inference.statistics import Statistics
from mlmesh_inference.tensors import Signature, TensorSpec
from mlmesh_runtime.errors import InvalidInput, NotFound, NotReady, Overloaded

WAKING_S: Final = 1.0
"""When to ask again for a version that sleeps."""
WATCHER_ITEMS_MAX: Final = 1000
"""Changes that may wait for a watcher; one that falls behind further is ended (WATCHER_TOO_SLOW)."""


class State(enum.Enum):
    """Where a version stands. The names are those of mlmesh.inference.v1.ServedState."""

    FETCHING = 1
    BUILDING = 2
    WARMING_UP = 3
    READY = 4
    DRAINING = 5
    UNLOADED = 6
    FAILED = 7
    ASLEEP = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A version as people see it. `updated_s` is the wall clock, in seconds since 1970."""

    model: str
    version: int
    state: State
    updated_s: float = 0.0
    engine: str = ""
    engine_reason: str = ""
    error: str = ""
    fetched_bytes: int = 0
    total_bytes: int = 0
    sha256: str = ""
    default: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadyModel:
    """A version that answers: all that the hot path needs, looked up once a request."""

    name: str
    version: int
    platform: str
    signature: Signature
    policy: BatchPolicy
    runner: Runner
    statistics: Statistics
    labels: tuple[str, ...] = ()
    output_labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    concurrency: int = 1
    config: ServingConfig = field(default_factory=ServingConfig)
    composing: tuple[tuple[str, int], ...] = ()
    path: Path | None = None
    facts: EngineFacts = field(default_factory=EngineFacts)
    trials: tuple[Trial, ...] = ()
    inputs: Mapping[str, TensorSpec] = field(init=False)
    outputs: Mapping[str, TensorSpec] = field(init=False)
    output_names: tuple[str, ...] = field(init=False)
    version_text: str = field(init=False)

    def __post_init__(self) -> None:
        """Work out what every request would otherwise work out again."""
        object.__setattr__(self, "inputs", {spec.name: spec for spec in self.signature.inputs})
        object.__setattr__(self, "outputs", {spec.name: spec for spec in self.signature.outputs})
        object.__setattr__(self, "output_names", tuple(spec.name for spec in self.signature.outputs))
        object.__setattr__(self, "version_text", str(self.version))


Listener = Callable[[Status], None]


class Catalog:
    """The versions of a process.

    Args:
        wall: the wall clock, seconds since 1970.
        listener: is called after every change of a version, for health.
    """

    def __init__(self, *, wall: Callable[[], float] = time.time, listener: Listener | None = None) -> None:
        self._wall = wall
        self._listener = listener
        self._statuses: dict[tuple[str, int], Status] = {}
        self._ready: dict[tuple[str, int], ReadyModel] = {}
        self._defaults: dict[str, int] = {}
        self._aliases: dict[str, Mapping[str, int]] = {}
        self._routes: dict[tuple[str, str], ReadyModel] = {}
        self._gone: set[str] = set()
        self._sleeping: set[tuple[str, int]] = set()
        self._sleepers: dict[tuple[str, str], tuple[str, int]] = {}
        self.on_wanted: Callable[[str, int], None] = lambda _model, _version: None
        """Is called when somebody asks for a version that sleeps."""
        self._watchers: set[_Watcher] = set()
        self.generation = 0
        """Grows with every change of what `resolve` gives: who remembers its answers begins anew then."""
        self.synced = False
        """Whether all that was wanted at the start was loaded or has failed: ServerReady."""

    def resolve(self, model: str, version: str) -> ReadyModel:
        """The version that answers. "" is the default version, "@stable" an alias, "3" a number.

        Raises NotFound (MODEL_NOT_FOUND), NotReady (MODEL_NOT_READY) when it is known but does not answer; a version
        that sleeps is woken by that.
        """
        found = self._routes.get((model, version))
        if found is None:
            raise self._missing(model, version)
        return found

    def find(self, model: str, version: str) -> ReadyModel | None:
        """Like resolve, None when it does not answer."""
        return self._routes.get((model, version))

    def wake(self, model: str, version: str) -> bool:
        """Have it loaded again if it sleeps; whether it does."""
        sleeper = self._sleepers.get((model, version))
        if sleeper is not None:
            self.on_wanted(*sleeper)
        return sleeper is not None

    def sleep(self, model: str, version: int) -> ReadyModel | None:
        """Take it out of memory but not out of service: names and aliases keep meaning it. Returns it to be drained."""
        key = (model, version)
        ready = self._ready.pop(key, None)
        if ready is not None:
            self._sleeping.add(key)
            self._put(replace(self._statuses[key], state=State.DRAINING))
            self._route()
        return ready

    def rest(self, model: str, version: int, *, total_bytes: int, sha256: str) -> None:
        """A version that is not loaded before somebody asks for it."""
        key = (model, version)
        self._sleeping.add(key)
        self._put(Status(model=model, version=version, state=State.ASLEEP, total_bytes=total_bytes, sha256=sha256))
        self._route()

    def sleeps(self, model: str, version: int) -> bool:
        """Whether it sleeps, or is on its way back."""
        return (model, version) in self._sleeping

    def asleep(self, model: str, version: int) -> None:
        """It was drained, and sleeps."""
        status = self._statuses.get((model, version))
        if status is not None and (model, version) in self._sleeping:
            self._put(replace(status, state=State.ASLEEP))

    def _missing(self, model: str, version: str) -> NotFound | NotReady:
        """What to say of a version that does not answer. Raises InvalidInput for what is no version."""
        if self.wake(model, version):
            text = f"model '{model[:256]}' was asleep to save memory and is being loaded"
            return NotReady(text, reason="MODEL_NOT_READY", retry_after_s=WAKING_S)
        check_version(version)
        shown = f"'{model[:256]}'" + (f" version {version[:64]}" if version else "")
        known = [number for name, number in self._statuses if name == model]
        if not version and (known or model in self._gone):
            text = f"Request for unknown model: {shown} has no available versions"
            # Another replica may have what is on its way here; what was taken out of service is gone everywhere.
            if known:
                return NotReady(text, reason="MODEL_NOT_READY")
            return NotFound(text, reason="MODEL_NOT_FOUND")
        if version in map(str, known):
            return NotReady(f"Request for unknown model: {shown} is not at ready state", reason="MODEL_NOT_READY")
        return NotFound(f"Request for unknown model: {shown} is not found", reason="MODEL_NOT_FOUND")

    def ready_models(self) -> list[ReadyModel]:
        """Every version that answers, by name and number."""
        return [model for _, model in sorted(self._ready.items())]

    def versions(self, model: str) -> list[ReadyModel]:
        """Versions of one model that answer, by number."""
        return [ready for ready in self.ready_models() if ready.name == model]

    def statuses(self, model: str = "") -> list[Status]:
        """What is known of every version, of one model or of all."""
        return [status for (name, _), status in sorted(self._statuses.items()) if not model or name == model]

    def status(self, model: str, version: int) -> Status | None:
        """What is known of one version."""
        return self._statuses.get((model, version))

    def ready(self, model: str, version: int) -> ReadyModel | None:
        """One version, when it answers or drains."""
        return self._ready.get((model, version))

    def default_version(self, model: str) -> int:
        """Version for requests that name none, 0 when there is none."""
        return self._defaults.get(model, 0)

    def begin(self, model: str, version: int, *, total_bytes: int, sha256: str) -> None:
        """A version is on its way. One that answers already goes on answering, and nothing is told of it until then."""
        if (model, version) in self._ready:
            return
        self._put(Status(model=model, version=version, state=State.FETCHING, total_bytes=total_bytes, sha256=sha256))

    def progress(
        self, model: str, version: int, state: State, *, fetched_bytes: int | None = None, error: str = ""
    ) -> None:
        """It went on: another state, more bytes, or a reason why it takes longer."""
        status = self._statuses.get((model, version))
        if status is not None and (model, version) not in self._ready:
            fetched = status.fetched_bytes if fetched_bytes is None else fetched_bytes
            self._put(replace(status, state=state, fetched_bytes=fetched, error=error))

    def install(self, ready: ReadyModel, *, engine: str, engine_reason: str) -> None:
        """It answers from now on, to requests that name it."""
        key = (ready.name, ready.version)
        self._ready[key] = ready
        self._sleeping.discard(key)
        self._gone.discard(ready.name)
        before = self._statuses.get(key) or Status(model=ready.name, version=ready.version, state=State.READY)
        self._route()
        self._put(replace(before, state=State.READY, engine=engine, engine_reason=engine_reason, error=""))

    def amend(self, ready: ReadyModel, *, engine_reason: str) -> None:
        """Say more of a version that answers, with the same runner."""
        status = self._statuses.get((ready.name, ready.version))
        if status is not None:
            self.install(ready, engine=status.engine, engine_reason=engine_reason)

    def fail(self, model: str, version: int, error: str) -> None:
        """It could not be loaded."""
        if (model, version) in self._sleeping:
            self._sleeping.discard((model, version))
            self._route()
        self.progress(model, version, State.FAILED, error=error)

    def point(self, model: str, *, default: int, aliases: Mapping[str, int]) -> None:
        """Say what "" and "@alias" mean; default 0 is none. One step: no request sees anything in between."""
        before = self._defaults.get(model, 0)
        self._aliases[model] = dict(aliases)
        if default:
            self._defaults[model] = default
        else:
            self._defaults.pop(model, None)
        self._route()
        if before != default:
            for number in (before, default):
                status = self._statuses.get((model, number))
                if status is not None:
                    self._put(replace(status, default=number == default), touch=False)

    def withdraw(self, model: str, version: int) -> ReadyModel | None:
        """Send it no more requests; returns it to be drained."""
        key = (model, version)
        ready = self._ready.pop(key, None)
        if self._defaults.get(model) == version:
            del self._defaults[model]
        self._route()
        status = self._statuses.get(key)
        if status is not None:
            self._put(replace(status, state=State.DRAINING, default=False))
        return ready

    def forget(self, model: str, version: int) -> None:
        """It is gone: watchers see UNLOADED, lists show it no more."""
        status = self._statuses.pop((model, version), None)
        if (model, version) in self._sleeping:
            self._sleeping.discard((model, version))
            self._route()
        if status is not None:
            if status.state is State.DRAINING and not self.statuses(model):
                self._gone.add(model)
            self._tell(replace(status, state=State.UNLOADED, default=False, updated_s=self._wall()))

    def _route(self) -> None:
        routes: dict[tuple[str, str], ReadyModel] = {}
        for key, ready in self._ready.items():
            for name in self._names(*key):
                routes[name] = ready
        self._routes = routes
        self._sleepers = {name: key for key in self._sleeping for name in self._names(*key)}
        self.generation += 1

    def _names(self, model: str, version: int) -> Iterator[tuple[str, str]]:
        """All that a version is called: by number, "" for the default, "@alias"."""
        yield model, str(version)
        if self._defaults.get(model) == version:
            yield model, ""
        for alias, number in self._aliases.get(model, {}).items():
            if number == version:
                yield model, f"@{alias}"

    def _put(self, status: Status, *, touch: bool = True) -> None:
        if touch:
            status = replace(status, updated_s=self._wall())
        self._statuses[status.model, status.version] = status
        self._tell(status)

    def _tell(self, status: Status) -> None:
        if self._listener is not None:
            self._listener(status)
        for watcher in self._watchers:
            watcher.offer(status)

    @asynccontextmanager
    async def watch(self, model: str = "") -> AsyncIterator[AsyncIterator[Status]]:
        """Changes from now on, of one model or of all. The iterator raises Overloaded when it falls too far behind."""
        watcher = _Watcher(model)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)


def check_version(version: str) -> None:
    """Refuse what is no version: neither "", a number nor "@alias". Raises InvalidInput."""
    digits = version.removeprefix("-")
    if not version or version.startswith("@") or (version == digits and digits.isascii() and digits.isdigit()):
        return
    if digits.isascii() and digits.isdigit():
        text = f"invalid model version specified '{version[:64]}' , version should be an integral value > 0"
    else:
        text = (
            f"failed to get model version from specified version string '{version[:64]}' (details: stol), version "
            "should be an integral value > 0"
        )
    raise InvalidInput(text, field="model_version")


class _Watcher:
    """One reader of changes, with a bounded queue."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._queue: asyncio.Queue[Status] = asyncio.Queue(WATCHER_ITEMS_MAX)
        self._lost = False

    def offer(self, status: Status) -> None:
        if self._model and status.model != self._model:
            return
        try:
            self._queue.put_nowait(status)
        except asyncio.QueueFull:
            self._lost = True

    def __aiter__(self) -> _Watcher:
        return self

    async def __anext__(self) -> Status:
        if self._lost and self._queue.empty():
            raise Overloaded(f"more than {WATCHER_ITEMS_MAX} changes were not read", reason="WATCHER_TOO_SLOW")
        return await self._queue.get()
