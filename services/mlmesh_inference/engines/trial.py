"""Tries engines with a model: whether they answer as ONNX Runtime in FP32 does, for every batch, and how fast.

`try_engines` does it, blocking; `python -m mlmesh_inference.engines.trial` does it in a process of its own, at low
priority and within limits, with an order on standard input and the trials on standard output, as JSON. A model that
crashes an engine, or a library that takes 300 MB and is not chosen, then costs the server nothing.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from mlmesh_inference.engines.base import Engine, EngineError, EngineKind, EngineOptions
from mlmesh_inference.engines.graph import read_graph
from mlmesh_inference.engines.parity import Difference, difference, tolerance
from mlmesh_inference.engines.samples import LENGTHS, LENGTHS_OTHERWISE, Samples, buckets, has_free_dimensions
from mlmesh_inference.engines.selection import REFERENCE, Candidate, Trial
from mlmesh_inference.tensors import Array, Signature, TensorSpec

Clock = Callable[[], float]
TIMING_S: Final = 0.4
"""Time to measure in, for each batch size and all engines."""
_ROUNDS_MIN, _ROUNDS_MAX = 3, 25
_NICE: Final = 10
_UNDISTURBED: Final = 0.8
"""Share of a run's time that is CPU time on a machine that is not busy."""
_SHORT_S: Final = 0.005
_ADDRESSES_BYTES: Final = 64 << 30
"""Address space of a child: libraries reserve tens of GB that they never touch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A real request to compare on. Arrays of BYTES are left out on the way to another process."""

    rows: int
    inputs: Mapping[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOrder:
    """What to try.

    Attributes:
        model: the ONNX file. candidates: what is compared with the reference; may include it.
        batches: whether the first dimension is the batch's, as the configuration has it; None as the model has it.
        rows_max, rows_preferred: of batches.
        lengths: sizes of free dimensions, () for the defaults. dims: those of inputs that are declared, -1 for free.
        tolerance: declared, None for that of the precision.
        timing_s: time to measure in, for each batch size and all engines; 0 does not measure.
    """

    model: Path
    candidates: tuple[Candidate, ...]
    threads: int = 1
    concurrency: int = 1
    batches: bool | None = None
    rows_max: int = 64
    rows_preferred: int = 8
    lengths: tuple[int, ...] = ()
    dims: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tolerance: float | None = None
    timing_s: float = TIMING_S
    given: tuple[Given, ...] = field(default=(), compare=False)

    def options(self, precision: str) -> EngineOptions:
        """For one engine."""
        return EngineOptions(
            threads=self.threads,
            concurrency=self.concurrency,
            rows_max=self.rows_max,
            rows_preferred=self.rows_preferred,
            precision=precision,
        )


@dataclass(slots=True, kw_only=True, eq=False)
class _Tried:
    """One engine on its way through the trial."""

    candidate: Candidate
    engine: Engine | None = None
    precision: str = ""
    difference: Difference = field(default_factory=Difference)
    refusal: str = ""
    times: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """By rows: seconds by the clock, and seconds of CPU, of each run."""
    loaded: dict[int, list[tuple[float, float]]] = field(default_factory=dict)


def try_engines(
    order: TrialOrder,
    kinds: Mapping[str, EngineKind],
    *,
    built: Mapping[str, Engine] | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[Trial, ...]:
    """Build, compare and time, in the order of the candidates, the reference first. Blocking; never raises EngineError.

    Args:
        kinds: by name; must hold the reference's and that of every candidate that is not built.
        built: engines by the name of their kind that are here already; they stay open.
    """
    ready = built or {}
    with ExitStack() as stack:
        reference = _Tried(candidate=Candidate(engine=REFERENCE, precision="fp32"), engine=ready.get(REFERENCE))
        _build(reference, kinds, order, stack)
        if reference.engine is None:
            text = f"there is nothing to compare with: {reference.refusal}"
            others = [Trial(engine=each.engine, precision=each.precision, reason=text) for each in order.candidates]
            return (
                Trial(engine=REFERENCE, precision="fp32", reason=reference.refusal),
                *(other for other in others if other.engine != REFERENCE),
            )
        requests = _requests(order, reference.engine)
        if isinstance(requests, str):
            reference.refusal = requests
            requests = []
        tried = [reference]
        for candidate in order.candidates:
            if candidate.engine == REFERENCE:
                continue
            each = _Tried(candidate=candidate, engine=ready.get(candidate.engine), precision=candidate.precision)
            tried.append(each)
            if reference.refusal:
                each.refusal = "there is nothing to compare with"
                continue
            _build(each, kinds, order, stack)
            _compare(each, reference.engine, requests, order)
        if order.timing_s and not reference.refusal:
            _time(tried, order, requests, clock)
        disturbed = _disturbed(reference, order)
        return tuple(_trial(each, order, disturbed=disturbed) for each in tried)


def _build(tried: _Tried, kinds: Mapping[str, EngineKind], order: TrialOrder, stack: ExitStack) -> None:
    """Build what is not there yet, and look what it is."""
    candidate = tried.candidate
    if tried.engine is None:
        try:
            tried.engine = kinds[candidate.engine].build(order.model, order.options(candidate.precision))
        except EngineError as error:
            tried.refusal = str(error)[:1000]
            return
        stack.callback(tried.engine.close)
    engine = tried.engine
    tried.precision = engine.facts.precision
    # A file of half precision or of integers is what it is; only FP32 can be lowered.
    if candidate.precision not in {"fp32", tried.precision}:
        tried.refusal = f"asked for {candidate.precision}, it computes in {tried.precision}"


def _requests(order: TrialOrder, reference: Engine) -> list[tuple[int, int, Mapping[str, Array]]] | str:
    """(rows, length, inputs) of every batch size and length, and those given; or why the model answers none."""
    batches = reference.signature.batches if order.batches is None else order.batches
    samples = Samples(_narrowed(reference.signature, order.dims), read_graph(order.model), batches=batches)
    names = [spec.name for spec in reference.signature.outputs]
    problem = ""

    def answers(length: int) -> bool:
        nonlocal problem
        try:
            reference.run(samples.make(1, length), names)
        except EngineError as error:
            problem = str(error)[:500]
            return False
        return True

    if has_free_dimensions(_narrowed(reference.signature, order.dims), batches=batches):
        lengths = [length for length in order.lengths or LENGTHS if answers(length)]
        if not lengths and not order.lengths:
            lengths = [length for length in LENGTHS_OTHERWISE if answers(length)][:1]
    else:
        lengths = [0] if answers(0) else []
    sizes = buckets(order.rows_max, order.rows_preferred, batches=batches)
    made: list[tuple[int, int, Mapping[str, Array]]] = [(given.rows, -1, given.inputs) for given in order.given]
    made += [(rows, length, samples.make(rows, length)) for length in lengths for rows in sizes]
    return made or f"it answers no request that was made up for it: {problem}"


def _narrowed(signature: Signature, dims: Mapping[str, tuple[int, ...]]) -> Signature:
    """Free dimensions as they were declared, counted from the last: a batch dimension may be left out."""

    def narrowed(spec: TensorSpec) -> TensorSpec:
        said = dims.get(spec.name, ())[-len(spec.shape) :] if spec.shape else ()
        before = spec.shape[: len(spec.shape) - len(said)]
        free = tuple(said[place] if dim == -1 else dim for place, dim in enumerate(spec.shape[len(before) :]))
        return replace(spec, shape=(*before, *free))

    return Signature(inputs=tuple(map(narrowed, signature.inputs)), outputs=signature.outputs)


def _compare(
    tried: _Tried, reference: Engine, requests: Sequence[tuple[int, int, Mapping[str, Array]]], order: TrialOrder
) -> None:
    if tried.engine is None or tried.refusal:
        return
    allowed = tolerance(tried.precision) if order.tolerance is None else order.tolerance
    specs = reference.signature.outputs
    names = [spec.name for spec in specs]
    for rows, _, inputs in requests:
        try:
            found = tried.engine.run(inputs, names)
            expected = reference.run(inputs, names)
        except EngineError as error:
            tried.refusal = f"a batch of {rows} rows fails: {str(error)[:500]}"
            return
        tried.difference = tried.difference.worse(difference(specs, expected, found))
        if not tried.difference.relative <= allowed:
            tried.refusal = (
                f"outside tolerance: '{tried.difference.output}' of a batch of {rows} rows differs by "
                f"{tried.difference.relative:.3g} of its largest magnitude, allowed is {allowed:.3g}"
            )
            return


def _time(
    tried: Sequence[_Tried],
    order: TrialOrder,
    requests: Sequence[tuple[int, int, Mapping[str, Array]]],
    clock: Clock,
) -> None:
    """Rounds in which every engine runs each batch, so that a slow moment of the machine meets them all.

    Batches are run one at a time, and as many at once as will serve.
    """
    running = [each for each in tried if each.engine is not None and not each.refusal]
    first = next((length for _, length, _ in requests if length >= 0), -1)
    with ThreadPoolExecutor(order.concurrency) as pool:
        for rows, length, inputs in requests:
            if length != first:
                continue
            least = _ROUNDS_MIN if rows <= order.rows_preferred else 1
            begin, rounds = clock(), 0
            while rounds < least or (rounds < _ROUNDS_MAX and clock() - begin < order.timing_s):
                for each in running:
                    _time_once(each, rows, inputs, clock)
                    if order.concurrency > 1:
                        _time_loaded(each, rows, inputs, clock, pool, order.concurrency)
                rounds += 1


def _time_once(tried: _Tried, rows: int, inputs: Mapping[str, Array], clock: Clock) -> None:
    if tried.engine is None or tried.refusal:
        return
    used = time.process_time()
    try:
        seconds = _run(tried.engine, inputs, clock)
    except EngineError as error:
        tried.refusal = f"a batch of {rows} rows fails: {str(error)[:500]}"
        return
    tried.times.setdefault(rows, []).append((seconds, time.process_time() - used))


def _time_loaded(  # noqa: PLR0917
    tried: _Tried, rows: int, inputs: Mapping[str, Array], clock: Clock, pool: ThreadPoolExecutor, instances: int
) -> None:
    """Time of a batch while others run: each thread runs two, so that all are at work most of the time."""
    engine = tried.engine
    if engine is None or tried.refusal:
        return

    def work(_: int) -> list[float]:
        return [_run(engine, inputs, clock) for _ in range(2)]

    used = time.process_time()
    try:
        times = [seconds for found in pool.map(work, range(instances)) for seconds in found]
    except EngineError as error:
        tried.refusal = f"a batch of {rows} rows fails: {str(error)[:500]}"
        return
    used = time.process_time() - used
    tried.loaded.setdefault(rows, []).append((statistics.mean(times), used / len(times)))


def _run(engine: Engine, inputs: Mapping[str, Array], clock: Clock) -> float:
    names = [spec.name for spec in engine.signature.outputs]
    begin = clock()
    engine.run(inputs, names)
    return clock() - begin


def _disturbed(reference: _Tried, order: TrialOrder) -> bool:
    """Whether others took the CPU away: the reference computes on the caller's thread, so its time should be CPU time.

    Then CPU time tells engines apart better than the clock, where a batch has one thread.
    """
    pairs = [pair for found in reference.times.values() for pair in found]
    took, used = sum(took for took, _ in pairs), sum(used for _, used in pairs)
    return order.threads == 1 and took > 0 and used / took < _UNDISTURBED


def _trial(tried: _Tried, order: TrialOrder, *, disturbed: bool) -> Trial:
    reason = tried.refusal
    if not reason and tried.candidate.engine == REFERENCE:
        reason = "the reference" + (", by CPU time: the machine was busy" if disturbed else "")
    elif not reason:
        allowed = tolerance(tried.precision) if order.tolerance is None else order.tolerance
        by = f"'{tried.difference.output}' differs by {tried.difference.relative:.2g}, allowed is {allowed:.2g}"
        reason = f"answers as the reference: {by}"
    return Trial(
        engine=tried.candidate.engine,
        precision=tried.precision,
        reason=reason,
        accepted=not tried.refusal,
        error_max=tried.difference.absolute,
        batch_times=tuple((rows, _median(found, disturbed)) for rows, found in sorted(tried.times.items())),
        # What serves beside the trial only ever adds time: the faster quarter of the rounds tells engines apart.
        loaded_times=tuple((rows, _quarter(found, disturbed)) for rows, found in sorted(tried.loaded.items())),
        instances=order.concurrency,
    )


def _cpu_time(times: Sequence[tuple[float, float]]) -> float | None:
    """Mean CPU time; None for runs so short that nobody comes between, and that systems count CPU time coarsely in."""
    if min(took for took, _ in times) < _SHORT_S:
        return None
    return statistics.mean(used for _, used in times) or None


def _median(times: Sequence[tuple[float, float]], disturbed: bool) -> float:
    used = _cpu_time(times) if disturbed else None
    return used if used is not None else statistics.median(took for took, _ in times)


def _quarter(times: Sequence[tuple[float, float]], disturbed: bool) -> float:
    used = _cpu_time(times) if disturbed else None
    return used if used is not None else sorted(took for took, _ in times)[len(times) // 4]


def order_to_json(order: TrialOrder) -> dict[str, Any]:
    """An order as plain values."""
    return {
        "model": str(order.model),
        "candidates": [[each.engine, each.precision] for each in order.candidates],
        "threads": order.threads,
        "concurrency": order.concurrency,
        "batches": order.batches,
        "rows_max": order.rows_max,
        "rows_preferred": order.rows_preferred,
        "lengths": list(order.lengths),
        "dims": {name: list(dims) for name, dims in order.dims.items()},
        "tolerance": order.tolerance,
        "timing_s": order.timing_s,
        "given": [
            {
                "rows": given.rows,
                "inputs": [
                    [name, array.dtype.str, list(array.shape), array.tobytes().hex()]
                    for name, array in given.inputs.items()
                    if not array.dtype.hasobject
                ],
            }
            for given in order.given
        ],
    }


def order_from_json(data: Mapping[str, Any]) -> TrialOrder:
    """Read `order_to_json`."""
    import numpy as np  # noqa: PLC0415

    return TrialOrder(
        model=Path(data["model"]),
        candidates=tuple(Candidate(engine=engine, precision=precision) for engine, precision in data["candidates"]),
        threads=data["threads"],
        concurrency=data["concurrency"],
        batches=data["batches"],
        rows_max=data["rows_max"],
        rows_preferred=data["rows_preferred"],
        lengths=tuple(data["lengths"]),
        dims={name: tuple(dims) for name, dims in data["dims"].items()},
        tolerance=data["tolerance"],
        timing_s=data["timing_s"],
        given=tuple(
            Given(
                rows=given["rows"],
                inputs={
                    name: np.frombuffer(bytes.fromhex(raw), dtype).reshape(shape)
                    for name, dtype, shape, raw in given["inputs"]
                },
            )
            for given in data["given"]
        ),
    )


def _limit(cpu_s: int, memory_bytes: int) -> None:
    """Bounds of this process: CPU time, memory, no core file; and the lowest place in the queue for the CPU."""
    with suppress(OSError):
        os.nice(_NICE)
    limits = [(resource.RLIMIT_CPU, cpu_s), (resource.RLIMIT_CORE, 0)]
    if memory_bytes:
        limits += [(resource.RLIMIT_DATA, memory_bytes), (resource.RLIMIT_AS, _ADDRESSES_BYTES)]
    for what, value in limits:
        hard = resource.getrlimit(what)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (most, hard))


def main() -> None:
    """Read an order, try, write the trials."""
    from mlmesh_inference.engines.kinds import engine_kinds  # noqa: PLC0415  it knows every engine

    document = json.loads(sys.stdin.buffer.read())
    # What libraries print must not get among the trials.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _limit(document["cpu_s"], document["memory_bytes"])
    kinds = {kind.name: kind for kind in engine_kinds()}
    trials = try_engines(order_from_json(document["order"]), kinds)
    json.dump([trial.to_json() for trial in trials], out)
    out.flush()
    # Libraries with threads of their own do not always end well.
    os._exit(0)


if __name__ == "__main__":
    main()
