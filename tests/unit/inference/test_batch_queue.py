"""What the queue decides: order, batches, drops, bounds. No threads, no time but the one given."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_inference.batcher import BatchPolicy, BatchQueue, Pending
from mlmesh_inference.running import Work


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def pending(
    loop: asyncio.AbstractEventLoop, *, rows: int = 1, key: object = None, deadline_ns: int = 0, gone: bool = False
) -> Pending:
    outcome: asyncio.Future[list[object]] = loop.create_future()  # a sink, as far as the queue asks
    if gone:
        outcome.cancel()
    return Pending(
        work=Work(inputs={}, outputs=("y",), rows=rows, deadline_ns=deadline_ns),
        sink=outcome,  # type: ignore[arg-type]
        shape_key=key,
        arrived_ns=0,
    )


def filled(policy: BatchPolicy, items: list[Pending]) -> BatchQueue:
    queue = BatchQueue(policy)
    for item in items:
        assert queue.add(item)
    return queue


def test_everything_that_waits_runs_together_in_order(loop: asyncio.AbstractEventLoop) -> None:
    items = [pending(loop) for _ in range(5)]
    queue = filled(BatchPolicy(), items)
    assert queue.take(0) == (items, [])
    assert len(queue) == 0


def test_a_batch_ends_at_the_preferred_rows(loop: asyncio.AbstractEventLoop) -> None:
    items = [pending(loop, rows=3) for _ in range(5)]
    queue = filled(BatchPolicy(rows_preferred=8, rows_max=64), items)
    assert queue.take(0)[0] == items[:3]
    assert queue.take(0)[0] == items[3:]


def test_a_batch_never_exceeds_the_most_rows(loop: asyncio.AbstractEventLoop) -> None:
    items = [pending(loop, rows=6), pending(loop, rows=6), pending(loop, rows=2)]
    queue = filled(BatchPolicy(rows_preferred=8, rows_max=8), items)
    assert queue.take(0)[0] == [items[0], items[2]]
    assert queue.take(0)[0] == [items[1]]


def test_other_shapes_keep_their_place(loop: asyncio.AbstractEventLoop) -> None:
    items = [pending(loop, key=key) for key in "abacb"]
    queue = filled(BatchPolicy(), items)
    assert queue.take(0)[0] == [items[0], items[2]]
    assert queue.take(0)[0] == [items[1], items[4]]
    assert queue.take(0)[0] == [items[3]]


def test_cancelled_and_expired_never_reach_a_batch(loop: asyncio.AbstractEventLoop) -> None:
    gone, late = pending(loop, gone=True), pending(loop, deadline_ns=100)
    punctual = pending(loop, deadline_ns=101)
    queue = filled(BatchPolicy(), [gone, late, punctual])
    assert queue.take(100) == ([punctual], [gone, late])


def test_a_model_without_batches_runs_one_at_a_time(loop: asyncio.AbstractEventLoop) -> None:
    items = [pending(loop) for _ in range(3)]
    queue = filled(BatchPolicy(batches=False), items)
    assert [queue.take(0)[0] for _ in range(3)] == [[item] for item in items]


def test_the_bound_counts_only_who_still_waits(loop: asyncio.AbstractEventLoop) -> None:
    queue = BatchQueue(BatchPolicy(queue_items_max=2))
    first, second = pending(loop), pending(loop)
    assert queue.add(first)
    assert queue.add(second)
    assert not queue.add(pending(loop))
    first.sink.cancel()  # type: ignore[attr-defined]
    third = pending(loop)
    assert queue.add(third)
    assert queue.take(0)[0] == [second, third]


def test_requests_of_no_rows_are_bounded_too(loop: asyncio.AbstractEventLoop) -> None:
    queue = filled(BatchPolicy(rows_max=4, rows_preferred=4), [pending(loop, rows=0) for _ in range(9)])
    assert [len(queue.take(0)[0]) for _ in range(3)] == [4, 4, 1]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 8), st.sampled_from("ab"), st.booleans()), max_size=30),
    preferred=st.integers(1, 8),
)
def test_every_request_leaves_once_and_the_oldest_is_never_passed_over(
    loop: asyncio.AbstractEventLoop, sizes: list[tuple[int, str, bool]], preferred: int
) -> None:
    items = [pending(loop, rows=rows, key=key, gone=gone) for rows, key, gone in sizes]
    queue = filled(BatchPolicy(rows_preferred=preferred, rows_max=8), items)
    waiting = list(items)
    while len(queue):
        batch, dropped = queue.take(0)
        assert batch or dropped
        assert sum(item.work.rows for item in batch) <= 8
        assert len({item.shape_key for item in batch}) <= 1
        assert all(item.sink.done() for item in dropped)
        if batch:
            assert batch[0] is next(item for item in waiting if not item.sink.done())
        for item in (*batch, *dropped):
            waiting.remove(item)
    assert waiting == []
