"""The YAML that injects faults of routes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from mlmesh_cli.chaos import ORIGINAL, Active, RouteFault, faulted, header_pairs, plain, prepared
from mlmesh_cli.errors import CliError
from tests.support.mesh_world import load

HOST = "server.mlmesh.svc.cluster.local"


def service(http: str, **fields: Any) -> dict[str, Any]:
    document: dict[str, Any] = plain(HOST)
    document["metadata"]["name"] = "server"
    document["spec"] |= {"http": yaml.safe_load(http), **fields}
    return document


def active(document: dict[str, Any], original: str | None = None) -> Active:
    return Active(document=document, text=yaml.safe_dump(document), source="server.yaml", original=original)


def test_a_fault_for_all_is_put_on_every_rule() -> None:
    document = service(
        "[{match: [{uri: {prefix: /a}}], route: [{destination: {host: a}}]}, {route: [{destination: {host: b}}]}]"
    )
    rules = faulted(document, RouteFault(delay_s=0.3, percent=50))["spec"]["http"]
    assert [rule["fault"] for rule in rules] == [{"delay": {"percentage": {"value": 50}, "fixedDelay": "300ms"}}] * 2
    assert "fault" not in document["spec"]["http"][0]


def test_a_fault_for_some_calls_stands_before_each_rule_that_can_match_them() -> None:
    document = service(
        "[{name: a, match: [{uri: {exact: /p.S/A}}, {headers: {x-user: {exact: ada}}}], route: []}, "
        "{name: b, route: []}]"
    )
    fault = RouteFault(grpc_status="UNAVAILABLE", method="/p.S/B", headers={"x-user": "ada"})
    rules = faulted(document, fault)["spec"]["http"]
    assert [rule["name"] for rule in rules] == ["a.chaos", "a", "b.chaos", "b"]
    narrowed = {"uri": {"exact": "/p.S/B"}, "headers": {"x-user": {"exact": "ada"}}}
    assert rules[0]["match"] == rules[2]["match"] == [narrowed]
    assert rules[0]["fault"] == {"abort": {"percentage": {"value": 100.0}, "grpcStatus": "UNAVAILABLE"}}


def test_calls_that_no_rule_can_match_are_refused() -> None:
    document = service("[{match: [{uri: {exact: /p.S/A}}], route: []}]")
    with pytest.raises(CliError, match="no rule of VirtualService server can match those calls"):
        faulted(document, RouteFault(http_status=503, method="/p.S/B"))


def test_what_was_there_before_is_remembered_through_faults_on_faults() -> None:
    document = service("[{route: [{destination: {host: server}}]}]")
    first = prepared([active(document)], HOST, RouteFault(http_status=503))["mlmesh/server"]
    original = yaml.safe_load(first)["metadata"]["annotations"][ORIGINAL]
    assert yaml.safe_load(original) == document
    second = prepared([active(yaml.safe_load(first), original)], HOST, RouteFault(delay_s=1))["mlmesh/server"]
    assert yaml.safe_load(second)["metadata"]["annotations"][ORIGINAL] == original
    assert list(yaml.safe_load(second)["spec"]["http"][0]["fault"]) == ["delay"]


def test_sidecars_get_a_rule_of_their_own_where_only_a_gateway_has_one() -> None:
    document = service("[{route: [{destination: {host: server}}]}]", gateways=["entry"])
    texts = prepared([active(document)], HOST, RouteFault(http_status=503))
    assert list(texts) == ["mlmesh/server", "mlmesh/server-chaos"]
    assert yaml.safe_load(texts["mlmesh/server-chaos"])["metadata"]["annotations"][ORIGINAL] == ""


def test_the_yaml_is_what_the_mesh_takes() -> None:
    text = prepared([], HOST, RouteFault(grpc_status="ABORTED", headers={"x-a": "b"}))["mlmesh/server-chaos"]
    workloads = "{apiVersion: v1, kind: Service, metadata: {name: server}, spec: {ports: [{name: grpc, port: 9000}]}}"
    assert len(load(workloads, text)) == 2


def test_headers_are_name_and_value() -> None:
    assert header_pairs(["X-User=ada", "x-b=c=d"]) == {"x-user": "ada", "x-b": "c=d"}
    with pytest.raises(CliError, match="is not NAME=VALUE"):
        header_pairs(["x-user"])
