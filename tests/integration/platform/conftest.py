"""One mesh with two trained versions for all tests of this folder; each leaves it as it found it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live_platform import ROOT, Platform, started


@pytest.fixture(scope="session")
def platform() -> Iterator[Platform]:
    with started() as running:
        for alias, epochs in (("stable", "1"), ("canary", "2")):
            running.mlmesh(
                "train", "--recipe", "cnn", "--dataset", "mnist", "--model", "mnist",
                "--set", f"epochs={epochs}", "--set", "width=8", "--alias", alias,
            )  # fmt: skip
        wait_served(running)
        yield running


def wait_served(platform: Platform) -> None:
    """Until each subset answers with the version that its alias names."""

    def served() -> bool:
        for instance, version in (("inference-v1-0", "1"), ("inference-v1-1", "1"), ("inference-v2-0", "2")):
            names = platform.figures(instance)
            if not any("mnist" in name and f'version="{version}"' in name for name in names):
                return False
        return True

    platform.wait("both versions are served", served)


@pytest.fixture
def weights(platform: Platform, tmp_path: Path) -> Iterator[WeightsFile]:
    yield WeightsFile(tmp_path)
    platform.mlmesh("apply", "-f", ROOT / "mesh" / "istio")


class WeightsFile:
    """Writes mesh/istio/virtualservice.yaml with other weights."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, v1: int, v2: int) -> Path:
        text = (ROOT / "mesh" / "istio" / "virtualservice.yaml").read_text()
        assert "weight: 100" in text
        assert "weight: 0" in text
        changed = re.sub(
            r"weight: (100|0)$", lambda old: f"weight: {v1 if old[1] == '100' else v2}", text, flags=re.MULTILINE
        )
        path = self._folder / f"split-{v1}-{v2}.yaml"
        path.write_text(changed)
        return path
