"""`mlmesh doctor` on files, and on a mesh that runs: what it asks, prints and exits with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct
from grpc_channelz.v1 import channelz
from grpc_reflection.v1alpha import reflection
from typer.testing import CliRunner

from mlmesh.local.v1 import local_pb2 as local
from mlmesh.training.v1 import training_pb2_grpc
from mlmesh_cli.app import app
from mlmesh_cli.probing import known_streams
from mlmesh_local.offline import offline_world
from mlmesh_local.picture import documents_of, values_of
from tests.support.cli import at, instance
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import WORKLOADS, load, virtual_service
from tests.unit.cli.conftest import FakeMesh

ROOT = Path(__file__).parents[3]
TIMED = virtual_service("[{name: all, timeout: 3s, route: [{destination: {host: server}}]}]")
RULE = """
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {name: errors}
spec: {groups: [{rules: [{expr: 'rate(istio_requests_total{response_code!~"5.*"}[1m])'}]}]}
---
apiVersion: flagger.app/v1beta1
kind: MetricTemplate
metadata: {name: errors}
spec: {query: 'rate(istio_requests_total{response_code=~"5.."}[1m])'}
"""


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "all.yaml").write_text(WORKLOADS + SUBSETS + TIMED)
    (tmp_path / "queries.yaml").write_text(RULE)
    return tmp_path


def test_findings_tell_place_reason_and_fix(folder: Path) -> None:
    result = _run("-f", str(folder))
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert "error MLM001 a timeout on a route that takes streams" in text
    assert "fix: Give unary methods a rule of their own" in text
    assert f"{folder}/all.yaml" in text
    assert "findings of the kind warning or worse" in result.stderr


def test_scripts_get_a_document_and_choose_what_fails(folder: Path) -> None:
    result = _run("-f", str(folder), "-o", "json", "--fail-on", "never")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["schema"] == "mlmesh.doctor/v1"
    assert {one["resource"] for one in found["findings"] if one["id"] == "MLM021"} == {
        "PrometheusRule mlmesh/errors",
        "MetricTemplate mlmesh/errors",
    }


def test_all_checks_are_listed() -> None:
    checks = json.loads(_run("--list", "-o", "json").stdout)["checks"]
    assert checks[0]["id"] == "MLM001"
    assert all(check["source"].startswith("https://") for check in checks)
    assert checks[-1]["id"] in _run("--list").stdout


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "prod", "json", "kubeflow", "ambient"])
def test_our_own_manifests_give_no_finding(overlay: str) -> None:
    result = _run("-f", str(ROOT / "manifests" / "overlays" / overlay), "-o", "json", "--fail-on", "info")
    assert result.exit_code == 0, result.stdout


def test_streaming_methods_of_the_platform_are_known() -> None:
    assert "/inference.GRPCInferenceService/ModelStreamInfer" in known_streams()
    assert "/inference.GRPCInferenceService/ModelInfer" not in known_streams()


@pytest.fixture
def application() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    training_pb2_grpc.add_TrainingServiceServicer_to_server(training_pb2_grpc.TrainingServiceServicer(), server)
    # The second is listed, and cannot be described.
    reflection.enable_server_reflection(["mlmesh.training.v1.TrainingService", "no.such.Service"], server)
    channelz.add_channelz_servicer(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait(5)


def test_a_running_mesh_is_asked(mesh: FakeMesh, application: str) -> None:
    world = offline_world(load(WORKLOADS, SUBSETS, TIMED))
    values = Struct()
    values.update(values_of(world))
    response = local.GetWorldResponse(world=values, version=world.version)
    for one in documents_of(world.resources):
        response.documents.add(source=one.source, yaml=one.text, line=one.line)
    status = local.MeshStatus(
        instances=[
            instance("server-v1-0", application_address=application, certificate_expire_time=at(0)),
            instance("server-v2-0", application_address="127.0.0.1:1", certificate_expire_time=at(4000 * 86_400)),
        ],
        ca_expire_time=at(4000 * 86_400),
    )
    dump = local.GetConfigDumpResponse()
    dump.proxies.add(name="client-0", connected=True, version="2", acked_version="1", rejection="no such filter")
    mesh.local["GetWorld"] = lambda _request, _context: response
    mesh.local["GetStatus"] = lambda _request, _context: local.GetStatusResponse(status=status)
    mesh.local["GetConfigDump"] = lambda _request, _context: dump
    result = mesh.run("doctor", "-o", "json")
    assert result.exit_code == 1
    assert result.stdout, result.stderr + repr(result.exception)
    findings = {one["id"]: one for one in json.loads(result.stdout)["findings"]}
    # By reflection it is known what streams, and what else the service has.
    assert "/mlmesh.training.v1.TrainingService/WatchJob" in findings["MLM001"]["detail"]
    assert findings["MLM022"]["where"] == "server-v1-0"
    assert findings["MLM023"]["detail"] == "Envoy refused: no such filter"
    assert "server-v2-0: reflection: UNAVAILABLE" in result.stderr


def test_connections_are_read_by_channelz(application: str) -> None:
    import asyncio

    from mlmesh_cli.channelz import sockets

    async def ask() -> list[Any]:
        async with grpc.aio.insecure_channel(application) as channel:
            return await sockets(channel, "server-v1-0", most=100)

    found = asyncio.run(ask())
    assert any(one.streams_started for one in found)
    assert {one.instance for one in found} == {"server-v1-0"}


def test_without_a_mesh_it_reads_what_one_would_be_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _run("--state-dir", str(tmp_path / "none"))
    assert result.exit_code == 0
    assert "manifests: nothing found" in result.stdout
