"""The Containerfiles: nothing here can build them, so what can be read off them is checked."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.support import manifests

ROOT = manifests.ROOT
FILES = {
    "registry": ROOT / "services" / "mlmesh_registry" / "Containerfile",
    "training": ROOT / "services" / "mlmesh_training" / "Containerfile",
    "inference": ROOT / "services" / "mlmesh_inference" / "Containerfile",
    "toolbox": ROOT / "mesh" / "mlmesh_cli" / "Containerfile",
}


def _instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#")))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("image", sorted(FILES))
def test_two_stages_from_one_pinned_base(image: str) -> None:
    everything = [value.split()[0] for word, value in _instructions(FILES[image]) if word == "FROM"]
    # Toolchains are copied out of images of their own, pinned as well.
    bases = [base for base in everything if not re.fullmatch(r"rust:1\.\d+\.\d+-slim-\w+", base)]
    assert len(bases) == 2
    # The environment's interpreter is the base's: both stages must be the same.
    assert len(set(bases)) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases[0])


@pytest.mark.parametrize("image", sorted(FILES))
def test_the_user_is_the_one_of_the_pod(image: str) -> None:
    (user,) = [value for word, value in _instructions(FILES[image]) if word == "USER"]
    pods = [
        d["spec"]["template"]["spec"]["securityContext"]
        for d in manifests.of_kind(manifests.documents(manifests.BASE), "Deployment").values()
        if any(c["image"].startswith(f"mlmesh/{image}:") for c in manifests.containers(d))
    ]
    assert pods
    for context in pods:
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}"


@pytest.mark.parametrize("image", sorted(FILES))
def test_the_command_and_the_extra_exist(image: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    instructions = _instructions(FILES[image])
    (extra,) = [v.removeprefix("EXTRA=") for w, v in instructions if w == "ARG" and v.startswith("EXTRA=")]
    assert set(extra.split(",")) <= set(project["optional-dependencies"])
    (command,) = [value for word, value in instructions if word == "CMD"]
    for deployment in manifests.of_kind(manifests.documents(manifests.BASE), "Deployment").values():
        for container in manifests.containers(deployment):
            if container["image"].startswith(f"mlmesh/{image}:"):
                assert command == str(container["command"]).replace("'", '"')


def test_images_carry_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for deployment in manifests.of_kind(manifests.documents(manifests.BASE), "Deployment").values():
        for container in manifests.containers(deployment):
            if container["image"] != "auto":
                name, _, tag = container["image"].partition(":")
                assert tag == version
                assert name.removeprefix("mlmesh/") in FILES
