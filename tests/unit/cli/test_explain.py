"""`mlmesh explain` on files and on a running mesh, for people and for scripts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from typer.testing import CliRunner

from mlmesh.local.v1 import local_pb2 as local
from mlmesh_cli.app import app
from mlmesh_local.inspection import find_proxies, items
from mlmesh_local.offline import offline_world
from mlmesh_local.picture import documents_of, resources_of, values_of, world_of
from mlmesh_local.resources.model_sidecars import GatewayTopology, ProxyHeaders, ProxySettings
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import WORKLOADS, load
from tests.unit.cli.conftest import FakeMesh

RULES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: server}
spec:
  hosts: [server]
  http:
    - name: ada
      match:
        - headers: {x-user: {exact: ada}}
      route: [{destination: {host: server, subset: v2}}]
    - name: split
      timeout: 2s
      route:
        - {destination: {host: server, subset: v1}, weight: 90}
        - {destination: {host: server, subset: v2}, weight: 10}
"""
CALL = ("--from", "client", "--to", "server:9000", "-m", "/test.Echo/Unary")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "workloads.yaml").write_text(WORKLOADS + SUBSETS)
    (tmp_path / "rules.yaml").write_text(RULES)
    return tmp_path


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["explain", *arguments])


def test_a_person_sees_the_rule_with_its_line_and_why_not_the_one_before(folder: Path) -> None:
    result = _run(*CALL, "-H", "x-user=bob", "-f", str(folder), "-v")
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert 'header x-user is "bob", not "ada"' in text
    assert f"{folder}/rules.yaml:10" in text
    assert f"{folder}/rules.yaml:12" in text
    assert "90.0% → server.mlmesh.svc.cluster.local:9000 subset v1" in text
    assert "act when a stream begins" in text
    assert "CUT by the route: no stream lives longer than 2 s" in text


def test_scripts_get_a_stable_document(folder: Path) -> None:
    said = json.loads(_run(*CALL, "-f", str(folder), "-o", "json").stdout)
    assert said["schema"] == "mlmesh.explain/v1"
    why = "the application answers"
    assert said["outcome"] == {"kind": "routed", "code": "OK", "why": why, "http": 0, "location": ""}
    assert said["route"]["place"] == {
        "kind": "VirtualService",
        "name": "mlmesh/server",
        "part": "spec.http[1]",
        "source": f"{folder}/rules.yaml:12",
    }
    assert [(one["subset"], one["share"]) for one in said["destinations"]] == [("v1", 0.9), ("v2", 0.1)]
    assert [one["why"] for one in said["rejected"]] == ["header x-user is missing"]
    assert said["timeout"]["route_s"] == 2.0


@pytest.mark.parametrize(
    ("expected", "unmet"),
    [
        (["subset=v2", "rule=ada", "virtual_service=mlmesh/server", "share.v2=1", "code=OK", "tls=mutual TLS"], []),
        (["attempts=3", "timeout=none", "fault=none", "outcome=routed"], []),
        (["subset=v1", "attempts=1"], ["subset is v2, not v1", "attempts is 3, not 1"]),
        (["share.v1=0.5"], ["share.v1 is 0, not 0.5"]),
    ],
)
def test_what_a_script_expects_decides_the_exit_code(folder: Path, expected: list[str], unmet: list[str]) -> None:
    options = [word for one in expected for word in ("--expect", one)]
    result = _run(*CALL, "-H", "X-User=ada", "-f", str(folder), "-o", "json", *options)
    assert result.exit_code == bool(unmet), result.stderr
    assert json.loads(result.stdout)["unmet"] == unmet


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--to", "server:9000"], "name the workload that calls"),
        (["--from", "nobody", "--to", "server"], 'no workload or instance is called "nobody"'),
        (["--from", "client", "--to", "nothing"], 'no service is called "nothing"'),
        (["--from", "client", "--to", "server:x"], "is not HOST[:PORT]"),
        (["--from", "client", "--to", "server", "-m", "Echo"], 'a method is "/package.Service/Method"'),
        (["--from", "client", "--to", "server", "-H", "x"], "--header takes NAME=VALUE"),
        (["--at-gateway", "none", "--to", "server"], 'no gateway is called "none"'),
        (["--from", "client", "--to", "server", "--expect", "nonsense=1"], 'nothing is called "nonsense"'),
    ],
)
def test_a_call_that_cannot_be_is_told(folder: Path, arguments: list[str], expected: str) -> None:
    result = _run(*arguments, "-f", str(folder))
    assert result.exit_code in (1, 2)
    assert expected in result.stderr


def test_a_running_mesh_is_explained_on_the_lines_of_its_files(mesh: FakeMesh, folder: Path) -> None:
    texts = [(folder / name).read_text() for name in ("workloads.yaml", "rules.yaml")]
    world = offline_world(load(*texts))
    values = Struct()
    values.update(values_of(world))
    response = local.GetWorldResponse(world=values, version=world.version)
    for one in documents_of(world.resources):
        response.documents.add(source=one.source, yaml=one.text, line=one.line)
    mesh.local["GetWorld"] = lambda _request, _context: response
    dump = local.GetConfigDumpResponse()
    mesh.local["GetConfigDump"] = lambda _request, _context: dump
    result = mesh.run("explain", *CALL, "-o", "json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["route"]["place"]["source"] == "1.yaml:12"
    assert {one["subset"] for one in said["destinations"]} == {"v1", "v2"}

    # What was really sent counts, whoever made it.
    proxy = dump.proxies.add(name="client-0")
    for item in items(world, find_proxies(world, "client-0")):
        content = json.loads(json.dumps(item.content).replace('"weight": 90', '"weight": 10'))
        proxy.resources.add(type=item.type, name=item.name).content.update(content)
    said = json.loads(mesh.run("explain", *CALL, "-o", "json").stdout)
    assert [(one["subset"], one["weight"]) for one in said["destinations"]] == [("v1", 10), ("v2", 10)]


def test_a_picture_of_a_world_is_the_world() -> None:
    world = offline_world(load(WORKLOADS, SUBSETS, RULES), otlp_address="127.64.0.1:4317")
    first, *others = world.proxies
    settings = ProxySettings(drain_s=1.5, topology=GatewayTopology(trusted_proxies=2), headers=ProxyHeaders(server=""))
    world = replace(world, proxies=(replace(first, settings=settings), *others))
    values = Struct()
    values.update(values_of(world))
    again = world_of(resources_of(documents_of(world.resources)), MessageToDict(values))
    assert again == world
    assert again.version == world.version


def test_a_call_without_grpc_is_told_in_http(folder: Path) -> None:
    answer = "    - match: [{uri: {exact: /gone}}]\n      directResponse: {status: 404}\n"
    (folder / "rules.yaml").write_text(RULES.replace("  http:\n", f"  http:\n{answer}"))
    said = _run(*CALL[:4], "--http", "get", "-m", "/gone", "-f", str(folder)).stdout
    text = " ".join(said.split())
    assert "client → GET server:9000/gone" in text
    assert "answered, HTTP 404: " in text


def test_what_is_misspelled_is_told(folder: Path) -> None:
    said = _run("--from", "client", "--to", "servr:9000", "-m", "/x.Y/Z", "-f", str(folder)).stdout
    assert 'did you mean "server.mlmesh.svc.cluster.local"?' in " ".join(said.split())
    said = _run("--from", "client", "--to", "server:9001", "-m", "/x.Y/Z", "-f", str(folder)).stdout
    assert "has the ports 9000, 9090" in " ".join(said.split())
