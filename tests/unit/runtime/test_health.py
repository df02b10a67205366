"""Health statuses and their watchers, without a server."""

import pytest

from mlmesh_runtime import health
from mlmesh_runtime.errors import Overloaded
from mlmesh_runtime.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING, HealthStatuses


def test_names_are_set_changed_and_forgotten() -> None:
    statuses = HealthStatuses()
    assert statuses.status("model:mnist/3") == SERVICE_UNKNOWN
    statuses.set("model:mnist/3", True)
    assert statuses.status("model:mnist/3") == SERVING
    statuses.set("model:mnist/3", False)
    assert statuses.status("model:mnist/3") == NOT_SERVING
    statuses.remove("model:mnist/3")
    statuses.remove("never there")
    assert statuses.status("model:mnist/3") == SERVICE_UNKNOWN
    assert statuses.all() == {}


def test_draining_has_no_way_back() -> None:
    statuses = HealthStatuses()
    statuses.set("", True)
    statuses.drain()
    statuses.set("late", True)
    assert statuses.all() == {"": NOT_SERVING, "late": NOT_SERVING}


async def test_a_watcher_sees_each_state_once_and_the_end() -> None:
    statuses = HealthStatuses()
    watch = statuses.watch("m")
    assert await anext(watch) == SERVICE_UNKNOWN
    statuses.set("m", True)
    assert await anext(watch) == SERVING
    statuses.set("m", True)
    statuses.set("other", True)
    statuses.set("m", False)
    assert await anext(watch) == NOT_SERVING
    statuses.remove("m")
    assert await anext(watch) == SERVICE_UNKNOWN
    statuses.close()
    with pytest.raises(StopAsyncIteration):
        await anext(watch)


async def test_a_slow_watcher_sees_the_latest() -> None:
    statuses = HealthStatuses()
    watch = statuses.watch("m")
    await anext(watch)
    for serving in (True, False, True):
        statuses.set("m", serving)
    assert await anext(watch) == SERVING
    await watch.aclose()


async def test_watchers_are_bounded_and_give_their_place_back() -> None:
    statuses = HealthStatuses()
    first = statuses.watch("m", watchers_max=1)
    await anext(first)
    with pytest.raises(Overloaded):
        await anext(statuses.watch("m", watchers_max=1))
    await first.aclose()
    second = statuses.watch("m", watchers_max=1)
    assert await anext(second) == SERVICE_UNKNOWN
    await second.aclose()


def test_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "NAMES_MAX", 2)
    statuses = HealthStatuses()
    statuses.set("a", True)
    statuses.set("b", True)
    statuses.set("a", False)
    with pytest.raises(Overloaded):
        statuses.set("c", True)


def test_the_wire_values_are_the_protocols() -> None:
    enum = health.FILE.message_types_by_name["HealthCheckResponse"].enum_types_by_name["ServingStatus"]
    ours = (health.UNKNOWN, health.SERVING, health.NOT_SERVING, health.SERVICE_UNKNOWN)
    names = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
    assert tuple(enum.values_by_name[name].number for name in names) == ours
    assert [method.name for method in health.DESCRIPTOR.methods] == ["Check", "Watch", "List"]
