"""The engine of each version: what is built at once, what is tried when, and what is remembered.

ONNX Runtime serves as soon as it is built. What else may serve is tried afterwards, one version at a time, in a process
of its own at low priority; a winner takes over without a request noticing. Where something was declared, or the process
says MLMESH_ENGINE_TUNING=load, the trial comes before the version is ready. A version with sequences is tried before,
too: the state of its sequences is in what runs it.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Generic, TypeVar

from mlmesh_inference.config import InferenceSettings
from mlmesh_inference.engines.base import Availability, EngineError, EngineKind, EngineOptions
from mlmesh_inference.engines.child import try_in_child
from mlmesh_inference.engines.samples import parse_lengths
from mlmesh_inference.engines.selection import (
    REFERENCE,
    Candidate,
    Candidates,
    SelectionError,
    Trial,
    Wish,
    candidates,
    choose,
    chosen,
)
from mlmesh_inference.engines.trial import TIMING_S, Given, TrialOrder, try_engines
from mlmesh_inference.engines.verdicts import VerdictStore, verdict_key
from mlmesh_inference.scheduling.tuning import Tuning, decide
from mlmesh_inference.serving import ServingConfig
from mlmesh_runtime.executors import BoundedExecutor, run_blocking

_LOG = logging.getLogger(__name__)

TRIED_ALONE: Final = frozenset({"onnxruntime-cpu", "openvino", "torch", "torch-compiled"})
"""Engines that are tried in a process of their own; others are compared where they serve."""
GIVEN_BYTES_MAX: Final = 16 << 20
"""Most bytes of the samples of a configuration that a trial compares on."""

LATENCY_MAX_S: Final = 0.1
LATENCY_MAX_ROWS: Final = 8
"""Batches that take longer than both, the time and so many single rows, are not grown, whatever they would bring."""

Child = Callable[[TrialOrder], Awaitable[tuple[Trial, ...]]]
Waiting = TypeVar("Waiting")


class When(enum.Enum):
    """When the engines of a version are tried."""

    NEVER = "never"
    BEFORE = "before it is ready"
    AFTER = "while it serves"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is done about the engine of one version.

    Attributes:
        kinds: to build, the first that can: what serves at first.
        precision: that `kinds[0]` is asked for; the others compute in FP32.
        concurrency: batches at once; 0 leaves it to the process.
        candidates: to try. known: the verdict, where there is one already; otherwise `key` is what it is kept under.
    """

    wish: Wish
    kinds: tuple[EngineKind, ...]
    precision: str
    candidates: Candidates
    order: TrialOrder
    when: When
    key: str
    concurrency: int = 0
    known: tuple[Trial, ...] = ()


