"""What every test may count on: markers, and a visible reason for what cannot run here."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support.postgres import postgres, registry_template, shared_url
from tests.support.s3 import s3
from tests.support.server import served_by

__all__ = ["postgres", "registry_template", "s3", "shared_url"]

NO_GPU = "no NVIDIA GPU here (/dev/nvidiactl is missing)"

# A shell without job control starts what runs in the background with SIGINT ignored, and children inherit that: tests
# of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes says how busy the machine is, nothing else.
settings.register_profile("mlmesh", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("mlmesh")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Not by marks of xdist's: they work by changing ids of tests, which has no effect with pytest 9.2."""
    from tests.support.spreading import ByFile

    return ByFile(config, log)


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


@pytest.fixture(params=["grpcio", "native"])
def each_transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once a transport: its servers are served by that. `pytest.mark.usefixtures("each_transport")`."""
    name: str = request.param
    spec = importlib.util.find_spec("mlmesh_front")
    if name == "native" and (spec is None or spec.origin is None):
        pytest.skip("the native transport is not built (make front; it needs cargo)")
    with served_by(name):
        yield name
