"""Models that an ensemble needs beside its own: waited for when it is loaded, asked by name when it runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection

from mlmesh_inference.catalog import Catalog, ReadyModel, State
from mlmesh_inference.pipelines.plan import GraphError
from mlmesh_inference.pipelines.streams import no_unary
from mlmesh_inference.running import Answer, Runner, Sink, Work
from mlmesh_inference.serving import Step

Key = tuple[str, int]


class OtherModel:
    """The runner of a version that this process serves, looked up for every request; see running.Runner.

    It may be loaded anew under another configuration, or sleep to save memory and wake when it is asked for: what
    answers now is what counts.
    """

    decoupled = False

    def __init__(self, catalog: Catalog, model: str, version: int) -> None:
        self._catalog = catalog
        self._model = model
        self._version = str(version)

    def _runner(self) -> Runner:
        return self._catalog.resolve(self._model, self._version).runner

    @property
    def depth(self) -> int:
        """Requests waiting."""
        ready = self._catalog.find(self._model, self._version)
        return ready.runner.depth if ready is not None else 0

    @property
    def capacity(self) -> int:
        """Requests that may wait."""
        ready = self._catalog.find(self._model, self._version)
        return ready.runner.capacity if ready is not None else 0

    def submit(self, work: Work, sink: Sink) -> None:
        """Take a request. Raises also NotReady where the version does not answer."""
        runner = self._runner()
        if runner.decoupled:
            raise no_unary()
        runner.submit(work, sink)

    def respond(self, work: Work) -> AsyncIterator[Answer]:
        """See running.Runner."""
        return self._runner().respond(work)

    async def drain(self) -> None:
        """Nothing: it is not the ensemble's."""

    def abort(self) -> None:
        """Nothing: it is not the ensemble's."""


class Dependencies:
    """Which models wait for which: an ensemble that needs others waits until they answer."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._waiting: dict[str, list[set[str]]] = {}

    async def served(self, model: str, steps: Collection[Step], waits: Callable[[str], None]) -> dict[Key, ReadyModel]:
        """The models of steps, by name and version as the steps have it. Waits while they are on their way.

        `waits` is told why, where one of them does not come forward.
        Raises GraphError when one is unknown or has failed, and when models wait for each other.
        """
        needs = {step.model for step in steps}
        if not needs:
            return {}
        self._waiting.setdefault(model, []).append(needs)
        try:
            self._check_cycle(model)
            async with self._catalog.watch() as changes:
                told = ""
                while True:
                    found = {(step.model, step.version): self._find(step) for step in steps}
                    ready = {key: one for key, one in found.items() if one is not None}
                    if len(ready) == len(found):
                        return ready
                    why = next((why for key in found if key not in ready and (why := self._stuck(key[0]))), "")
                    if why not in ("", told):
                        told = why
                        waits(why)
                    await anext(changes)
        finally:
            self._waiting[model].remove(needs)

    def _find(self, step: Step) -> ReadyModel | None:
        version = str(step.version) if step.version else ""
        ready = self._catalog.find(step.model, version)
        if ready is not None or self._catalog.wake(step.model, version):
            return ready
        statuses = [
            status
            for status in self._catalog.statuses(step.model)
            if status.state is not State.DRAINING and step.version in (0, status.version)
        ]
        shown = f"model '{step.model}'" + (f" version {step.version}" if step.version else "")
        if not statuses:
            raise GraphError(f"a step needs {shown}, which is neither served here nor a file of this version")
        if all(status.state is State.FAILED for status in statuses):
            raise GraphError(f"a step needs {shown}, which failed: {statuses[-1].error}")
        return None

    def _stuck(self, model: str) -> str:
        """Why a model does not come forward, "" when it does."""
        errors = [status.error for status in self._catalog.statuses(model) if status.error]
        return f"waits for model '{model}': {errors[-1]}" if errors else ""

    def _check_cycle(self, model: str) -> None:
        path, todo = [model], [self._needs(model)]
        while todo:
            if not todo[-1]:
                todo.pop()
                path.pop()
                continue
            name = todo[-1].pop()
            if name == model:
                raise GraphError(f"the models wait for each other: {' -> '.join([*path, model])}")
            if name not in path:
                path.append(name)
                todo.append(self._needs(name))

    def _needs(self, model: str) -> list[str]:
        """What versions of a model wait for now."""
        return sorted(set().union(*self._waiting.get(model, ())))
