"""The catalog: lookups, swaps in one step, and who is told."""

from __future__ import annotations

import asyncio

import pytest

from mlmesh_inference.catalog import WATCHER_ITEMS_MAX, Catalog, ReadyModel, State, Status
from mlmesh_runtime.errors import InvalidInput, NotFound, NotReady, Overloaded
from tests.support.inference import GatedEngine, ready_model


def model(version: int = 1, name: str = "m") -> ReadyModel:
    return ready_model(GatedEngine(is_open=True), name=name, version=version)


def put(catalog: Catalog, ready: ReadyModel) -> ReadyModel:
    catalog.begin(ready.name, ready.version, total_bytes=3, sha256="00")
    catalog.install(ready, engine="gated", engine_reason="it is a test")
    return ready


async def test_lookups_by_number_default_and_alias() -> None:
    catalog = Catalog()
    one, two = put(catalog, model(1)), put(catalog, model(2))
    catalog.point("m", default=2, aliases={"stable": 1})
    assert catalog.resolve("m", "") is two
    assert catalog.resolve("m", "1") is one
    assert catalog.resolve("m", "@stable") is one
    assert [ready.version for ready in catalog.versions("m")] == [1, 2]


@pytest.mark.parametrize(
    ("name", "version", "text"),
    [
        ("x", "", "Request for unknown model: 'x' is not found"),
        ("m", "9", "Request for unknown model: 'm' version 9 is not found"),
        ("m", "@canary", "Request for unknown model: 'm' version @canary is not found"),
        ("m", "01", "Request for unknown model: 'm' version 01 is not found"),
    ],
)
async def test_what_is_not_there_is_not_found(name: str, version: str, text: str) -> None:
    catalog = Catalog()
    put(catalog, model(1))
    catalog.point("m", default=1, aliases={})
    with pytest.raises(NotFound) as caught:
        catalog.resolve(name, version)
    assert (caught.value.message, caught.value.reason) == (text, "MODEL_NOT_FOUND")


@pytest.mark.parametrize(("version", "text"), [("", "has no available versions"), ("1", "not at ready state")])
async def test_what_is_on_its_way_is_not_ready(version: str, text: str) -> None:
    catalog = Catalog()
    catalog.begin("m", 1, total_bytes=1, sha256="")
    with pytest.raises(NotReady) as caught:
        catalog.resolve("m", version)
    assert caught.value.reason == "MODEL_NOT_READY"
    assert text in caught.value.message


async def test_a_long_name_is_not_echoed_whole() -> None:
    with pytest.raises(NotFound) as caught:
        Catalog().resolve("x" * 10_000, "9" * 10_000)
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("x" * 10_000, "failed to get model version from specified version string 'xxx"),
        ("1.5", "version should be an integral value > 0"),
        ("-1", "invalid model version specified '-1' , version should be an integral value > 0"),
        ("\u0661", "version should be an integral value > 0"),
    ],
)
async def test_what_is_no_version_is_refused(version: str, text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Catalog().resolve("m", version)
    assert text in caught.value.message
    assert len(caught.value.message) < 500


async def test_a_swap_is_one_step_and_the_old_finishes_what_it_has() -> None:
    catalog = Catalog()
    one = put(catalog, model(1))
    catalog.point("m", default=1, aliases={"stable": 1})
    two = put(catalog, model(2))
    assert catalog.resolve("m", "") is one, "loaded is not yet the default"
    catalog.point("m", default=2, aliases={"stable": 2})
    assert catalog.resolve("m", "") is two
    assert catalog.resolve("m", "@stable") is two
    assert catalog.withdraw("m", 1) is one
    with pytest.raises(NotReady):
        catalog.resolve("m", "1")
    catalog.forget("m", 1)
    with pytest.raises(NotFound):
        catalog.resolve("m", "1")


async def test_withdrawing_the_default_leaves_none() -> None:
    catalog = Catalog()
    put(catalog, model(1))
    catalog.point("m", default=1, aliases={"stable": 1})
    catalog.withdraw("m", 1)
    assert catalog.default_version("m") == 0
    assert catalog.find("m", "") is None


async def test_the_listener_hears_every_state_in_order() -> None:
    heard: list[Status] = []
    catalog = Catalog(listener=heard.append, wall=lambda: 12.5)
    put(catalog, model(1))
    catalog.point("m", default=1, aliases={})
    catalog.withdraw("m", 1)
    catalog.forget("m", 1)
    assert [(status.state, status.default) for status in heard] == [
        (State.FETCHING, False),
        (State.READY, False),
        (State.READY, True),
        (State.DRAINING, False),
        (State.UNLOADED, False),
    ]
    assert {status.updated_s for status in heard} == {12.5}


async def test_a_failure_keeps_its_reason() -> None:
    catalog = Catalog()
    catalog.begin("m", 1, total_bytes=1, sha256="")
    catalog.fail("m", 1, "it is no model")
    (status,) = catalog.statuses("m")
    assert (status.state, status.error) == (State.FAILED, "it is no model")


async def test_watchers_see_changes_of_their_model_only() -> None:
    catalog = Catalog()
    async with catalog.watch("m") as changes:
        catalog.begin("other", 1, total_bytes=1, sha256="")
        catalog.begin("m", 1, total_bytes=1, sha256="")
        async with asyncio.timeout(5):
            assert (await anext(changes)).model == "m"


async def test_a_watcher_that_does_not_read_is_ended_and_holds_nobody_up() -> None:
    catalog = Catalog()
    async with catalog.watch() as changes:
        for number in range(WATCHER_ITEMS_MAX + 1):
            catalog.begin("m", number, total_bytes=1, sha256="")
        for _ in range(WATCHER_ITEMS_MAX):
            await anext(changes)
        with pytest.raises(Overloaded) as caught:
            await anext(changes)
    assert caught.value.reason == "WATCHER_TOO_SLOW"