class Queue(Generic[Waiting]):
    """Versions that wait for their trial, by name; a newer one takes the place of an older. Bounded by the catalog."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[tuple[str, int], Waiting] = OrderedDict()
        self._filled = asyncio.Event()

    def put(self, key: tuple[str, int], item: Waiting) -> None:
        """Wait behind the others."""
        self._waiting.pop(key, None)
        self._waiting[key] = item
        self._filled.set()

    async def get(self) -> Waiting:
        """The next one."""
        while not self._waiting:
            self._filled.clear()
            await self._filled.wait()
        return self._waiting.popitem(last=False)[1]


class EngineChooser:
    """Decides for each version, and has engines tried.

    Args:
        kinds: all engines, in the order of preference before anything is measured.
        store: remembers verdicts. disk, build: executors for files and for engines.
        child: tries engines in a process of its own.
    """

    def __init__(
        self,
        kinds: Sequence[EngineKind],
        settings: InferenceSettings,
        store: VerdictStore,
        *,
        disk: BoundedExecutor,
        build: BoundedExecutor,
        child: Child = try_in_child,
    ) -> None:
        self._kinds = tuple(kinds)
        self._settings = settings
        self._store = store
        self._disk = disk
        self._build = build
        self._child = child
        self._one = asyncio.Lock()

    async def plan(self, path: Path, digest: str, config: ServingConfig, options: EngineOptions) -> Plan:
        """What to do about a version. Raises EngineError when what is declared cannot be had."""
        settings = self._settings
        found = await run_blocking(self._disk, self._probe)
        try:
            wish = Wish.of(
                engine=config.engine,
                precision=config.parameter("precision"),
                tolerance=config.parameter("tolerance"),
                default_engine=settings.engine,
                default_precision=settings.precision,
            )
            lengths = parse_lengths(config.parameter("lengths"))
            offered = candidates(self._kinds, found, wish)
        except (SelectionError, ValueError) as error:
            raise EngineError(str(error)) from None
        order = TrialOrder(
            model=path,
            candidates=tuple(each for each in offered.tried if each.engine in TRIED_ALONE),
            threads=options.threads,
            concurrency=options.concurrency,
            batches=False if config.rows_max == 0 else None,
            rows_max=options.rows_max,
            rows_preferred=options.rows_preferred,
            lengths=lengths,
            dims={tensor.name: tensor.dims for tensor in config.inputs if tensor.dims},
            tolerance=wish.tolerance,
            timing_s=0.0 if settings.tuning == "off" else TIMING_S,
        )
        key = verdict_key(_facts(order, digest, config, found, wish))
        known = await run_blocking(self._disk, self._store.get, key) or ()
        when = self._when(wish, config, order, known)
        kinds, precision = self._first(wish, found, chosen(known))
        tuning = tuning_of(known)
        return Plan(
            wish=wish,
            kinds=kinds,
            precision=precision,
            candidates=offered,
            order=order,
            when=when,
            key=key,
            concurrency=tuning.instances if tuning is not None and self.may_tune_instances(config) else 0,
            known=known,
        )

    def may_tune_rows(self, config: ServingConfig) -> bool:
        """Whether nobody said how large batches are to be."""
        return not self._settings.rows_said and not (config.batching and config.batching.preferred_rows)

    def may_tune_instances(self, config: ServingConfig) -> bool:
        """Whether nobody said how many batches run at once."""
        return not self._settings.concurrency_said and not config.instances

    def kind(self, name: str) -> EngineKind:
        """An engine by its name."""
        return next(kind for kind in self._kinds if kind.name == name)

    def _probe(self) -> dict[str, Availability]:
        return {kind.name: kind.probe() for kind in self._kinds}

    def _when(self, wish: Wish, config: ServingConfig, order: TrialOrder, known: tuple[Trial, ...]) -> When:
        others = [each for each in order.candidates if each.engine != REFERENCE and wish.allows(each.engine)]
        if known or (not others and wish.allows(REFERENCE)) or not self._tried_alone(wish):
            return When.NEVER
        if not wish.allows(REFERENCE):
            return When.BEFORE
        if self._settings.tuning == "off":
            return When.NEVER
        return When.BEFORE if self._settings.tuning == "load" or config.sequence else When.AFTER

    def _tried_alone(self, wish: Wish) -> bool:
        """Whether what is declared is tried at all: a compiled engine, and what stands in for it, is not."""
        return any(wish.allows(kind.name) for kind in self._kinds if kind.name in TRIED_ALONE)

    def _first(
        self, wish: Wish, found: Mapping[str, Availability], winner: Trial | None
    ) -> tuple[tuple[EngineKind, ...], str]:
        """What to build at first, best first, and the precision of the very first.

        Engines on a device; then the winner of a trial that was made before; then ONNX Runtime, which also stands in
        for what is declared until that was tried. What cannot be compared with ONNX Runtime does not serve.
        """
        usable = [kind for kind in self._kinds if found[kind.name].available]
        compiled = [kind for kind in usable if kind.name not in TRIED_ALONE and wish.allows(kind.name)]
        best = [kind for kind in usable if winner is not None and kind.name == winner.engine]
        order = [*compiled, *best, *(kind for kind in usable if kind.name == REFERENCE and kind not in best)]
        absent = [kind for kind in self._kinds if kind not in usable and wish.allows(kind.name)]
        first = order[0].name if order else ""
        asked = wish.precision if winner is not None and first == winner.engine and first != REFERENCE else ""
        return (*order, *absent), asked or "fp32"

    async def trials(self, plan: Plan, given: tuple[Given, ...] = ()) -> tuple[Trial, ...]:
        """Have the candidates tried, choose, remember. Raises EngineError when the trial itself fails."""
        async with self._one:
            tried = await self._child(replace(plan.order, given=given))
        result = (*choose(tried, plan.wish, plan.order.rows_preferred), *plan.candidates.passed_over)
        try:
            await run_blocking(self._disk, self._store.put, plan.key, result)
        except OSError as error:
            _LOG.warning("a verdict cannot be kept", extra={"error": str(error)})
        return result

    async def compared(self, plan: Plan, name: str, built: object) -> Trial:
        """Compare an engine that serves on a device with the reference, here; it is not timed."""
        order = replace(plan.order, candidates=(Candidate(engine=name, precision="fp32"),), timing_s=0.0)
        kinds = {kind.name: kind for kind in self._kinds}
        tried = await run_blocking(self._build, try_engines, order, kinds, built={name: built})  # type: ignore[dict-item]
        return tried[-1]


def tuning_of(trials: Sequence[Trial]) -> Tuning | None:
    """Rows and instances that the winner does best with; None where nothing was timed."""
    winner = chosen(trials)
    if winner is None or not winner.batch_times:
        return None
    measured = {1: dict(winner.batch_times)}
    if winner.loaded_times:
        measured[winner.instances] = dict(winner.loaded_times)
    least = min(winner.batch_times)[1]
    return decide(measured, latency_max_s=max(LATENCY_MAX_S, LATENCY_MAX_ROWS * least))


def _facts(
    order: TrialOrder, digest: str, config: ServingConfig, found: Mapping[str, Availability], wish: Wish
) -> dict[str, object]:
    """All that a verdict depends on."""
    return {
        "model": digest,
        "engines": sorted([each.engine, each.precision, found[each.engine].version] for each in order.candidates),
        "wish": [wish.engine, wish.precision, wish.tolerance],
        "batches": [order.batches, order.rows_max, order.rows_preferred, order.threads, order.concurrency],
        "shapes": [list(order.lengths), sorted((name, list(dims)) for name, dims in order.dims.items())],
        "samples": repr(config.warmups),
        "timed": bool(order.timing_s),
    }
