"""What contract tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import wheel


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the suite runs against, or one built for these tests."""
    return wheel.build(tmp_path_factory.mktemp("wheel"))
