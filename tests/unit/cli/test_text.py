from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_cli.render import text as t
from tests.support.cli import NOW, at


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 µs"),
        (0.00087, "870 µs"),
        (0.0032, "3.2 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (1.44, "1.44 s"),
        (59.96, "1 min"),
        (125, "2 min 5 s"),
        (3600, "1 h"),
        (11_520, "3 h 12 min"),
        (352_800, "4 d 2 h"),
        (-0.25, "-250 ms"),
    ],
)
def test_durations_are_written_as_people_read_them(seconds: float, text: str) -> None:
    assert t.duration(seconds) == text


def test_expiry_says_how_long_or_how_late() -> None:
    assert t.until(at(3600 * 23), NOW) == "in 23 h"
    assert t.until(at(-180), NOW) == "expired 3 min ago"
    assert t.until(at(0).__class__(), NOW) == "-"


def test_past_times() -> None:
    assert t.ago(at(-0.4), NOW) == "now"
    assert t.ago(at(-65.2), NOW) == "1 min 5 s ago"
    assert t.ago(at(10), NOW) == "now"


def test_sizes() -> None:
    assert [t.size(n) for n in (0, 1023, 1024, 5 << 20, 3 << 30)] == ["0 B", "1023 B", "1.0 KiB", "5.0 MiB", "3.0 GiB"]


def test_a_share_that_does_not_apply_is_a_dash() -> None:
    assert t.percent(-1) == "-"
    assert t.percent(0.0951) == "9.5 %"


@given(st.floats(min_value=-1, max_value=2), st.integers(min_value=1, max_value=80))
def test_a_bar_always_fills_its_width(share: float, width: int) -> None:
    assert len(t.bar(share, width=width).plain) == width


@pytest.mark.parametrize(("share", "cells"), [(0.0, 0), (0.5, 10), (1.0, 20), (1.7, 20), (-1.0, 0)])
def test_a_bar_is_proportional(share: float, cells: int) -> None:
    assert t.bar(share, width=20).plain.count("█") == cells


def test_names_are_shortened() -> None:
    assert t.model_version("models/mnist/versions/3") == "mnist/3"
    assert t.model_version("something else") == "something else"
    assert t.enum_name("JOB_PHASE_", "JOB_PHASE_LOADING_DATA") == "loading data"
