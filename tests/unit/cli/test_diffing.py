"""`mlmesh diff`: what applying files would change, and what becomes of open streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from typer.testing import CliRunner

from mlmesh.local.v1 import local_pb2 as local
from mlmesh_cli.app import app
from mlmesh_local.differing import Difference, compare
from mlmesh_local.offline import following_world, offline_world
from mlmesh_local.picture import documents_of, values_of
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import WORKLOADS, load, load_alone, resource, virtual_service
from tests.unit.cli.conftest import FakeMesh


def _split(v1: int, v2: int, more: str = "") -> str:
    return virtual_service(
        f"[{{name: split, route: [{{destination: {{host: server, subset: v1}}, weight: {v1}}},"
        f" {{destination: {{host: server, subset: v2}}, weight: {v2}}}]{more}}}]"
    )


def _difference(before: str, after: str, *, prune: bool = False) -> Difference:
    old = offline_world(load(WORKLOADS, SUBSETS, before))
    new = old.resources.apply(load_alone(WORKLOADS, SUBSETS, after), prune=prune).resources
    return compare(old, following_world(old, new))


def _permissive(mode: str) -> str:
    return resource("PeerAuthentication", f"{{mtls: {{mode: {mode}}}}}", name="default")


def test_weights_change_routes_and_cut_nothing() -> None:
    difference = _difference(_split(90, 10), _split(50, 50, ", timeout: 3s"))
    (changed,) = difference.resources
    assert (changed.kind, changed.action) == ("VirtualService", "configured")
    assert {change.type for change in difference.config} == {"routes"}
    summary = [line for change in difference.config if change.name == "9000" for line in change.summary]
    assert summary == [
        "- server.mlmesh:9000: split: everything → 90% server.mlmesh:9000 v1, 10% server.mlmesh:9000 v2",
        "+ server.mlmesh:9000: split: everything → 50% server.mlmesh:9000 v1, 50% server.mlmesh:9000 v2; timeout 3 s",
    ]
    assert difference.consequences == (
        "routes change: new calls and new streams follow at once, streams that are open stay where they are",
    )


def test_a_change_of_tls_says_plainly_that_it_cuts_streams() -> None:
    difference = _difference(_permissive("STRICT"), _permissive("PERMISSIVE"))
    listeners = [change for change in difference.config if change.type == "listeners"]
    # Replicas and subsets whose listeners differ alike are told of together, whatever their addresses.
    assert {name for change in listeners for name in change.proxies} == {"server-v1-0", "server-v2-0"}
    assert all(change.cuts and change.name.startswith("POD_") for change in listeners)
    cut = [line for line in difference.consequences if "CUT 45 s later with UNAVAILABLE" in line]
    assert len(cut) == len(listeners)


def test_a_policy_is_told_by_its_rules_and_cuts_nothing() -> None:
    before = resource("AuthorizationPolicy", "{rules: [{to: [{operation: {paths: [/a]}}]}]}")
    after = resource("AuthorizationPolicy", "{rules: [{to: [{operation: {paths: [/b]}}]}]}")
    difference = _difference(before, after)
    told = [line for change in difference.config for line in change.summary]
    assert any(line.startswith("- ALLOW ns[mlmesh]-policy[it]-rule[0]") and "/a" in line for line in told)
    assert any(line.startswith("+ ALLOW ns[mlmesh]-policy[it]-rule[0]") and "/b" in line for line in told)
    assert not any(change.cuts for change in difference.config)


def test_what_is_not_there_any_more_is_deleted_only_with_prune() -> None:
    assert _difference(_split(90, 10), "").empty
    difference = _difference(_split(90, 10), "", prune=True)
    assert [(one.kind, one.action) for one in difference.resources] == [("VirtualService", "deleted")]


def test_more_replicas_are_proxies_and_endpoints_and_move_nobody_else() -> None:
    more = WORKLOADS.replace(
        "metadata: {name: server-v1}\nspec:\n", "metadata: {name: server-v1}\nspec:\n  replicas: 2\n"
    )
    old = offline_world(load(WORKLOADS, SUBSETS))
    new = following_world(old, old.resources.apply(load_alone(more)).resources)
    assert {proxy.id: proxy.pod_address for proxy in old.proxies}.items() <= {
        proxy.id: proxy.pod_address for proxy in new.proxies
    }.items()
    difference = compare(old, new)
    assert difference.created == ("server-v1-1",)
    assert {change.type for change in difference.config} == {"endpoints"}
    assert not difference.deleted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, split in (("old", _split(90, 10)), ("new", _split(10, 90))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "all.yaml").write_text(WORKLOADS + SUBSETS + split)
    return tmp_path


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["diff", *arguments])


def test_exit_codes_are_those_of_diff(folder: Path) -> None:
    old, new = str(folder / "old"), str(folder / "new")
    same = _run("-f", old, "--against", old)
    assert (same.exit_code, same.stdout.strip()) == (0, "nothing differs")
    other = _run("-f", new, "--against", old, "-v")
    assert other.exit_code == 1
    assert "10% server.mlmesh:9000 v1, 90% server.mlmesh:9000 v2" in other.stdout
    refused = folder / "refused.yaml"
    refused.write_text(_split(1, 1).replace("hosts:", "host:"))
    for arguments in (["-f", str(refused), "--against", old], ["-f", "missing", "--against", old], []):
        assert _run(*arguments).exit_code == 2
    assert _run("-f", new, "--state-dir", str(folder / "none")).exit_code == 3


def test_a_defect_is_no_difference(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_worlds: Any) -> Difference:
        raise ZeroDivisionError

    monkeypatch.setattr("mlmesh_local.differing.compare", broken)
    result = _run("-f", str(folder / "new"), "--against", str(folder / "old"))
    assert result.exit_code == 2
    assert "ZeroDivisionError" in result.stderr


def test_scripts_get_a_document(folder: Path) -> None:
    found = json.loads(_run("-f", str(folder / "new"), "--against", str(folder / "old"), "-o", "json").stdout)
    assert found["schema"] == "mlmesh.diff/v1"
    assert [one["name"] for one in found["resources"]] == ["mlmesh/server"]
    assert {one["type"] for one in found["config"]} == {"routes"}
    assert not any(one["cuts_streams"] for one in found["config"])


def test_against_a_running_mesh_its_own_instances_count(mesh: FakeMesh, folder: Path) -> None:
    world = offline_world(load((folder / "old" / "all.yaml").read_text()))
    values = Struct()
    values.update(values_of(world))
    response = local.GetWorldResponse(world=values, version=world.version)
    for one in documents_of(world.resources):
        response.documents.add(source=one.source, yaml=one.text, line=one.line)
    mesh.local["GetWorld"] = lambda _request, _context: response
    assert mesh.run("diff", "-f", str(folder / "old")).exit_code == 0
    result = mesh.run("diff", "-f", str(folder / "new"))
    assert result.exit_code == 1
    assert "VirtualService mlmesh/server  configured" in result.stdout
