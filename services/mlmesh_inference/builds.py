"""Builds of engines as operations that somebody follows: begun, watched, waited for, cancelled, forgotten.

`Builds` decides and remembers; what a build does is a `Workshop`'s. Builds run one after the other. One that is asked
for again while it is under way is joined. Every build is written down when it begins and when it ends, so that a
process that starts again knows what ended, and says of what was under way that it was cut.

Everything happens on the event loop; files are the log's, on an executor.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from mlmesh_inference.compiling import Stop
from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_compile import BuildCancelled, Step
from mlmesh_runtime.errors import InvalidInput, MeshError, NotFound, Overloaded, WrongState

_LOG = logging.getLogger(__name__)

WAITING_MAX: Final = 16
"""Builds that wait for their turn; one more is refused."""
KEPT_MAX: Final = 200
"""Builds that have ended and are still known; the oldest go first."""
DEFAULT_ENGINE: Final = "tensorrt"

CANCELLED, FAILED, CUT, BROKEN = "CANCELLED", "FAILED_PRECONDITION", "ABORTED", "INTERNAL"
"""Names of google.rpc.Code that a build ends with when it has no engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What was built; see mlmesh.inference.v1.EngineBuild. `seconds` is None when the plan was there already."""

    precisions: tuple[str, ...]
    size: int
    sha256: str
    source: str
    seconds: float | None = None
    serving: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One build. Times are the wall clock, seconds since 1970; it is done when it has a result or a failure.

    Attributes:
        id: unique. request_id: of whoever asked first, "" when none was given.
        code, message: of a failure, "" while there is none.
    """

    id: str
    model: str
    version: int
    engine: str
    build_only: bool = False
    request_id: str = ""
    phase: str = "Waiting"
    steps_done: int = 0
    steps_total: int = 0
    created_s: float = 0.0
    updated_s: float = 0.0
    cancel_requested: bool = False
    result: Result | None = None
    code: str = ""
    message: str = ""

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.result is not None or bool(self.code)

    @property
    def version_name(self) -> str:
        """The name "models/{model}/versions/{number}"."""
        return f"models/{self.model}/versions/{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some builds, newest first, and what to ask for next ("" at the end)."""

    builds: tuple[Build, ...]
    next_token: str


class Workshop(Protocol):
    """Does the work."""

    def check(self, model: str, version: int, engine: str) -> None:
        """Raise what refuses such a build at once: NotFound, NotReady, InvalidInput."""

    async def make(self, build: Build, step: Callable[[Step], None], stop: Stop) -> Result:
        """Build and, unless it says otherwise, switch. `step` is called on the loop.

        Raises EngineError, BuildCancelled, MeshError.
        """


class Log(Protocol):
    """Keeps builds between starts."""

    async def save(self, build: Build) -> None:
        """Write one down. Never raises for a disk that fails: a build does not depend on it."""

    async def forget(self, build_id: str) -> None:
        """Remove one."""

    async def load(self) -> list[Build]:
        """All that is written down and can be read."""


