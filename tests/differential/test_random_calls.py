"""A few random worlds and calls: `mlmesh explain` says what real Envoys do. More: tests/differential/calls.py."""

from __future__ import annotations

from tests.differential.calling.runs import search
from tests.support import tools

SEEDS = range(21, 23)
OUTCOMES = {"routed", "answered", "no_route", "denied"}


def test_random_calls_become_what_explain_says_by_ours_and_by_istio() -> None:
    tally = search(tools.require("pilot-discovery"), SEEDS)
    assert tally.found == []
    # Worlds that answer everything alike would show nothing.
    assert tally.calls.keys() >= OUTCOMES, tally.calls
    assert tally.total == 2 * 40 * len(SEEDS)
