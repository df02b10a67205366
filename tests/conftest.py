"""What every test may count on: markers, and a visible reason for what cannot run here."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.postgres import postgres, registry_template, shared_url
from tests.support.s3 import s3

__all__ = ["postgres", "registry_template", "s3", "shared_url"]

NO_GPU = "no NVIDIA GPU here (/dev/nvidiactl is missing)"

# A shell without job control starts what runs in the background with SIGINT ignored, and children inherit that: tests
# of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository; tests run from it, also those of an installed wheel."""
    return Path(__file__).resolve().parent.parent
