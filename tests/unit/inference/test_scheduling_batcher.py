"""The batcher under pressure, with an engine that the test steps and a clock that it moves."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from typing import Any

import pytest

from mlmesh_inference.scheduling.batcher import Batcher, BatchReport
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.scheduling.queue import Pending
from mlmesh_inference.serving import QueueConfig
from mlmesh_runtime.errors import Overloaded, TimedOut
from tests.support.inference import GatedEngine, eventually, rows, submitted

MS = 1_000_000
SECONDS = {1: 0.010, 8: 0.080}


class Clock:
    """Nanoseconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000 * MS

    def __call__(self) -> int:
        return self.now


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.dropped_as: list[str] = []

    def batch_done(self, report: BatchReport) -> None:
        """Nothing to remember."""

    def dropped(self, item: Pending, reason: str) -> None:
        self.dropped_as.append(reason)


def batcher(
    engine: GatedEngine, *, clock: Clock | None = None, seen: Seen | None = None, known: bool = True, **policy: Any
) -> Batcher:
    """A batcher whose engine takes 10 ms for a row and 80 ms for a full batch of eight."""
    seconds = SECONDS if known else None
    return Batcher(engine, BatchPolicy(**policy), seen or Seen(), name="m/1", seconds=seconds, clock=clock or Clock())


def submit(to: Batcher, value: float, **fields: Any) -> asyncio.Future[Any]:
    return submitted(to, {"x": rows(value)}, **fields)


async def busy(to: Batcher, engine: GatedEngine, waiting: int = 0, **fields: Any) -> list[asyncio.Future[Any]]:
    """One request in the engine, and some behind it."""
    first = submit(to, 0.0)
    await engine.begun()
    return [first, *(submit(to, float(number), **fields) for number in range(1, waiting + 1))]


async def test_who_cannot_be_in_time_is_refused_on_arrival_and_told_when_to_come_back() -> None:
    engine, clock, seen = GatedEngine(), Clock(), Seen()
    it = batcher(engine, clock=clock, seen=seen)
    outcomes = await busy(it, engine, waiting=8, deadline_ns=clock.now + 190 * MS)
    # 10 ms to the end of what runs, 80 for those who wait, 80 for its own batch, an eighth of one as a margin, and a
    # tenth of its time for the way back: 200 ms.
    with pytest.raises(Overloaded) as caught:
        submit(it, 9.0, deadline_ns=clock.now + 199 * MS)
    assert caught.value.reason == "WOULD_EXPIRE"
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s < 0.1
    outcomes.append(submit(it, 9.0, deadline_ns=clock.now + 201 * MS))
    assert seen.dropped_as == ["would_expire"]
    engine.open()
    await asyncio.gather(*outcomes)
    await it.drain()


async def test_an_idle_server_refuses_nobody_however_short_the_time() -> None:
    engine, clock = GatedEngine(is_open=True), Clock()
    it = batcher(engine, clock=clock)
    assert (await submit(it, 1.0, deadline_ns=clock.now + 1))[0][0, 0] == 2.0
    await it.drain()


async def test_nothing_is_foreseen_before_anything_was_measured() -> None:
    engine, clock = GatedEngine(), Clock()
    it = batcher(engine, clock=clock, known=False)
    outcomes = await busy(it, engine, waiting=20)
    outcomes.append(submit(it, 21.0, deadline_ns=clock.now + 1))
    engine.open()
    await asyncio.gather(*outcomes)
    await it.drain()


async def test_who_waited_too_long_to_be_in_time_is_not_run_in_vain() -> None:
    engine, clock, seen = GatedEngine(), Clock(), Seen()
    it = batcher(engine, clock=clock, seen=seen)
    (first,) = await busy(it, engine)
    hopeless = submit(it, 1.0, deadline_ns=clock.now + 400 * MS)
    clock.now += 399 * MS  # not over yet, but no batch takes a millisecond
    engine.open()
    with pytest.raises(TimedOut):
        await hopeless
    await first
    assert engine.batches == [[0.0]]
    assert seen.dropped_as == ["expired"]
    await it.drain()


async def test_who_is_not_answered_in_time_makes_it_more_careful_for_a_while() -> None:
    engine, clock = GatedEngine(), Clock()
    it = batcher(engine, clock=clock, rows_preferred=1)
    known = it._admission
    assert known.usable == 0.9
    for number in range(30):
        late = submit(it, 1.0, deadline_ns=clock.now + 10 * MS)
        await engine.begun()
        clock.now += 11 * MS
        late.cancel()  # as a transport does when the time is over
        engine.step()
        submit(it, float(number))
        await engine.begun()
        engine.step()
        await eventually(lambda: not it._running)
    assert known.usable < 0.6
    engine.open()
    for _ in range(400):
        await submit(it, 1.0)
    assert known.usable == 0.9
    await it.drain()


