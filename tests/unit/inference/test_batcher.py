"""The batcher with an engine that the test steps: batches, blame, cancellation, deadlines, draining."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from mlmesh_inference.scheduling.batcher import Batcher, BatchReport, InferenceError
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.scheduling.queue import Pending
from mlmesh_runtime.errors import InvalidInput, NotReady, Overloaded, TimedOut
from tests.support.inference import GatedEngine, rows, submitted


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.reports: list[BatchReport] = []
        self.drops: list[str] = []

    def batch_done(self, report: BatchReport) -> None:
        self.reports.append(report)

    def dropped(self, item: Pending, reason: str) -> None:
        self.drops.append(reason)


class ManualClock:
    """Nanoseconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        return self.now


def batcher(engine: GatedEngine, seen: Seen | None = None, **arguments: Any) -> Batcher:
    clock = arguments.pop("clock", None)
    more = {"clock": clock} if clock else {}
    return Batcher(engine, BatchPolicy(**arguments), seen or Seen(), name="m/1", **more)


def submit(to: Batcher, *values: float, **arguments: Any) -> asyncio.Future[Any]:
    return submitted(to, {"x": rows(*values)}, rows=len(values), **arguments)


async def test_requests_of_one_turn_run_in_one_batch_and_get_their_own_rows() -> None:
    engine = GatedEngine(is_open=True)
    seen = Seen()
    it = batcher(engine, seen)
    outcomes = [submit(it, 1.0), submit(it, 2.0, 3.0), submit(it, 4.0)]
    results = [(await outcome)[0][:, 0].tolist() for outcome in outcomes]
    assert results == [[2.0], [4.0, 6.0], [8.0]]
    assert engine.batches == [[1.0, 2.0, 3.0, 4.0]]
    assert [report.rows for report in seen.reports] == [4]
    await it.drain()


async def test_what_came_while_the_engine_ran_is_the_next_batch() -> None:
    engine = GatedEngine()
    it = batcher(engine)
    first = submit(it, 1.0)
    await engine.begun()
    later = [submit(it, float(n)) for n in range(2, 8)]
    assert it.depth == 6
    engine.open()
    await asyncio.gather(first, *later)
    assert engine.batches == [[1.0], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]
    await it.drain()


async def test_two_instances_run_at_once() -> None:
    engine = GatedEngine(concurrency=2)
    it = batcher(engine, rows_preferred=1)
    outcomes = [submit(it, 1.0), submit(it, 2.0)]
    await engine.begun()
    await engine.begun()
    assert sorted(engine.batches) == [[1.0], [2.0]]
    engine.open()
    await asyncio.gather(*outcomes)
    await it.drain()


async def test_a_single_request_reaches_the_engine_without_a_copy() -> None:
    engine = GatedEngine(is_open=True)
    given: list[Any] = []
    engine.result = lambda x: given.append(x) or x  # type: ignore[func-returns-value]
    it = batcher(engine)
    array = rows(5.0)
    await submitted(it, {"x": array})
    assert given[0] is array
    await it.drain()


async def test_one_bad_request_fails_alone() -> None:
    engine = GatedEngine(is_open=True)
    engine.fail_on = 13.0
    seen = Seen()
    it = batcher(engine, seen)
    good, bad, also_good = submit(it, 1.0), submit(it, 13.0), submit(it, 3.0)
    assert (await good)[0][0, 0] == 2.0
    assert (await also_good)[0][0, 0] == 6.0
    with pytest.raises(InferenceError) as caught:
        await bad
    assert caught.value.reason == "ENGINE_FAILED"
    assert "13" not in caught.value.message
    assert len(seen.reports[0].failed) == 1
    await it.drain()


async def test_an_engine_that_gives_the_wrong_number_of_rows_answers_nobody_wrongly() -> None:
    engine = GatedEngine(is_open=True)
    engine.result = lambda x: x[:1]
    it = batcher(engine)
    outcomes = [submit(it, 1.0, 2.0), submit(it, 3.0)]
    with pytest.raises(InferenceError):
        await outcomes[0]
    assert (await outcomes[1])[0][0, 0] == 3.0, "alone its one row is right"
    await it.drain()


async def test_a_typed_error_of_an_engine_reaches_the_caller() -> None:
    engine = GatedEngine(is_open=True)

    def refuse(x: Any) -> Any:
        raise InvalidInput("not with me")

    engine.result = refuse
    it = batcher(engine)
    with pytest.raises(InvalidInput, match="not with me"):
        await submit(it, 1.0)
    await it.drain()


async def test_a_cancelled_request_never_reaches_the_engine() -> None:
    engine = GatedEngine()
    seen = Seen()
    it = batcher(engine, seen)
    first = submit(it, 1.0)
    await engine.begun()
    second, third = submit(it, 2.0), submit(it, 3.0)
    second.cancel()
    engine.open()
    await asyncio.gather(first, third)
    assert engine.batches == [[1.0], [3.0]]
    assert seen.drops == ["cancelled"]
    await it.drain()


