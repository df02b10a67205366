"""`mlmesh analyze` and `mlmesh conditions` of files, without any process."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from mlmesh_cli.app import app
from mlmesh_cli.errors import ExitCode
from tests.support.mesh_documents import SUBSETS
from tests.support.mesh_world import WORKLOADS, virtual_service

LOST = virtual_service("[{route: [{destination: {host: server, subset: v3, port: {number: 9000}}}]}]")
BOTH = virtual_service("[{route: [{destination: {host: server, subset: v1, port: {number: 9000}}}]}]")
EDGE = """
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: edge, namespace: mlmesh}
spec: {gatewayClassName: istio, listeners: [{name: http, port: 8080, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: server, namespace: mlmesh}
spec: {parentRefs: [{name: edge}], rules: [{backendRefs: [{name: sever, port: 9000}]}]}
"""


def _run(*arguments: str, given: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "-f", "-"], input=given)


def test_an_error_is_printed_and_ends_with_its_own_exit_code() -> None:
    result = _run("analyze", given=WORKLOADS + SUBSETS + LOST)
    assert result.exit_code == ExitCode.FINDINGS == 79
    assert result.stdout.startswith("Error [IST0101] (VirtualService mlmesh/server)")
    assert "the analysis has 1 finding of severity Error or worse" in result.stderr


def test_findings_as_json_with_the_line_where_each_is() -> None:
    result = _run("analyze", "-o", "json", given=WORKLOADS + SUBSETS + LOST)
    (finding,) = json.loads(result.stdout)
    assert (finding["code"], finding["level"]) == ("IST0101", "Error")
    assert finding["documentationUrl"].endswith("/ist0101/")
    line = (WORKLOADS + SUBSETS + LOST).splitlines()[int(finding["reference"].rpartition(":")[2]) - 1]
    assert "v3" in line


def test_what_is_not_to_be_told_is_not_counted() -> None:
    given = WORKLOADS + SUBSETS + LOST
    result = _run("analyze", "-S", "IST0101=VirtualService mlmesh/*", given=given)
    assert (result.exit_code, result.stdout) == (0, "nothing found\n")
    assert _run("analyze", "--output-threshold", "Error", given=WORKLOADS + SUBSETS + BOTH).exit_code == 0


def test_a_milder_threshold_fails_too() -> None:
    twin = BOTH.replace("{name: server}", "{name: twin}")
    assert twin != BOTH
    result = _run("analyze", given=WORKLOADS + SUBSETS + BOTH + twin)
    assert result.exit_code == 79
    assert result.stdout.count("IST0109") == 2


def test_statuses_of_what_files_would_make(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(WORKLOADS + EDGE)
    result = CliRunner().invoke(app, ["conditions", "-f", str(tmp_path), "-o", "json"])
    assert result.exit_code == 0, result.stderr
    found = {one["kind"]: one["status"] for one in json.loads(result.stdout)}
    (parent,) = found["GRPCRoute"]["parents"]
    reasons = {condition["type"]: condition["reason"] for condition in parent["conditions"]}
    assert reasons == {"Accepted": "Accepted", "ResolvedRefs": "BackendNotFound"}
    assert found["Gateway"]["listeners"][0]["attachedRoutes"] == 1
    table = CliRunner().invoke(app, ["conditions", "-f", str(tmp_path)], env={"COLUMNS": "200"}).stdout
    assert "BackendNotFound" in table
    assert "listener http (1 routes)" in table
