"""One batch on an engine: put together, run, taken apart; and who is to blame when it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlmesh_inference.engines.base import Engine, EngineError
from mlmesh_inference.scheduling.fairness import Pending
from mlmesh_inference.tensors import Array, show

Clock = Callable[[], int]
"""Nanoseconds of a clock that never goes back."""

Outcome = list[Array] | Exception | None
"""Of one request: its results, why it failed, or None: its time was over before its turn came."""


@dataclass(slots=True, kw_only=True, eq=False)
class Run:
    """A batch under way. Times are nanoseconds of the batcher's clock; `ends_ns` is when it is expected back."""

    items: Sequence[Pending]
    rows: int
    formed_ns: int
    ends_ns: float
    engine_start_ns: int = 0
    engine_end_ns: int = 0
    results: list[Array] = field(default_factory=list)
    error: Exception | None = None
    alone: list[Outcome] | None = None


def execute(run: Run, engine: Engine, clock: Clock, *, batches: bool) -> None:
    """Run a batch; blocking. When a batch of several fails, each runs alone, so that only those at fault fail."""
    try:
        run.results = _execute(run.items, engine, clock, batches=batches, run=run)
    except Exception as error:
        run.error = error
    run.engine_end_ns = clock()
    run.engine_start_ns = run.engine_start_ns or run.engine_end_ns
    if run.error is not None and len(run.items) > 1:
        run.alone = [_execute_alone(item, engine, clock, batches=batches) for item in run.items]


def _execute(
    items: Sequence[Pending], engine: Engine, clock: Clock, *, batches: bool, run: Run | None = None
) -> list[Array]:
    first = items[0].work
    if len(items) == 1:
        # Inputs are views of requests, wherever they begin there; joining several aligns them as well.
        inputs = {name: array if array.flags.aligned else array.copy() for name, array in first.inputs.items()}
    else:
        inputs = {name: np.concatenate([item.work.inputs[name] for item in items]) for name in first.inputs}
    if run is not None:
        run.engine_start_ns = clock()
    results = engine.run(inputs, first.outputs)
    if batches:
        rows = sum([item.rows for item in items])
        for name, array in zip(first.outputs, results, strict=True):
            if array.shape[:1] != (rows,):
                raise EngineError(f"output '{name}' has shape {show(array.shape)} for a batch of {rows} rows")
    return results


def _execute_alone(item: Pending, engine: Engine, clock: Clock, *, batches: bool) -> Outcome:
    if item.sink.done() or 0 < item.latest_ns <= clock():
        return None
    try:
        return _execute([item], engine, clock, batches=batches)
    except Exception as error:
        return error


def outcomes(run: Run) -> Sequence[Outcome]:
    """What each request of the batch gets: views of the batch's results."""
    if run.alone is not None:
        return run.alone
    if run.error is not None:
        return [run.error]
    if len(run.items) == 1:
        return [run.results]
    found: list[Outcome] = []
    start = 0
    for item in run.items:
        end = start + item.rows
        found.append([array[start:end] for array in run.results])
        start = end
    return found
