"""The analysis finds what Istio's analyzers find: the same codes, severities and resources.

Two of Istio's: all analyzers over everything that a cluster would have, its pods included; and `istioctl analyze` over
the files alone, which leaves out what needs a cluster.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mlmesh_local.resources import Document, load_resources
from mlmesh_local.resources.analysis import Message, analyze
from tests.differential.analysed import Finding, theirs
from tests.support.tools import run

FOLDER = Path(__file__).parent / "analysis"
CASES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _ours(name: str) -> tuple[Message, ...]:
    path = FOLDER / f"{name}.yaml"
    return analyze(load_resources([Document(source=path.name, text=path.read_text())]))


def _plain(messages: tuple[Message, ...]) -> set[Finding]:
    return {(message.code, message.level, message.origin) for message in messages}


@pytest.mark.parametrize("name", CASES)
def test_all_analyzers_of_istio_find_the_same(name: str) -> None:
    documents = yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text())
    found = theirs([document for document in documents if document])
    assert _plain(_ours(name)) == found
    assert found


def test_istioctl_finds_the_same_in_files_alone() -> None:
    paths = [FOLDER / f"{name}.yaml" for name in CASES]
    for path in paths:
        result = run("istioctl", "analyze", "--use-kube=false", "-A", "-o", "json", path)
        found = {(one["code"], one["level"], one["origin"]) for one in json.loads(result.stdout or "[]")}
        ours = tuple(message for message in _ours(path.stem) if message.offline)
        assert _plain(ours) == found, path.stem


def test_findings_name_the_line_of_the_field() -> None:
    found = {(message.code, message.meta.name): message for message in _ours("virtual_services")}
    text = (FOLDER / "virtual_services.yaml").read_text().splitlines()
    unreachable = found["IST0130", "unreachable"]
    assert "- {route: [{destination: {host: a}}]}" in text[unreachable.at.line - 1]
    assert unreachable.at.path == "spec.http[2]"
