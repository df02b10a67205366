from __future__ import annotations

from mlmesh_local.backoff import Backoff


def test_doubles_from_100_ms_to_10_s() -> None:
    backoff = Backoff()
    delays = [backoff.next_delay_s(0.0) for _ in range(9)]
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_a_healthy_run_starts_over() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.next_delay_s(29.9)
    assert backoff.next_delay_s(30.0) == 0.1
    assert backoff.next_delay_s(0.0) == 0.2


def test_days_of_failures_do_not_overflow() -> None:
    assert Backoff(failures=1_000_000).next_delay_s(0.0) == 10.0
