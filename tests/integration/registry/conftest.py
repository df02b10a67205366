"""A registry in this process: real SQLite, real files, a clock that the test moves."""

import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mlmesh_registry.config import RegistrySettings
from mlmesh_registry.registry import Registry, open_registry


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of a database of this test's own, "" for SQLite in its folder: every test runs on both."""
    return "" if request.param == "sqlite" else str(request.getfixturevalue("shared_url"))


@pytest.fixture
def open_here(
    tmp_path: Path, clock: ManualClock, database_url: str
) -> Callable[..., AbstractAsyncContextManager[Registry]]:
    """Open the registry of this test's folder, as often as wanted; fields of its settings are arguments."""

    def opener(**changes: Any) -> AbstractAsyncContextManager[Registry]:
        settings = dataclasses.replace(RegistrySettings(database_url=database_url), **changes)
        return open_registry(tmp_path / "data", settings, clock=clock)

    return opener


@pytest.fixture
async def registry(open_here: Callable[..., AbstractAsyncContextManager[Registry]]) -> AsyncIterator[Registry]:
    async with open_here() as opened:
        yield opened
