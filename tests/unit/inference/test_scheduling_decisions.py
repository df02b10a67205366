"""What is decided on numbers alone: batch sizes, pace, limits, waits."""

from __future__ import annotations

import pytest

from mlmesh_inference.scheduling.limiter import HARMLESS_NS, TOLERANCE, WINDOW_NS, GradientLimiter
from mlmesh_inference.scheduling.pace import Pace, end_ns
from mlmesh_inference.scheduling.policy import BatchPolicy, policy_of
from mlmesh_inference.scheduling.tuning import decide
from mlmesh_inference.serving import BatchingConfig, QueueConfig, ServingConfig

MS = 1_000_000


def test_a_batch_is_as_large_as_it_pays_and_no_larger() -> None:
    tuning = decide({1: {1: 0.0067, 2: 0.0106, 4: 0.019, 8: 0.0315, 16: 0.062, 32: 0.13}})
    assert (tuning.rows, tuning.instances) == (8, 1)
    assert tuning.reason == "8 rows: 1.7x the throughput of 1; 16 adds 2 %"
    assert tuning.seconds[8] == 0.0315


def test_batching_that_loses_is_switched_off() -> None:
    tuning = decide({1: {1: 0.001, 8: 0.009}})
    assert tuning.rows == 1
    assert tuning.reason == "1 row: batching loses, 8 rows give 0.9x the throughput"
    assert decide({1: {1: 0.001, 8: 0.0078}}).reason.startswith("1 row: batching does not pay, 8 rows give 1.0x")


def test_more_instances_are_chosen_when_they_bring_more() -> None:
    one, two = {1: 0.0051, 8: 0.025}, {1: 0.0092, 8: 0.0385}
    tuning = decide({1: one, 2: two})
    assert (tuning.rows, tuning.instances) == (8, 2)
    assert tuning.reason == "8 rows: 1.9x the throughput of 1; 2 instances (of 1: 0.77x)"
    assert decide({1: one, 2: {1: 0.0102, 8: 0.0495}}).instances == 1, "within the noise"


def test_a_bound_on_latency_keeps_batches_small() -> None:
    seconds = {1: 0.010, 4: 0.025, 16: 0.080}
    assert decide({1: seconds}).rows == 16
    assert decide({1: seconds}, latency_max_s=0.05).rows == 4
    assert decide({1: seconds}, latency_max_s=0.001).rows == 1, "one row always is allowed"


