"""More is wanted than fits: the longest unused versions sleep, and a request wakes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_inference.catalog import State
from mlmesh_inference.residency import Resident, make_room
from mlmesh_runtime.errors import NotReady
from tests.support import onnx_models
from tests.support.registry_source import MemoryRegistry
from tests.unit.inference.test_loader import Loaded, loader

BUDGET = 64 << 10
"""Room for one model of these tests, and for no second."""


def resident(name: str, memory: int, used: float, *, pinned: bool = False) -> Resident:
    return Resident(key=(name, 1), memory_bytes=memory, used_s=used, pinned=pinned)


def test_the_longest_unused_goes_first_and_no_more_than_needed() -> None:
    present = [resident("a", 40, 3.0), resident("b", 40, 1.0), resident("c", 40, 2.0)]
    assert make_room(present, budget_bytes=120) == []
    assert make_room(present, budget_bytes=119) == [("b", 1)]
    assert make_room(present, budget_bytes=100, coming_bytes=40) == [("b", 1), ("c", 1)]
    assert make_room(present, budget_bytes=0, coming_bytes=1 << 60) == []


def test_what_others_need_stays_and_one_may_be_too_large() -> None:
    present = [resident("a", 40, 1.0, pinned=True), resident("b", 40, 2.0), resident("c", 40, 3.0)]
    assert make_room(present, budget_bytes=80) == [("b", 1)]
    assert make_room([resident("a", 500, 1.0)], budget_bytes=80) == []
    assert make_room([resident("a", 500, 1.0)], budget_bytes=80, coming_bytes=10) == [("a", 1)]


@given(
    present=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 20), st.booleans()), max_size=12),
    budget=st.integers(1, 300),
    coming=st.integers(0, 100),
)
def test_what_is_left_fits_unless_nothing_more_may_go(
    present: list[tuple[int, int, bool]], budget: int, coming: int
) -> None:
    residents = [
        resident(f"m{place:02}", memory, used, pinned=pinned) for place, (memory, used, pinned) in enumerate(present)
    ]
    leaving = set(make_room(residents, budget_bytes=budget, coming_bytes=coming))
    staying = [each for each in residents if each.key not in leaving]
    fits = coming + sum(each.memory_bytes for each in staying) <= budget
    could_go = [each for each in staying if not each.pinned and each.memory_bytes]
    last = max(residents, key=lambda each: (each.used_s, each.key)) if residents and not coming else None
    assert fits or all(each is last for each in could_go)
    assert all(not each.pinned for each in residents if each.key in leaving)


@pytest.fixture
async def registry() -> MemoryRegistry:
    source = MemoryRegistry()
    for number, name in enumerate(("a", "b", "c"), 1):
        await source.publish(name, 1, onnx_models.heavy(plus=float(number)))
        await source.alias(name, "stable", 1)
    return source


async def woken(it: Loaded, model: str, version: str = "") -> float:
    """Ask until it answers, as a client that keeps to the hint does."""
    with pytest.raises(NotReady, match="asleep") as told:
        await it.plus(version, model)
    assert told.value.retry_after_s
    await it.until(lambda: it.state(1, model) is State.READY)
    return await it.plus(version, model)


async def test_only_what_fits_is_in_memory_and_all_answer(registry: MemoryRegistry, tmp_path: Path) -> None:
    async with loader(registry, tmp_path, memory_bytes=BUDGET) as it:
        await it.until(lambda: it.synced)
        await it.until(lambda: [it.state(1, name) for name in "abc"].count(State.ASLEEP) == 2)
        assert it.catalog.synced
        awake = next(name for name in "abc" if it.state(1, name) is State.READY)
        assert await it.plus(model=awake)
        first, second = (name for name in "abc" if name != awake)
        assert await woken(it, first, "@stable") == "abc".index(first) + 1
        await it.until(lambda: it.state(1, awake) is State.ASLEEP)
        assert await woken(it, second, "1") == "abc".index(second) + 1
        assert await woken(it, awake) == "abc".index(awake) + 1
        await it.until(lambda: [it.state(1, name) for name in "abc"].count(State.ASLEEP) == 2)
        # What sleeps keeps its names: the default does not move for it.
        assert [it.catalog.default_version(name) for name in "abc"] == [1, 1, 1]


async def test_a_new_version_is_loaded_at_once_and_what_sleeps_may_go(registry: MemoryRegistry, tmp_path: Path) -> None:
    async with loader(registry, tmp_path, memory_bytes=BUDGET) as it:
        await it.until(lambda: it.synced)
        await it.until(lambda: [it.state(1, name) for name in "abc"].count(State.ASLEEP) == 2)
        asleep = next(name for name in "abc" if it.state(1, name) is State.ASLEEP)
        await registry.publish(asleep, 2, onnx_models.heavy(plus=9.0))
        await registry.alias(asleep, "stable", 2)
        await it.until(lambda: it.state(2, asleep) is State.READY and it.state(1, asleep) is None)
        assert await it.plus(model=asleep) == 9.0
        await it.until(lambda: [status.state for status in it.catalog.statuses()].count(State.READY) == 1)
