"""What is counted, and that labels stay few whatever callers send."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import pytest

from mlmesh_inference.running import Answer, FutureSink, Work
from mlmesh_inference.scheduling.batcher import BatchReport
from mlmesh_inference.scheduling.queue import Pending
from mlmesh_inference.statistics import OTHERS, RESPONSES_MAX, TENANTS_MAX, Statistics, counted
from mlmesh_runtime.telemetry import REGISTRY

MS = 1_000_000


@pytest.fixture
def statistics() -> Iterator[Statistics]:
    made = Statistics("counted-here", 7, wall=lambda: 12.5)
    yield made
    made.close()


def pending(*, tenant: str = "", rows: int = 1, level: int = 1, arrived_ns: int = 0) -> Pending:
    work = Work(inputs={}, outputs=("y",), rows=rows, tenant=tenant)
    return Pending(work, FutureSink(), None, arrived_ns, rows, level)


def report(*items: Pending, failed: tuple[Pending, ...] = ()) -> BatchReport:
    """A batch that began 10 ms after 0, was 5 ms in the engine, and done 1 ms later."""
    return BatchReport(
        items=items,
        rows=sum(item.rows for item in items),
        formed_ns=10 * MS,
        engine_start_ns=10 * MS,
        engine_end_ns=15 * MS,
        done_ns=16 * MS,
        failed=failed,
    )


def sample(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"mlmesh_inference_{name}", {"model": "counted-here", "version": "7", **labels})


async def test_a_batch_is_counted_by_level_tenant_and_size(statistics: Statistics) -> None:
    bad = pending(tenant="b", level=2, arrived_ns=4 * MS)
    statistics.batch_done(report(pending(tenant="a", rows=3), pending(tenant="a"), bad, failed=(bad,)))
    assert (statistics.inference_count, statistics.execution_count, statistics.last_inference_s) == (4, 1, 12.5)
    assert (statistics.success.count, statistics.success.ns) == (2, 32 * MS)
    assert (statistics.fail.count, statistics.fail.ns) == (1, 12 * MS)
    assert (statistics.queue.count, statistics.queue.ns) == (3, 26 * MS)
    assert list(statistics.batches) == [5]
    assert sample("requests_total", priority="1", outcome="answered") == 2
    assert sample("requests_total", priority="2", outcome="failed") == 1
    assert sample("queue_seconds_bucket", priority="1", le="0.01") == 2
    assert sample("queue_seconds_bucket", priority="1", le="0.005") == 0
    assert sample("queue_seconds_sum", priority="2") == pytest.approx(0.006)
    assert sample("batch_rows_bucket", le="4.0") == 0
    assert sample("batch_rows_bucket", le="8.0") == 1
    assert sample("tenant_rows_total", tenant="a") == 4
    assert sample("tenant_queue_seconds_total", tenant="b") == pytest.approx(0.006)
    assert sample("busy_seconds_total") == pytest.approx(0.005)


async def test_refusals_are_told_apart_and_count_for_the_tenant(statistics: Statistics) -> None:
    for reason in ("refused", "limited", "would_expire", "expired", "cancelled"):
        statistics.dropped(pending(tenant="t", level=3), reason)
        assert sample("requests_total", priority="3", outcome=reason) == 1
    assert sample("tenant_refused_total", tenant="t") == 3
    assert statistics.fail.count == 5


async def test_tenants_beyond_a_bound_count_as_one(statistics: Statistics) -> None:
    for number in range(5 * TENANTS_MAX):
        statistics.dropped(pending(tenant=f"spiffe://x/{number}"), "refused")
    assert len(statistics.tenants) == TENANTS_MAX + 1
    assert statistics.tenants[OTHERS].refused == 4 * TENANTS_MAX


async def answers(count: int, *, fails: bool = False) -> AsyncGenerator[Answer, None]:
    for _ in range(count):
        yield Answer(outputs=("y",), arrays=[])
    if fails:
        raise ValueError("as asked")
    yield Answer(outputs=(), arrays=[])


async def test_answers_of_decoupled_models_are_counted_by_their_place(statistics: Statistics) -> None:
    assert len([answer async for answer in counted(answers(2), statistics)]) == 3
    with pytest.raises(ValueError, match="as asked"):
        async for _ in counted(answers(1, fails=True), statistics):
            pass
    async with aclosing(counted(answers(9), statistics)) as parts:
        await anext(parts)
    seen = {
        place: (it.success.count, it.empty.count, it.fail.count, it.cancel.count)
        for place, it in statistics.responses.items()
    }
    assert seen == {0: (2, 0, 0, 1), 1: (1, 0, 1, 0), 2: (0, 1, 0, 0)}


async def test_places_beyond_a_bound_count_as_the_last(statistics: Statistics) -> None:
    for index in range(3 * RESPONSES_MAX):
        statistics.responded(index, "success")
    assert len(statistics.responses) == RESPONSES_MAX
    assert statistics.responses[RESPONSES_MAX - 1].success.count == 2 * RESPONSES_MAX + 1
