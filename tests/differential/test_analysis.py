"""The analysis finds what Istio's analyzers find: the same codes, severities and resources.

Two of Istio's: all analyzers over everything that a cluster would have, its pods included; and `istioctl analyze` over
the files alone, which leaves out what needs a cluster.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlmesh_local.resources import Document, load_resources
from mlmesh_local.resources.analysis import Message, analyze
from tests.support.tools import run

FOLDER = Path(__file__).parent / "analysis"
CASES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

# What looks at Secrets, webhooks and images of running proxies: the laptop mesh issues certificates itself and has
# neither of the others.
ELSEWHERE = frozenset(
    {"gateway.SecretAnalyzer", "injection.ImageAnalyzer", "injection.ImageAutoAnalyzer", "webhook.Analyzer"}
)
Finding = tuple[str, str, str]


def _ours(name: str) -> tuple[Message, ...]:
    path = FOLDER / f"{name}.yaml"
    return analyze(load_resources([Document(source=path.name, text=path.read_text())]))


def _plain(messages: tuple[Message, ...]) -> set[Finding]:
    return {(message.code, message.level, message.origin) for message in messages}


def _with_pods(text: str) -> str:
    documents = [document for document in yaml.safe_load_all(text) if document]
    return "\n---\n".join(yaml.safe_dump(document) for document in [*documents, *_pods(documents)])


def _pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{document['metadata']['name']}-0",
                "namespace": document["metadata"]["namespace"],
                "labels": document["spec"]["template"]["metadata"]["labels"],
            },
            "spec": {"containers": [{"name": "istio-proxy", "image": "proxy"}]},
        }
        for document in documents
        if document["kind"] == "Deployment"
    ]


@pytest.mark.parametrize("name", CASES)
def test_all_analyzers_of_istio_find_the_same(name: str, tmp_path: Path) -> None:
    cluster, answer = tmp_path / "cluster.yaml", tmp_path / "found.json"
    cluster.write_text(_with_pods((FOLDER / f"{name}.yaml").read_text()))
    result = run("istiod-memory", "-analyze", "-o", answer, cluster)
    assert result.returncode == 0, result.stderr
    found = json.loads(answer.read_text())["messages"]
    theirs = {(one["code"], one["level"], one["origin"]) for one in found if one["analyzer"] not in ELSEWHERE}
    assert _plain(_ours(name)) == theirs
    assert theirs


def test_istioctl_finds_the_same_in_files_alone() -> None:
    paths = [FOLDER / f"{name}.yaml" for name in CASES]
    for path in paths:
        result = run("istioctl", "analyze", "--use-kube=false", "-A", "-o", "json", path)
        theirs = {(one["code"], one["level"], one["origin"]) for one in json.loads(result.stdout or "[]")}
        ours = tuple(message for message in _ours(path.stem) if message.offline)
        assert _plain(ours) == theirs, path.stem


def test_findings_name_the_line_of_the_field() -> None:
    found = {(message.code, message.meta.name): message for message in _ours("virtual_services")}
    text = (FOLDER / "virtual_services.yaml").read_text().splitlines()
    unreachable = found["IST0130", "unreachable"]
    assert "- {route: [{destination: {host: a}}]}" in text[unreachable.at.line - 1]
    assert unreachable.at.path == "spec.http[2]"