async def test_urgent_requests_are_not_kept_out_by_others() -> None:
    engine, clock = GatedEngine(), Clock()
    it = batcher(engine, clock=clock, levels=2, level_default=2, queue_items_max=8)
    outcomes = await busy(it, engine, waiting=8)
    with pytest.raises(Overloaded, match="waiting"):
        submit(it, 9.0)
    urgent = submit(it, 99.0, priority=1, deadline_ns=clock.now + 130 * MS)
    engine.open()
    await asyncio.gather(urgent, *outcomes)
    assert engine.batches[1][0] == 99.0
    await it.drain()


async def test_a_tenant_that_floods_the_queue_does_not_keep_others_out() -> None:
    engine, seen = GatedEngine(), Seen()
    it = batcher(engine, seen=seen, queue_items_max=4, rows_preferred=1)
    first = submit(it, 0.0, tenant="flood")
    await engine.begun()
    flood = [submit(it, float(number), tenant="flood") for number in range(1, 5)]
    small = submit(it, 10.0, tenant="small")
    with pytest.raises(Overloaded) as caught:
        await flood[-1]
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_s is not None
    assert seen.dropped_as == ["refused"]
    engine.open()
    await asyncio.gather(first, small, *flood[:-1])
    assert engine.batches.index([10.0]) <= 2, "and it need not wait for all of them"
    await it.drain()


async def test_the_limit_follows_latency_and_says_so() -> None:
    engine, clock, seen = GatedEngine(), Clock(), Seen()
    it = batcher(engine, clock=clock, seen=seen, rows_preferred=8)
    assert it.concurrency_limit == 256 + 8
    outcomes = [submit(it, float(number)) for number in range(256)]
    for batch in range(32):
        await engine.begun()
        clock.now += 80 * MS
        engine.step()
        await asyncio.gather(*outcomes[8 * batch : 8 * batch + 8])
    assert it.concurrency_limit == 64
    await it.drain()


async def test_the_limit_refuses_with_its_own_reason_and_can_be_switched_off() -> None:
    engine, seen = GatedEngine(), Seen()
    it = batcher(engine, seen=seen)
    it._admission.limiter.limit = it._admission.limit = 3  # type: ignore[union-attr]
    outcomes = await busy(it, engine, waiting=2)
    with pytest.raises(Overloaded) as caught:
        submit(it, 4.0)
    assert caught.value.reason == "CONCURRENCY_LIMIT"
    assert seen.dropped_as == ["limited"]
    engine.open()
    await asyncio.gather(*outcomes)
    await it.drain()
    free = batcher(GatedEngine(is_open=True), limiter=False)
    assert free.concurrency_limit == 0
    await free.drain()


async def test_a_queue_may_bound_the_wait_and_a_request_may_shorten_it() -> None:
    engine, clock = GatedEngine(), Clock()
    it = batcher(engine, clock=clock, known=False, queue=QueueConfig(timeout_us=50_000))
    (first,) = await busy(it, engine)
    default, hurried = submit(it, 1.0), submit(it, 2.0, timeout_us=20_000)
    clock.now += 30 * MS
    engine.open()
    with pytest.raises(TimedOut):
        await hurried
    await asyncio.gather(first, default)
    await it.drain()


async def test_instances_share_what_comes_at_once() -> None:
    engine = GatedEngine(concurrency=2)
    it = batcher(engine)
    outcomes = [submit(it, float(number)) for number in range(6)]
    await engine.begun()
    await engine.begun()
    assert sorted(map(len, engine.batches)) == [3, 3]
    engine.open()
    await asyncio.gather(*outcomes)
    await it.drain()


async def test_a_free_instance_waits_for_a_fuller_batch_only_where_it_is_told_to() -> None:
    engine = GatedEngine(is_open=True)
    it = Batcher(engine, BatchPolicy(rows_preferred=3, delay_us=3_600_000_000), Seen(), name="m/1")
    outcomes = [submit(it, 1.0), submit(it, 2.0)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert engine.batches == []
    outcomes.append(submit(it, 3.0))
    await asyncio.gather(*outcomes)
    assert engine.batches == [[1.0, 2.0, 3.0]]
    late = submit(it, 4.0)
    await it.drain()
    assert (await late)[0][0, 0] == 8.0, "whoever drains does not wait"


async def test_the_wait_for_a_fuller_batch_has_an_end() -> None:
    engine = GatedEngine(is_open=True)
    it = Batcher(engine, BatchPolicy(rows_preferred=8, delay_us=1_000), Seen(), name="m/1")
    assert (await submit(it, 1.0))[0][0, 0] == 2.0
    await it.drain()


async def test_an_engine_that_fails_on_everything_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    engine, clock = GatedEngine(is_open=True), Clock()
    engine.fail_on = 13.0
    it = batcher(engine, clock=clock)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            outcomes = [submit(it, 13.0) for _ in range(8)]
            results = await asyncio.gather(*outcomes, return_exceptions=True)
            assert Counter(map(type, results)).total() == 8
            assert all(isinstance(result, Exception) for result in results)
        clock.now += 2_000 * MS
        with pytest.raises(Exception, match="failed on the request"):
            await submit(it, 13.0)
    assert len(caplog.records) == 2
    assert caplog.records[1].failures == 40  # type: ignore[attr-defined]
    await it.drain()
