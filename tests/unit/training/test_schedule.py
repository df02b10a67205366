"""Jobs run by priority, then in the order they came, as far as there is room; and none waits for ever."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_runtime.errors import InvalidInput
from mlmesh_training import schedule
from mlmesh_training.options import Distribution, Resources
from mlmesh_training.schedule import PASSES_MAX, Capacity, Waiting, choose, fits, occupied
from tests.support.training import spec

GIB = 1 << 30
FOUR = Capacity(total=Resources(cpus=4.0, memory_bytes=8 * GIB, gpus=2), jobs_max=4)


def waiting(number: int, *, cpus: float = 1.0, **changes: object) -> Waiting:
    asked = Resources(cpus=cpus, memory_bytes=1)
    return Waiting(**{"uid": str(number), "number": number, "asked": asked, **changes})  # type: ignore[arg-type]


def chosen(jobs: list[Waiting], running: list[Resources], capacity: Capacity = FOUR) -> tuple[int, list[int]] | None:
    choice = choose(jobs, running, capacity)
    return None if choice is None else (choice.job.number, [job.number for job in choice.passed])


def test_priority_comes_first_then_the_order_of_acceptance_and_what_ran_before_both() -> None:
    jobs = [waiting(1), waiting(2, priority=5), waiting(3, priority=5), waiting(4, retrying=True), waiting(5)]
    order = []
    while jobs:
        choice = choose(jobs, [], FOUR)
        assert choice is not None
        order.append(choice.job.number)
        jobs.remove(choice.job)
    assert order == [4, 2, 3, 1, 5]


def test_a_small_job_passes_a_large_one_that_has_no_room_yet() -> None:
    large, small = waiting(1, cpus=4.0), waiting(2, cpus=1.0)
    assert chosen([large, small], [Resources(cpus=1.0)]) == (2, [1])
    assert chosen([large, small], []) == (1, [])


def test_who_was_passed_often_enough_is_passed_no_more() -> None:
    tired, small = waiting(1, cpus=4.0, passed=PASSES_MAX), waiting(2, cpus=1.0)
    assert chosen([tired, small], [Resources(cpus=1.0)]) is None
    # What comes before it in the order is not held up by it.
    assert chosen([tired, replace(small, priority=1)], [Resources(cpus=1.0)]) == (2, [])


def test_what_never_fits_holds_nobody_up() -> None:
    giant, small = waiting(1, cpus=64.0, passed=PASSES_MAX), waiting(2)
    assert chosen([giant, small], []) == (2, [])
    assert chosen([giant], []) is None


def test_no_more_than_jobs_max_train_at_once_but_publishing_takes_no_place() -> None:
    full = [Resources()] * FOUR.jobs_max
    assert chosen([waiting(1)], full) is None
    assert chosen([waiting(1, priority=9), waiting(2, light=True)], full) == (2, [])


def test_gpus_and_memory_are_bounds_too() -> None:
    gpu = Waiting(uid="1", number=1, asked=Resources(cpus=1, memory_bytes=1, gpus=2))
    assert chosen([gpu], [Resources(gpus=1)]) is None
    big = Waiting(uid="1", number=1, asked=Resources(cpus=1, memory_bytes=8 * GIB))
    assert chosen([big], [Resources(memory_bytes=1)]) is None
    assert chosen([big], []) == (1, [])


@pytest.mark.parametrize(
    ("asked", "processes", "threads", "expected"),
    [
        (Resources(), 1, 0, Resources(cpus=1.0, memory_bytes=2 * GIB)),
        (Resources(), 8, 0, Resources(cpus=1.0, memory_bytes=2 * GIB)),
        (Resources(), 2, 1, Resources(cpus=2.0, memory_bytes=2 * GIB)),
        (Resources(), 2, 3, Resources(cpus=4.0, memory_bytes=2 * GIB)),
        (Resources(cpus=0.5, memory_bytes=7, gpus=1), 2, 3, Resources(cpus=0.5, memory_bytes=7, gpus=1)),
    ],
)
def test_defaults_are_a_fair_share_and_never_too_much(
    asked: Resources, processes: int, threads: int, expected: Resources
) -> None:
    assert occupied(asked, processes, replace(FOUR, threads=threads)) == expected


@pytest.mark.parametrize(
    ("cpus", "processes", "threads", "expected"),
    [(0.0, 1, 0, 1), (4.0, 2, 0, 2), (4.0, 2, 1, 2), (0.0, 2, 3, 3), (0.5, 1, 0, 1)],
)
def test_threads_are_the_share_of_a_process(cpus: float, processes: int, threads: int, expected: int) -> None:
    capacity = replace(FOUR, threads=threads)
    asked = spec(resources=Resources(cpus=cpus), distribution=Distribution(processes=processes))
    assert schedule.threads(asked, occupied(asked.resources, processes, capacity), capacity) == expected


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("spec.resources.cpus", {"resources": Resources(cpus=4.1)}),
        ("spec.resources.memory_bytes", {"resources": Resources(memory_bytes=9 * GIB)}),
        ("spec.resources.gpus", {"resources": Resources(gpus=3)}),
        ("spec.distribution.nodes", {"distribution": Distribution(processes=2, nodes=2)}),
    ],
)
def test_what_can_never_run_is_refused_with_the_field_and_both_figures(field: str, asked: dict[str, object]) -> None:
    with pytest.raises(InvalidInput) as raised:
        schedule.check(spec(**asked), FOUR)
    assert (raised.value.field, raised.value.reason) == (field, "RESOURCES_TOO_LARGE")
    assert "more than the" in raised.value.message


def test_processes_spread_evenly_over_machines() -> None:
    with pytest.raises(InvalidInput, match="evenly"):
        schedule.check(spec(distribution=Distribution(processes=3, nodes=2)), replace(FOUR, nodes_max=2))
    schedule.check(spec(distribution=Distribution(processes=4, nodes=2)), replace(FOUR, nodes_max=2))


sizes = st.builds(
    Resources,
    cpus=st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]),
    memory_bytes=st.integers(0, 8 * GIB),
    gpus=st.integers(0, 2),
)


@given(
    st.lists(st.tuples(sizes, st.integers(-2, 2)), min_size=1, max_size=12),
    st.lists(st.tuples(sizes, st.integers(-2, 2), st.integers(0, 3)), max_size=60),
    st.integers(1, 4),
)
def test_capacity_holds_every_job_runs_and_none_is_passed_too_often(
    first: list[tuple[Resources, int]], later: list[tuple[Resources, int, int]], jobs_max: int
) -> None:
    """A service in small: jobs arrive, are chosen, run for some turns, end. Nothing is preempted."""
    capacity = dataclasses.replace(FOUR, jobs_max=jobs_max)
    queue = [waiting(number, asked=asked, priority=priority) for number, (asked, priority) in enumerate(first)]
    accepted = len(queue)
    running: list[tuple[Waiting, Resources, int]] = []
    arrivals = list(later)
    started: list[int] = []
    for turn in range(10_000):
        if arrivals:
            asked, priority, _ = arrivals[0]
            queue.append(waiting(accepted, asked=asked, priority=priority))
            accepted += 1
        lasts = arrivals.pop(0)[2] if arrivals else 1
        while (choice := choose(queue, [resources for _, resources, _ in running], capacity)) is not None:
            for other in choice.passed:
                assert other.place < choice.job.place
                queue[queue.index(other)] = replace(other, passed=other.passed + 1)
                assert other.passed + 1 <= PASSES_MAX
            # The first of the order is started whenever it fits.
            head = min(queue, key=lambda job: job.place)
            fit = fits([*(r for _, r, _ in running), occupied(head.asked, 1, capacity)], capacity.total)
            assert choice.job.number == head.number or not fit
            queue = [job for job in queue if job.number != choice.job.number]
            running.append((choice.job, choice.resources, turn + lasts))
            started.append(choice.job.number)
            assert len(running) <= jobs_max
            assert fits([resources for _, resources, _ in running], capacity.total)
        running = [item for item in running if item[2] > turn]
        if not queue and not arrivals:
            break
    assert sorted(started) == list(range(accepted))
