"""A few random worlds: kinds that meet each other mean the same on both sides. More: tests/differential/fuzz.py."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.differential.fuzz import Found, documents, search
from tests.support import tools

SEEDS = range(300, 306)


def test_random_worlds_mean_the_same(tmp_path: Path) -> None:
    program = tools.require("pilot-discovery")
    worlds = {seed: documents(seed) for seed in SEEDS}
    assert asyncio.run(search(program, tmp_path, worlds, shrink=False)) == Found([], [])
