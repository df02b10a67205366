"""Which streams are asked to move, and when; chance and time are the test's."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from mlmesh_inference.moving import Asked, OpenSequences, OpenStream, OpenStreams, Why


class Clock:
    """An event loop's `call_later` whose time the test passes."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.timers: list[tuple[float, Callable[[], object], Clock.Timer]] = []

    class Timer:
        def __init__(self) -> None:
            self.cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    def later(self, seconds: float, what: Callable[[], object]) -> Timer:
        timer = Clock.Timer()
        self.timers.append((self.now_s + seconds, what, timer))
        return timer

    def pass_to(self, now_s: float) -> None:
        for at_s, what, timer in sorted(self.timers, key=lambda entry: entry[0]):
            if self.now_s <= at_s <= now_s and not timer.cancelled:
                what()
        self.timers = [entry for entry in self.timers if entry[0] > now_s]
        self.now_s = now_s


class Opened:
    """Streams, and what each was told."""

    def __init__(self, *, seed: int = 1, age_s: float = 0.0) -> None:
        self.clock = Clock()
        self.all = OpenStreams(self.clock.later, chance=random.Random(seed), age_s=age_s)  # noqa: S311
        self.told: dict[OpenStream, list[Why]] = {}

    def open(self, count: int = 1, *, version: int = 1, model: str = "m", movable: bool = True) -> list[OpenStream]:
        opened = []
        for _ in range(count):
            told: list[Why] = []
            stream = self.all.open(movable=movable, ask=told.append)
            self.told[stream] = told
            if version:
                stream.used(model, version)
            opened.append(stream)
        return opened

    @property
    def asked(self) -> int:
        return sum(bool(told) for told in self.told.values())


def test_streams_are_counted_by_the_version_that_they_last_asked() -> None:
    it = Opened()
    first, second = it.open(2)
    second.used("m", 2)
    assert (it.all.open_at("m", 1), it.all.open_at("m", 2)) == (1, 1)
    second.used("other", 2)
    assert (it.all.open_at("m", 2), it.all.open_at("other", 2)) == (0, 1)
    for stream in (first, second, second):
        stream.close()
    assert (len(it.all), it.all.open_at("m", 1), it.all.open_at("other", 2)) == (0, 0, 0)


def test_a_share_of_those_that_match_and_can_move_is_asked() -> None:
    it = Opened()
    it.open(10)
    it.open(6, version=2)
    it.open(4, movable=False)
    it.open(3, model="other")
    assert it.all.move(model="m", version=1, share=0.5) == Asked(stream_count=14, asked_count=5, pinned_count=4)
    assert it.asked == 5
    assert it.all.move(model="m", version=2) == Asked(stream_count=6, asked_count=6, pinned_count=0)
    assert it.all.move(model="nobody") == Asked(stream_count=0, asked_count=0, pinned_count=0)


def test_a_share_of_few_streams_comes_right_over_many_processes() -> None:
    asked = 0
    for seed in range(2000):
        it = Opened(seed=seed)
        it.open(1)
        asked += it.all.move(share=0.3).asked_count
    assert 0.27 < asked / 2000 < 0.33


def test_no_stream_is_told_twice_but_of_a_drain() -> None:
    it = Opened()
    (stream,) = it.open()
    it.all.move()
    it.all.move()
    assert it.told[stream] == [Why.ASKED]
    it.all.drain()
    it.all.drain()
    assert it.told[stream] == [Why.ASKED, Why.DRAIN]


def test_asking_is_spread_over_time_and_a_stream_that_ended_is_not_asked() -> None:
    it = Opened()
    streams = it.open(100)
    assert it.all.move(spread_s=10).asked_count == 100
    assert it.asked == 0
    it.clock.pass_to(5)
    assert 30 < it.asked < 70
    for stream in streams[:50]:
        stream.close()
    it.clock.pass_to(10)
    assert all(it.told[stream] for stream in streams[50:])


def test_streams_of_one_moment_do_not_grow_old_in_one_moment() -> None:
    it = Opened(age_s=100)
    it.open(100)
    (pinned,) = it.open(movable=False)
    it.clock.pass_to(79)
    assert it.asked == 0
    it.clock.pass_to(100)
    assert 20 < it.asked < 80
    it.clock.pass_to(121)
    assert it.asked == 100
    assert it.told[pinned] == []


def test_everybody_is_told_that_the_server_goes_away_and_so_is_who_comes_later() -> None:
    it = Opened()
    (movable,), (pinned,) = it.open(), it.open(movable=False)
    it.all.drain()
    (late,) = it.open(version=0)
    assert [it.told[stream] for stream in (movable, pinned, late)] == [[Why.DRAIN]] * 3


def test_sequences_can_go_on_elsewhere_only_if_their_runner_can() -> None:
    open_sequences = OpenSequences("me")
    assert not open_sequences
    assert open_sequences.portable
    open_sequences.began(("m", 1, 7), object())
    assert open_sequences
    assert not open_sequences.portable
    with pytest.raises(TypeError, match="'m' cannot go on"):
        open_sequences.take()
    open_sequences.ended(("m", 1, 7))
    assert not open_sequences
