"""`mlmesh translate`: what Envoys would be told, without any process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mlmesh_cli.app import app
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import WORKLOADS, virtual_service

SPLIT = virtual_service("[{route: [{destination: {host: server, subset: v1}}]}]")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "all.yaml").write_text(WORKLOADS + SUBSETS + SPLIT)
    return tmp_path


def _run(*arguments: str, given: str = "") -> str:
    result = CliRunner().invoke(app, ["translate", *arguments], input=given)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_equal_files_give_equal_output_in_each_format(folder: Path) -> None:
    tree = json.loads(_run("-f", str(folder), "-o", "json"))
    assert yaml.safe_load(_run("-f", str(folder), "-o", "yaml")) == tree
    assert _run("-f", "-", "-o", "json", given=WORKLOADS + SUBSETS + SPLIT) == _run("-f", str(folder), "-o", "json")
    assert list(tree) == ["server-v1-0", "server-v2-0", "client-0", "gateway-0"]
    (route,) = tree["client-0"]["routes"]["9000"]["virtual_hosts"][0]["routes"]
    assert route["route"]["cluster"] == "outbound|9000|v1|server.mlmesh.svc.cluster.local"


def test_a_proxy_and_types_are_chosen(folder: Path) -> None:
    tree = json.loads(
        _run("-f", str(folder), "--proxy", "server-v1", "-t", "clusters", "--type", "listeners", "-o", "json")
    )
    assert {proxy: list(types) for proxy, types in tree.items()} == {"server-v1-0": ["listeners", "clusters"]}
    table = _run("-f", str(folder), "--proxy", "mlmesh/client-0", "-t", "routes")
    assert "client-0" in table
    assert "9090" in table
    assert "server-v1-0" not in table


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--proxy", "clint"], 'no workload or instance is called "clint"; did you mean "client"?'),
        (["--type", "secrets"], "no type is called 'secrets'; there are listeners, routes"),
        (["-f", "missing"], "missing: does not exist"),
    ],
)
def test_what_is_not_there_is_told(folder: Path, arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, ["translate", "-f", str(folder), *arguments])
    assert result.exit_code == 1
    assert expected in result.stderr


def test_without_files_it_is_what_a_mesh_would_be_started_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert "inference-v1-0" in json.loads(_run("-o", "json"))


@pytest.mark.parametrize("command", ["translate", "doctor", "explain --from a --to b", "diff --against {}"])
def test_what_is_refused_without_a_mesh_speaks_of_none(command: str, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: a}\nspec: {htp: []}\n")
    words = command.format(wrong).split()
    result = CliRunner().invoke(app, [*words, "-f", str(wrong)])
    assert result.exit_code not in (0, 3)
    assert 'unknown field (did you mean "http"?)' in result.stderr
    assert "no mesh was touched" in result.stderr
    assert "apply" not in result.stderr