@pytest.mark.parametrize("measured", [{}, {1: {}}, {1: {0: 1.0}}, {1: {1: 0.0}}, {0: {1: 1.0}}])
def test_what_was_not_measured_decides_nothing(measured: dict[int, dict[int, float]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        decide(measured)


def test_pace_follows_the_engine() -> None:
    pace = Pace(8)
    assert (pace.full_ns, pace.margin_ns) == (0, 0), "nothing is known"
    pace.observe(8, 10 * MS)
    assert pace.full_ns == 10 * MS
    for _ in range(40):
        pace.observe(8, 30 * MS)
    assert pace.full_ns == pytest.approx(30 * MS, rel=0.02)


def test_the_margin_is_as_wide_as_what_was_foreseen_is_wrong() -> None:
    pace = Pace(8)
    for _ in range(40):
        pace.observe(8, 40 * MS, 0)
    assert pace.margin_ns == pytest.approx(5 * MS), "an eighth of a batch at least"
    for _ in range(40):
        pace.observe(8, 40 * MS, 10 * MS)
    assert pace.margin_ns == pytest.approx(10 * MS, rel=0.05), "what is always late is expected to be late"
    for number in range(40):
        pace.observe(8, 40 * MS, 10 * MS + (8 * MS if number % 2 else -8 * MS))
    assert pace.margin_ns == pytest.approx(40 * MS, rel=0.1), "it varies"
    pace.observe(8, 40 * MS, 5_000 * MS)
    assert pace.margin_ns <= pace.full_ns, "one stall does not shut the door"
    for _ in range(100):
        pace.observe(8, 40 * MS)
    assert pace.margin_ns == pytest.approx(5 * MS), "nor does it stay ajar when nothing comes near it"


def test_pace_of_sizes_that_never_ran_is_not_underestimated() -> None:
    pace = Pace(8, {1: 0.002, 4: 0.005})
    assert pace.batch_ns(1) == 2 * MS
    assert pace.batch_ns(2) == 5 * MS, "as the next larger one"
    assert pace.full_ns == 10 * MS, "twice the rows of what is known"
    assert pace.margin_ns > 0


def test_the_end_of_a_request_is_after_the_batches_before_it() -> None:
    pace = Pace(8, {1: 0.002, 8: 0.010})
    common = {"now_ns": 0, "full_rows": 8, "instances": 2}
    assert end_ns(pace, rows_ahead=0, mates=1, ends_ns=[], **common) == 2 * MS, "idle: its own batch"
    assert end_ns(pace, rows_ahead=0, mates=1, ends_ns=[4.0 * MS, 9.0 * MS], **common) == 6 * MS, (
        "the first to become free"
    )
    assert end_ns(pace, rows_ahead=8, mates=9, ends_ns=[4.0 * MS, 9.0 * MS], **common) == 19 * MS, (
        "the other takes those before"
    )
    assert end_ns(pace, rows_ahead=16, mates=17, ends_ns=[4.0 * MS, 9.0 * MS], **common) == 24 * MS, "the next round"


def feed(limiter: GradientLimiter, *, seen_ms: float, base_ms: float, inside: int, windows: int, at: int = 0) -> int:
    for number in range(windows):
        now = at + (number + 1) * WINDOW_NS
        limiter.observe(now, requests=8, seen_ns=int(8 * seen_ms * MS), base_ns=int(base_ms * MS), inside=inside)
    return at + windows * WINDOW_NS


def test_the_limit_falls_while_requests_wait_too_long_and_comes_back() -> None:
    limiter = GradientLimiter(least=64, most=272)
    at = feed(limiter, seen_ms=600, base_ms=36, inside=272, windows=30)
    assert limiter.limit == 64, "never below what keeps the engine busy"
    at = feed(limiter, seen_ms=100, base_ms=36, inside=272, windows=100, at=at)
    assert limiter.limit == 272


def test_in_balance_requests_take_about_the_tolerated_time() -> None:
    limiter = GradientLimiter(least=16, most=1000)
    at = 0
    for _ in range(300):  # Little: what is inside, by the rate
        at = feed(limiter, seen_ms=limiter.limit / 0.44, base_ms=36, inside=limiter.limit, windows=1, at=at)
    assert limiter.limit / 0.44 == pytest.approx(TOLERANCE * 36, rel=0.2)


def test_nobody_is_refused_for_a_few_milliseconds_or_while_nobody_asks() -> None:
    limiter = GradientLimiter(least=8, most=272)
    feed(limiter, seen_ms=HARMLESS_NS / MS, base_ms=0.1, inside=272, windows=50)
    assert limiter.limit == 272
    feed(limiter, seen_ms=3000, base_ms=10, inside=272, windows=50, at=10**12)
    fallen = limiter.limit
    assert fallen == 8
    feed(limiter, seen_ms=10, base_ms=10, inside=2, windows=50, at=10**13)
    assert limiter.limit == fallen, "no more is allowed than anybody needs"


def test_levels_and_waits_are_tritons() -> None:
    batching = BatchingConfig(
        delay_us=100,
        priorities=3,
        priority_default=2,
        queue=QueueConfig(items_max=50, timeout_us=1000),
        queues={1: QueueConfig(timeout_us=500, timeout_override=False), 3: QueueConfig(items_max=9999)},
    )
    policy = policy_of(
        ServingConfig(batching=batching), batches=True, rows_max=4, rows_preferred=8, queue_items_max=256
    )
    assert (policy.rows_preferred, policy.delay_us) == (4, 100)
    assert [policy.level(priority) for priority in (0, 1, 3, 4)] == [2, 1, 3, 2]
    assert [policy.items_max(level) for level in (1, 2, 3)] == [256, 50, 256]
    assert policy.timeout_ns(2, 0) == 1_000_000
    assert policy.timeout_ns(2, 300) == 300_000
    assert policy.timeout_ns(2, 5000) == 1_000_000, "a request may shorten its wait, not prolong it"
    assert policy.timeout_ns(1, 300) == 500_000, "and only where it may"
    assert policy.timeout_ns(3, 700) == 700_000
    assert BatchPolicy().timeout_ns(1, 700) == 700_000
