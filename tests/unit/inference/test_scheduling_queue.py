"""What the queue decides: order, batches, drops, room. No threads, no time but the one given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from mlmesh_inference.running import Work
from mlmesh_inference.scheduling.policy import BatchPolicy
from mlmesh_inference.scheduling.queue import BatchQueue, Pending


class Waiting:
    """A sink, as far as the queue asks."""

    def __init__(self, gone: bool = False) -> None:
        self.gone = gone

    def done(self) -> bool:
        return self.gone


def pending(
    *,
    rows: int = 1,
    key: Hashable = None,
    latest_ns: int = 0,
    order_ns: int = 0,
    level: int = 1,
    tenant: str = "",
    gone: bool = False,
) -> Pending:
    return Pending(
        work=Work(inputs={}, outputs=("y",), rows=rows, tenant=tenant),
        sink=Waiting(gone),  # type: ignore[arg-type]
        shape_key=key,
        arrived_ns=0,
        rows=rows,
        level=level,
        latest_ns=latest_ns,
        order_ns=order_ns or latest_ns,
    )


def cancel(item: Pending) -> None:
    item.sink.gone = True  # type: ignore[attr-defined]


def filled(policy: BatchPolicy, items: Sequence[Pending]) -> BatchQueue:
    queue = BatchQueue(policy)
    for item in items:
        queue.add(item)
    return queue


def taken(queue: BatchQueue) -> list[list[Pending]]:
    batches = []
    while len(queue):
        batches.append(queue.take(0)[0])
    return batches


def test_everything_that_waits_runs_together_in_order() -> None:
    items = [pending() for _ in range(5)]
    queue = filled(BatchPolicy(), items)
    assert queue.take(0) == (items, [])
    assert (len(queue), queue.rows) == (0, 0)


def test_a_batch_ends_at_the_preferred_rows() -> None:
    items = [pending(rows=3) for _ in range(5)]
    queue = filled(BatchPolicy(rows_preferred=8, rows_max=64), items)
    assert taken(queue) == [items[:3], items[3:]]


def test_a_batch_can_be_asked_to_end_earlier_but_not_later() -> None:
    items = [pending() for _ in range(6)]
    queue = filled(BatchPolicy(rows_preferred=3), items)
    assert queue.take(0, 2)[0] == items[:2]
    assert queue.take(0, 9)[0] == items[2:5]


def test_a_batch_ends_where_the_next_request_does_not_fit() -> None:
    items = [pending(rows=6), pending(rows=6), pending(rows=2)]
    queue = filled(BatchPolicy(rows_preferred=8, rows_max=8), items)
    assert taken(queue) == [items[:1], items[1:]]


def test_other_shapes_keep_their_place() -> None:
    items = [pending(key=key) for key in "abacb"]
    queue = filled(BatchPolicy(), items)
    assert taken(queue) == [[items[0], items[2]], [items[1], items[4]], [items[3]]]


def test_cancelled_and_late_never_reach_a_batch() -> None:
    gone, late = pending(gone=True), pending(latest_ns=100, order_ns=1)
    punctual = pending(latest_ns=101)
    queue = filled(BatchPolicy(), [gone, late, punctual])
    assert queue.take(100) == ([punctual], [gone, late])
    assert (len(queue), queue.rows) == (0, 0)


def test_a_model_without_batches_runs_one_at_a_time() -> None:
    items = [pending() for _ in range(3)]
    queue = filled(BatchPolicy(batches=False), items)
    assert taken(queue) == [[item] for item in items]


def test_requests_of_no_rows_are_bounded_too() -> None:
    queue = filled(BatchPolicy(rows_max=4, rows_preferred=4), [pending(rows=0) for _ in range(9)])
    assert [len(batch) for batch in taken(queue)] == [4, 4, 1]


def test_the_earliest_deadline_goes_first() -> None:
    later, sooner, patient = pending(order_ns=30), pending(order_ns=10), pending(order_ns=90)
    queue = filled(BatchPolicy(rows_preferred=1), [later, patient, sooner])
    assert taken(queue) == [[sooner], [later], [patient]]


def test_a_more_urgent_level_goes_first_and_lets_the_others_fill_its_batch() -> None:
    slow, quick, other = pending(level=3), pending(level=1, order_ns=99), pending(level=2, key="other")
    queue = filled(BatchPolicy(levels=3), [slow, other, quick])
    assert taken(queue) == [[quick, slow], [other]]


def test_tenants_take_turns_by_rows() -> None:
    items = [pending(tenant="a") for _ in range(6)] + [pending(tenant="b", rows=2) for _ in range(3)]
    queue = filled(BatchPolicy(rows_preferred=1), items)
    served = [batch[0].work.tenant for batch in taken(queue)]
    assert served == ["a", "b", "a", "a", "b", "a", "a", "b", "a"]


def test_a_tenant_that_comes_back_has_not_saved_up() -> None:
    queue = filled(
        BatchPolicy(rows_preferred=1), [pending(tenant="busy") for _ in range(40)] + [pending(tenant="rare")]
    )
    for _ in range(31):
        queue.take(0)
    for _ in range(9):
        queue.add(pending(tenant="rare"))
    assert Counter(queue.take(0)[0][0].work.tenant for _ in range(10)) == {"busy": 5, "rare": 5}


def test_where_there_is_no_room_the_one_that_asks_is_refused() -> None:
    queue = filled(BatchPolicy(), [pending(), pending()])
    newcomer = pending()
    assert queue.make_room(newcomer, 0) == (newcomer, [])


def test_who_went_away_makes_room() -> None:
    first, second = pending(), pending()
    queue = filled(BatchPolicy(), [first, second])
    cancel(first)
    assert queue.make_room(pending(), 0) == (None, [first])
    assert queue.take(0)[0] == [second]


def test_a_tenant_that_floods_gives_way_to_others() -> None:
    flood = [pending(tenant="flood", order_ns=number) for number in range(1, 9)]
    queue = filled(BatchPolicy(), flood)
    for place in range(7, 4, -1):
        newcomer = pending(tenant="small")
        assert queue.make_room(newcomer, 0) == (flood[place], [])
        queue.add(newcomer)
    more = pending(tenant="flood")
    assert queue.make_room(more, 0)[0] is more
    for _ in range(9):
        queue.make_room(more, 0)  # also when it looks for whoever went away
    held = Counter(item.work.tenant for item in queue)
    assert held == {"flood": 5, "small": 3}


def test_rows_ahead_counts_what_runs_earlier_and_no_more() -> None:
    policy = BatchPolicy(levels=2)
    queue = filled(policy, [pending(rows=2, order_ns=order) for order in (10, 20, 30)])
    assert queue.rows_ahead(pending(order_ns=99)) == 6
    assert queue.rows_ahead(pending(order_ns=15)) == 2
    assert queue.rows_ahead(pending(order_ns=99, level=2)) == 6
    assert queue.rows_ahead(pending(order_ns=99, tenant="other")) == 1, "tenants take turns"
    queue.add(pending(rows=5, level=2))
    assert queue.rows_ahead(pending(order_ns=99)) == 6


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 5),  # rows
        st.sampled_from("ab"),  # shape key
        st.integers(1, 3),  # level
        st.sampled_from(("", "t", "u")),  # tenant
        st.integers(1, 40),  # latest start
        st.sampled_from(("wait", "wait", "wait", "cancel", "take", "refuse")),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, preferred=st.integers(1, 6), mixed=st.booleans())
def test_the_rules_hold_whatever_comes(
    requests: list[tuple[int, str, int, str, int, str]], preferred: int, mixed: bool
) -> None:
    """Each request leaves once; levels, deadlines and shapes are kept; nothing in vain enters a batch."""
    queue = BatchQueue(BatchPolicy(rows_preferred=preferred, rows_max=6, levels=3))
    waiting: list[Pending] = []
    everyone: list[Pending] = []
    left: list[Pending] = []
    now = 0

    def leave(items: Sequence[Pending]) -> None:
        for item in items:
            waiting.remove(item)
            left.append(item)

    def take() -> None:
        batch, dropped = queue.take(now)
        alive = [item for item in waiting if not item.sink.done() and item.latest_ns > now]
        assert all(item in alive for item in batch)
        assert not any(item in alive for item in dropped)
        leave(dropped)
        if batch:
            check(batch, alive)
        leave(batch)

    def check(batch: list[Pending], alive: list[Pending]) -> None:
        assert batch[0].level == min(item.level for item in alive), "priority inverted"
        assert len({item.shape_key for item in batch}) == 1
        assert len(batch) == 1 or sum(item.rows for item in batch) <= 6
        assert [item.level for item in batch] == sorted(item.level for item in batch)
        behind = [item for item in alive if item not in batch and item.shape_key == batch[0].shape_key]
        for item in behind:
            assert item.level >= batch[-1].level, "a less urgent request went first"
            peers = [one for one in batch if (one.level, one.work.tenant) == (item.level, item.work.tenant)]
            assert all((one.order_ns, one.serial) < (item.order_ns, item.serial) for one in peers), "deadline order"

    for rows, key, level, tenant, latest, action in requests:
        now += 1
        item = pending(
            rows=rows,
            key=key if mixed else "a",
            level=level if mixed else 1,
            tenant=tenant if mixed else "",
            latest_ns=now + latest,
            gone=action == "cancel",
        )
        everyone.append(item)
        if action == "refuse":
            victim, gone = queue.make_room(item, now)
            leave(gone)
            if victim is not None and victim is not item:
                leave([victim])
            if victim is item:
                left.append(item)
                continue
        queue.add(item)
        waiting.append(item)
        assert len(queue) == len(waiting)
        assert queue.rows == sum(one.rows for one in waiting)
        assert {id(one) for one in queue} == {id(one) for one in waiting}
        if action == "take":
            take()
    while len(queue):
        take()
    assert waiting == []
    assert Counter(map(id, left)) == Counter(map(id, everyone))
    assert queue.rows == 0


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)), min_size=20, max_size=60),
    preferred=st.integers(1, 12),
)
def test_what_two_waiting_tenants_get_differs_by_two_requests_at_most(
    sizes: list[tuple[int, int, int]], preferred: int
) -> None:
    """The bound of start-time fair queueing: the largest request of the one plus that of the other, in any interval."""
    queue = BatchQueue(BatchPolicy(rows_preferred=preferred, rows_max=64))
    largest = Counter[str]()
    for number, three in enumerate(sizes):
        for tenant, rows in zip("abc", three, strict=True):
            largest[tenant] = max(largest[tenant], rows)
            queue.add(pending(tenant=tenant, rows=rows, order_ns=number + 1))
    got = Counter[str]()
    seen: dict[str, list[int]] = {"ab": [0], "bc": [0], "ac": [0]}
    while True:
        batch, _ = queue.take(0)
        for item in batch:
            got[item.work.tenant] += item.rows
            for pair, differences in seen.items():
                differences.append(got[pair[0]] - got[pair[1]])
        if {item.work.tenant for item in queue} != set("abc"):
            break
    # The batch after which somebody had nothing left is in, and by then it may have had nothing for a whole batch.
    for pair, differences in seen.items():
        within = differences[: len(differences) - len(batch)]
        assert max(within, default=0) - min(within, default=0) <= largest[pair[0]] + largest[pair[1]]


@settings(max_examples=40, deadline=None)
@given(urgent=st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_a_patient_request_is_passed_over_for_a_bounded_time(urgent: list[int]) -> None:
    """Its order is the time of its arrival and the patience: what comes later than that goes behind."""
    patience = 20
    queue = BatchQueue(BatchPolicy(rows_preferred=1))
    patient = pending(order_ns=patience)
    queue.add(patient)
    for now, deadline in enumerate(urgent):
        queue.add(pending(order_ns=min(now + deadline, now + patience)))
        (first,) = queue.take(0)[0]
        if first is patient:
            return
        queue.add(pending(order_ns=now + patience))
        assert now <= patience
