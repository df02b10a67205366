from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from benchmarks.harness import (
    Recorder,
    closed_loop,
    open_loop,
    ratio_of_medians,
    schedule,
    streaming,
)


async def _quick() -> None:
    await asyncio.sleep(0)


async def test_a_closed_loop_sends_what_was_asked_for_and_no_more_at_once() -> None:
    at_once, most = 0, 0

    async def request() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1

    result = await closed_loop([request] * 3, count=50)
    assert (result.requests, most) == (50, 3)
    assert result.failures == {}
    assert result.per_s > 0


async def test_failures_are_counted_apart_from_latencies() -> None:
    numbers = iter(range(10))

    async def request() -> None:
        if next(numbers) % 2:
            raise ValueError

    result = await closed_loop([request], count=10)
    assert result.failures == {"ValueError": 5}
    assert result.requests == 10


async def test_a_stall_is_paid_by_all_that_were_due_during_it() -> None:
    stalled = asyncio.Event()
    sent = 0

    async def request() -> None:
        nonlocal sent
        sent += 1
        if sent == 1:
            # The server stands still for 50 ms, long after every request was due.
            asyncio.get_running_loop().call_later(0.05, stalled.set)
        await stalled.wait()

    result = await open_loop([request], rate_per_s=10_000, count=40, in_flight_max=1)
    assert result.requests == 40
    # A closed loop would have seen one slow request of forty; here the median is slow, too.
    assert result.latency_us["p50"] > 30_000


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    gate, waiting = asyncio.Event(), 0

    async def request() -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 20:
            gate.set()
        await gate.wait()

    assert (await open_loop([request], rate_per_s=10_000, count=20)).requests == 20


async def test_time_bounds_both_loops() -> None:
    async def slow() -> None:
        await asyncio.sleep(0.01)

    assert (await closed_loop([slow], count=10_000, time_max_s=0.02)).requests < 10
    assert (await open_loop([_quick], rate_per_s=1000, count=10_000, time_max_s=0.01)).requests <= 11


def test_arrivals_are_even_or_random_at_the_same_rate() -> None:
    assert schedule(10, 3) == [0.0, 0.1, 0.2]
    random = schedule(10, 10_000, seed=1)
    assert random == schedule(10, 10_000, seed=1)
    assert random[-1] / 1000 == pytest.approx(1, rel=0.05)


async def test_a_stream_pairs_answers_with_requests_in_order() -> None:
    seen: list[Any] = []

    async def call(messages: AsyncIterator[int]) -> AsyncIterator[int]:
        async for message in messages:
            yield message * 2

    async with streaming(call, 21, check=seen.append) as request:
        result = await closed_loop([request] * 4, count=40)
    assert result.requests == 40
    assert seen == [42] * 40


async def test_a_broken_stream_fails_its_requests_instead_of_hanging() -> None:
    async def call(messages: AsyncIterator[int]) -> AsyncIterator[int]:
        async for message in messages:
            yield message
            raise ConnectionError

    async with streaming(call, 1) as request:
        result = await closed_loop([request], count=1)
        with pytest.raises(ConnectionError):
            await request()
    assert result.requests == 1


async def test_a_wrong_answer_is_a_failure() -> None:
    async def call(messages: AsyncIterator[int]) -> AsyncIterator[int]:
        async for message in messages:
            yield message

    def check(_answer: int) -> None:
        raise ValueError

    async with streaming(call, 1, check=check) as request:
        assert (await closed_loop([request], count=3)).failures == {"ValueError": 3}


async def test_cpu_is_that_of_the_process_tree() -> None:
    async def burn() -> None:
        sum(range(300_000))

    result = await closed_loop([burn], count=20, cpu={"me": [os.getpid()]})
    assert result.cpu_us_per_request["me"] > 500


def test_percentiles_are_those_of_the_histogram() -> None:
    recorder = Recorder()
    for value in range(1, 1001):
        recorder.answered(value / 1e6)
    assert recorder.histogram.get_value_at_percentile(99) == pytest.approx(990, abs=1)


def test_ratios_are_taken_round_by_round() -> None:
    # The second round was slow for both: the ratio is not.
    assert ratio_of_medians([2, 20, 2.2], [1, 10, 1]) == 2
