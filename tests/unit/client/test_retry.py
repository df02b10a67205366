"""When a call is tried again, and when a stream connects again."""

from __future__ import annotations

import random

import pytest

from mlmesh_client.calling import Clocked, Reconnecting, StreamOptions
from mlmesh_client.errors import InferenceError, error_of
from mlmesh_client.retry import Retries, RetryPolicy

UNAVAILABLE = error_of("UNAVAILABLE", "away")


def retries(**policy: float) -> Retries:
    return Retries(RetryPolicy(**policy), random.Random(1))  # type: ignore[arg-type]  # noqa: S311


def wait(it: Retries, error: InferenceError, attempt: int = 1, **more: float | bool) -> float | None:
    return it.wait_s(error, attempt, **{"left_s": 10.0, **more})  # type: ignore[arg-type]


def test_waits_grow_and_are_spread() -> None:
    it = retries(attempts=10, first_s=0.1, most_s=1.0, budget=1000)
    for attempt, most_s in ((1, 0.1), (2, 0.2), (3, 0.4), (6, 1.0)):
        waits = [wait(it, UNAVAILABLE, attempt) for _ in range(50)]
        assert all(w is not None and 0 <= w <= most_s for w in waits)
        assert len(set(waits)) == 50


def test_a_hint_is_waited_in_full_and_not_past_the_deadline() -> None:
    hinted = error_of("RESOURCE_EXHAUSTED", "full", retry_after_s=2.0)
    waited = wait(retries(), hinted)
    assert waited is not None
    assert 2.0 <= waited <= 2.05
    assert wait(retries(), hinted, left_s=1.9) is None


@pytest.mark.parametrize(
    "error",
    [
        error_of("INVALID_ARGUMENT", "no"),
        error_of("INTERNAL", "no"),
        error_of("DEADLINE_EXCEEDED", "no"),
        error_of("RESOURCE_EXHAUSTED", "full"),
        error_of("UNAVAILABLE", "not again", retryable=False),
        error_of("RESOURCE_EXHAUSTED", "full", retry_after_s=0.1, retryable=False),
    ],
    ids=lambda error: error.code,
)
def test_what_does_not_get_better_is_not_tried_again(error: InferenceError) -> None:
    assert wait(retries(), error) is None


def test_a_request_of_a_sequence_is_tried_again_only_if_it_was_refused() -> None:
    assert wait(retries(), UNAVAILABLE, repeatable=False) is None
    assert wait(retries(), error_of("RESOURCE_EXHAUSTED", "", retry_after_s=0.1), repeatable=False) is not None


def test_when_everything_fails_retries_end_until_calls_succeed() -> None:
    it = retries(budget=10)
    assert [wait(it, UNAVAILABLE) is not None for _ in range(6)] == [True] * 4 + [False] * 2
    for _ in range(25):
        it.succeeded()
    assert wait(it, UNAVAILABLE) is not None


def test_attempts_are_bounded() -> None:
    assert wait(retries(attempts=3), UNAVAILABLE, 2) is not None
    assert wait(retries(attempts=3), UNAVAILABLE, 3) is None


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_stream_that_makes_progress_connects_at_once_and_one_that_does_not_gives_up() -> None:
    clock = Clock()
    it = Reconnecting(StreamOptions(give_up_s=5), retries(), clock)
    assert it.wait_s(None, moved=True) == 0
    for _ in range(100):
        assert it.wait_s(UNAVAILABLE, moved=False) == 0
        it.progressed()
        clock.now_s += 1
    assert it.wait_s(UNAVAILABLE, moved=False) == 0
    assert it.wait_s(UNAVAILABLE, moved=False) is not None
    clock.now_s += 5.1
    assert it.wait_s(UNAVAILABLE, moved=False) is None


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (None, True),
        (error_of("UNAVAILABLE", "", reason="DRAINING"), True),
        (error_of("INTERNAL", "Received RST_STREAM with error code 2"), True),
        (error_of("DEADLINE_EXCEEDED", "", reason="STREAM_IDLE"), True),
        (error_of("RESOURCE_EXHAUSTED", "", reason="TOO_MANY_STREAMS", retry_after_s=0.1), True),
        (error_of("INTERNAL", "", reason="INTERNAL_BUG"), False),
        (error_of("INVALID_ARGUMENT", "", reason="MALFORMED_MESSAGE"), False),
        (error_of("PERMISSION_DENIED", ""), False),
        (error_of("UNIMPLEMENTED", ""), False),
        (error_of("RESOURCE_EXHAUSTED", "message larger than max"), False),
    ],
    ids=str,
)
def test_only_ends_of_connections_are_followed_by_another(error: InferenceError | None, again: bool) -> None:
    assert (Reconnecting(StreamOptions(), retries()).wait_s(error, moved=False) is not None) is again


def test_a_timeout_is_more_than_nothing() -> None:
    for seconds in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="more than 0"):
            Clocked(seconds)