async def test_cancelling_what_runs_leaves_its_mates_alone() -> None:
    engine = GatedEngine()
    it = batcher(engine)
    one, two = submit(it, 1.0), submit(it, 2.0)
    await engine.begun()
    one.cancel()
    engine.open()
    assert (await two)[0][0, 0] == 4.0
    await it.drain()


async def test_an_expired_request_never_reaches_the_engine() -> None:
    engine, clock, seen = GatedEngine(), ManualClock(), Seen()
    it = batcher(engine, seen, clock=clock)
    first = submit(it, 1.0)
    await engine.begun()
    late, punctual = submit(it, 2.0, deadline_ns=2_000), submit(it, 3.0, deadline_ns=9_000)
    clock.now = 2_000
    engine.open()
    with pytest.raises(TimedOut) as caught:
        await late
    assert caught.value.reason == "DEADLINE_TOO_SHORT"
    assert (await punctual)[0][0, 0] == 6.0
    await first
    assert engine.batches == [[1.0], [3.0]]
    assert seen.drops == ["expired"]
    await it.drain()


async def test_a_request_that_is_late_already_is_refused_at_once() -> None:
    engine, clock = GatedEngine(), ManualClock()
    it = batcher(engine, clock=clock)
    with pytest.raises(TimedOut):
        submit(it, 1.0, deadline_ns=clock.now)
    assert engine.batches == []
    await it.drain()


async def test_a_rerun_leaves_out_who_went_away_meanwhile() -> None:
    engine = GatedEngine()
    engine.fail_on = 13.0
    it = batcher(engine)
    bad, gone, good = submit(it, 13.0), submit(it, 2.0), submit(it, 3.0)
    await engine.begun()
    gone.cancel()
    engine.open()
    assert (await good)[0][0, 0] == 6.0
    with pytest.raises(InferenceError):
        await bad
    assert engine.batches == [[13.0, 2.0, 3.0], [13.0], [3.0]]
    await it.drain()


async def test_a_full_queue_says_so_and_when_to_come_back() -> None:
    engine, seen = GatedEngine(), Seen()
    it = batcher(engine, seen, queue_items_max=2)
    running = submit(it, 1.0)
    await engine.begun()
    waiting = [submit(it, 2.0), submit(it, 3.0)]
    with pytest.raises(Overloaded) as caught:
        submit(it, 4.0)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= 10
    assert seen.drops == ["refused"]
    engine.open()
    await asyncio.gather(running, *waiting)
    await it.drain()


async def test_draining_finishes_what_was_taken_and_takes_no_more() -> None:
    engine = GatedEngine()
    it = batcher(engine, rows_preferred=1)
    taken = [submit(it, 1.0), submit(it, 2.0)]
    await engine.begun()
    async with asyncio.TaskGroup() as group:
        drained = group.create_task(it.drain())
        await asyncio.sleep(0)
        with pytest.raises(NotReady) as caught:
            submit(it, 3.0)
        assert caught.value.reason == "MODEL_NOT_READY"
        assert not engine.closed
        engine.open()
        await drained
    assert engine.closed
    assert [outcome.result()[0][0, 0] for outcome in taken] == [2.0, 4.0]


async def test_aborting_fails_what_waits() -> None:
    engine = GatedEngine()
    it = batcher(engine)
    running = submit(it, 1.0)
    await engine.begun()
    waiting = submit(it, 2.0)
    it.abort()
    with pytest.raises(NotReady):
        await waiting
    engine.open()
    await running


async def test_times_of_a_report_are_in_order() -> None:
    engine, seen = GatedEngine(is_open=True), Seen()
    it = batcher(engine, seen)
    await submit(it, 1.0)
    (report,) = seen.reports
    times = [
        report.items[0].arrived_ns,
        report.formed_ns,
        report.engine_start_ns,
        report.engine_end_ns,
        report.done_ns,
    ]
    assert times == sorted(times)
    assert report.engine_start_ns > 0
    await it.drain()


async def test_a_slow_model_does_not_stand_in_another_models_way() -> None:
    stuck, quick = GatedEngine(), GatedEngine(is_open=True)
    first, second = batcher(stuck), batcher(quick)
    waiting = submit(first, 1.0)
    await stuck.begun()
    assert (await submit(second, 2.0))[0][0, 0] == 4.0
    assert not waiting.done()
    stuck.open()
    await waiting
    await first.drain()
    await second.drain()


async def test_ragged_shapes_run_apart() -> None:
    engine = GatedEngine(is_open=True)
    it = batcher(engine)
    wide = submitted(it, {"x": np.ones((1, 8), np.float32)})
    narrow = submitted(it, {"x": np.ones((1, 4), np.float32)})
    assert (await wide)[0].shape == (1, 8)
    assert (await narrow)[0].shape == (1, 4)
    assert len(engine.batches) == 2
    await it.drain()
