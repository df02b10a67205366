"""How many streams are moved where; the asking itself runs in tests/integration/platform."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_cli.errors import CliError
from mlmesh_cli.moving import Moved, Process, resolve, settled, shares_to_move
from mlmesh_cli.render.streams import moved_dict, moved_line, streams_table
from tests.unit.cli.conftest import text_of


@pytest.mark.parametrize(
    ("streams", "weights", "shares"),
    [
        ({"v1": 20}, {"v1": 1.0, "v2": 0.0}, {}),
        ({"v1": 20}, {"v1": 0.5, "v2": 0.5}, {"v1": 1.0}),
        ({"v1": 20}, {"v1": 0.0, "v2": 1.0}, {"v1": 1.0}),
        ({"v1": 10, "v2": 10}, {"v1": 0.0, "v2": 1.0}, {"v1": 1.0}),
        ({"v1": 90, "v2": 10}, {"v1": 0.5, "v2": 0.5}, {"v1": 1 - 0.2 / 1.8}),
        ({"old": 5, "v1": 5}, {"v1": 1.0}, {"old": 1.0}),
        ({}, {"v1": 1.0}, {}),
        ({"v1": 5}, {}, {}),
    ],
)
def test_shares(streams: dict[str, int], weights: dict[str, float], shares: dict[str, float]) -> None:
    assert shares_to_move(streams, weights) == pytest.approx(shares)


@given(
    streams=st.dictionaries(st.sampled_from("abcd"), st.integers(0, 1000), min_size=1),
    weights=st.dictionaries(st.sampled_from("abcd"), st.floats(0.01, 1.0), min_size=1),
)
def test_what_is_moved_lands_so_that_the_weights_are_met_in_expectation(
    streams: dict[str, int], weights: dict[str, float]
) -> None:
    shares = shares_to_move(streams, weights)
    assert all(0 < share <= 1 for share in shares.values())
    total, weight = sum(streams.values()), sum(weights.values())
    moved = sum(count * shares.get(place, 0.0) for place, count in streams.items())
    for place in {*streams, *weights}:
        share = weights.get(place, 0.0) / weight
        after = streams.get(place, 0) * (1 - shares.get(place, 0.0)) + moved * share
        assert after == pytest.approx(share * total, abs=1e-6)


def test_a_few_rounds_of_chance_settle() -> None:
    chance = random.Random(3)  # noqa: S311
    places, weights = Counter({"v1": 40}), {"v1": 0.7, "v2": 0.3}
    for _ in range(6):
        if settled(places, weights):
            break
        shares = shares_to_move(places, weights)
        asked = sum(sum(chance.random() < shares.get(place, 0) for _ in range(n)) for place, n in places.items())
        for place, share in shares.items():
            places[place] -= min(places[place], round(places[place] * share))
        places.update(chance.choices(["v1", "v2"], [0.7, 0.3], k=40 - places.total()))
        assert asked >= 0
    assert settled(places, weights)


def test_settled_is_within_a_stream_or_a_twentieth_and_nothing_where_no_weight_is() -> None:
    half = {"v1": 0.5, "v2": 0.5}
    assert settled({"v1": 5, "v2": 6}, half)
    assert settled({"v1": 52, "v2": 48}, half)
    assert not settled({"v1": 60, "v2": 40}, half)
    assert not settled({"v1": 1, "v2": 99}, {"v1": 0.0, "v2": 1.0})
    assert settled({}, half)


async def test_names_stand_for_their_addresses_and_wrong_ones_are_told() -> None:
    assert [process.address for process in await resolve(["127.0.0.1:9000", "127.0.0.1:9000"])] == ["127.0.0.1:9000"]
    assert [process.address for process in await resolve(["[::1]:9000"])] == ["[::1]:9000"]
    for wrong in ("nowhere.invalid:9000", "127.0.0.1", ":9000"):
        with pytest.raises(CliError):
            await resolve([wrong])


def test_what_came_of_it_is_told() -> None:
    process = Process(name="inference-v1-0", address="127.0.0.1:1", subset="v1", streams={"models/m/versions/3": 2})
    moved = Moved(streams=3, asked=1, pinned=1, processes=(process,))
    assert moved_line(moved) == "3 open streams, asked 1 time to open again; 1 cannot move"
    table = text_of(streams_table([process, Process(name="idle", address="", streams={})]))
    assert "m/3" in table
    assert "idle" in table
    assert moved_dict(moved)["processes"] == [
        {"name": "inference-v1-0", "address": "127.0.0.1:1", "subset": "v1", "streams": {"models/m/versions/3": 2}}
    ]