class Builds:
    """Builds of this process.

    Args:
        workshop: does them. log: keeps them. wall: the wall clock. new_id: makes ids.
    """

    def __init__(
        self,
        workshop: Workshop,
        log: Log,
        *,
        wall: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: secrets.token_hex(8),
        kept_max: int = KEPT_MAX,
    ) -> None:
        self._workshop = workshop
        self._log = log
        self._wall = wall
        self._new_id = new_id
        self._kept_max = kept_max
        self._builds: OrderedDict[str, Build] = OrderedDict()
        self._stops: dict[str, Stop] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._filled = asyncio.Event()
        self._present = ""
        self.started = asyncio.Event()
        """Set when what earlier processes left is known."""

    async def run(self) -> None:
        """Do builds, one after the other, for ever. Cancelling stops the one under way."""
        for build in await self._log.load():
            if not build.done:
                build = replace(  # noqa: PLW2901
                    build, code=CUT, message="the process ended while it was under way", updated_s=self._wall()
                )
                await self._log.save(build)
            self._builds.setdefault(build.id, build)
        self._builds = OrderedDict(sorted(self._builds.items(), key=lambda each: (each[1].created_s, each[0])))
        await self._trim()
        self.started.set()
        while True:
            while not self._waiting:
                self._filled.clear()
                await self._filled.wait()
            await self._do(self._waiting.popitem(last=False)[0])

    async def start(
        self, model: str, version: int, engine: str = "", *, request_id: str = "", build_only: bool = False
    ) -> Build:
        """Begin a build, or give the one that this request, or the same need, has begun already.

        Raises NotFound, NotReady, InvalidInput as the workshop says; InvalidInput for a request id that asked for
        something else; Overloaded (QUEUE_FULL).
        """
        engine = engine or DEFAULT_ENGINE
        need = (model, version, engine, build_only)
        for build in self._builds.values():
            same = (build.model, build.version, build.engine, build.build_only) == need
            if request_id and build.request_id == request_id and not same:
                raise InvalidInput(
                    f"request_id {request_id[:64]!r} began another build, of {build.version_name} for {build.engine}",
                    field="request_id",
                )
            if same and ((request_id and build.request_id == request_id) or not (build.done or build.cancel_requested)):
                return build
        self._workshop.check(model, version, engine)
        if len(self._stops) > WAITING_MAX:
            raise Overloaded(f"{WAITING_MAX} builds are waiting already", reason="QUEUE_FULL", retry_after_s=10.0)
        now = self._wall()
        build = Build(
            id=self._new_id(),
            model=model,
            version=version,
            engine=engine,
            build_only=build_only,
            request_id=request_id,
            created_s=now,
            updated_s=now,
        )
        self._builds[build.id] = build
        self._stops[build.id] = Stop()
        try:
            # What somebody was told of is known after a restart.
            await self._log.save(build)
        finally:
            if not self._builds[build.id].done:  # cancelled meanwhile
                self._waiting[build.id] = None
                self._filled.set()
        return self._builds[build.id]

    def get(self, build_id: str) -> Build:
        """One build. Raises NotFound (BUILD_NOT_FOUND)."""
        found = self._builds.get(build_id)
        if found is None:
            raise NotFound(f"'operations/{build_id[:64]}' is not known to this process", reason="BUILD_NOT_FOUND")
        return found

    def under_way(self, model: str, version: int) -> Build | None:
        """The build of a version that has not ended, the oldest of them."""
        builds = (build for build in self._builds.values() if not build.done)
        return next((build for build in builds if (build.model, build.version) == (model, version)), None)

    def list(self, keep: Callable[[Build], bool], *, size: int, token: str = "") -> Page:
        """Builds, newest first. The token is that of the page before; what began since is not in later pages."""
        found = [build for build in reversed(self._builds.values()) if keep(build)]
        if token:
            found = [build for build in found if _place(build) < token]
        page = tuple(found[:size])
        return Page(builds=page, next_token=_place(page[-1]) if len(found) > size else "")

    async def wait(self, build_id: str, timeout_s: float) -> Build:
        """Wait until it has ended or the time is up; either way it is given as it is then. Raises NotFound."""
        if not self.get(build_id).done:
            ended = self._ended.setdefault(build_id, asyncio.Event())
            try:
                async with asyncio.timeout(timeout_s):
                    await ended.wait()
            except TimeoutError:
                return self.get(build_id)
        return self.get(build_id)

    async def cancel(self, build_id: str) -> None:
        """Ask to stop a build; one that has ended stays as it is. Raises NotFound."""
        build = self.get(build_id)
        if build.done or build.cancel_requested:
            return
        self._change(build_id, cancel_requested=True)
        self._stops[build_id].ask()
        if build_id != self._present:
            self._waiting.pop(build_id, None)
            await self._finish(build_id, {"code": CANCELLED, "message": "the build was cancelled before it began"})

    async def delete(self, build_id: str) -> None:
        """Forget a build that has ended; its engine stays. Raises NotFound, WrongState (BUILD_UNDER_WAY)."""
        if not self.get(build_id).done:
            raise WrongState(
                f"'operations/{build_id}' is under way: cancel it first, or wait for it", reason="BUILD_UNDER_WAY"
            )
        del self._builds[build_id]
        await self._log.forget(build_id)

    async def _do(self, build_id: str) -> None:
        stop = self._stops[build_id]
        self._present = build_id
        try:
            outcome = await self._outcome(self._builds[build_id], stop)
        except asyncio.CancelledError:
            stop.ask()
            raise
        finally:
            self._present = ""
        await self._finish(build_id, outcome)

    async def _finish(self, build_id: str, outcome: Mapping[str, Any]) -> None:
        # Written down before it is told: what somebody was told is known after a restart.
        await self._log.save(replace(self._builds[build_id], updated_s=self._wall(), **outcome))
        self._change(build_id, **outcome)
        del self._stops[build_id]
        if (ended := self._ended.pop(build_id, None)) is not None:
            ended.set()
        await self._trim()

    async def _outcome(self, build: Build, stop: Stop) -> Mapping[str, Any]:
        def step(at: Step) -> None:
            self._change(build.id, phase=at.phase, steps_done=at.done, steps_total=at.total)

        try:
            return {"result": await self._workshop.make(build, step, stop)}
        except BuildCancelled as error:
            return {"code": CANCELLED, "message": str(error)}
        except EngineError as error:
            return {"code": FAILED, "message": str(error)}
        except MeshError as error:
            return {"code": FAILED, "message": error.message}
        except Exception as error:  # the builds behind it must go on
            _LOG.exception("a build failed unexpectedly", extra={"build": build.id})
            return {"code": BROKEN, "message": f"{type(error).__name__}; the log says more"}

    def _change(self, build_id: str, **changes: Any) -> None:
        self._builds[build_id] = replace(self._builds[build_id], updated_s=self._wall(), **changes)

    async def _trim(self) -> None:
        ended = [build.id for build in self._builds.values() if build.done]
        for build_id in itertools.islice(ended, max(0, len(ended) - self._kept_max)):
            del self._builds[build_id]
            await self._log.forget(build_id)


def _place(build: Build) -> str:
    """Orders builds by when they began; as text, so that it can be a token."""
    return f"{int(build.created_s * 1e6):020d}-{build.id}"
