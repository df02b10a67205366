"""Names of what `mlmesh delete` deletes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.deleting import named, of_files
from mlmesh_local.resources.problems import InvalidResource
from tests.unit.cli.conftest import FakeMesh

FILE = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: a, labels: {"-": "?"}}
spec: {htp: []}
---
apiVersion: v1
kind: List
items:
  - {apiVersion: gateway.networking.k8s.io/v1, kind: Gateway, metadata: {name: b, namespace: shop}}
  - {apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: not-kept}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: not-kept}
data: {a: b}
"""


def test_of_files_only_kinds_and_names_are_read() -> None:
    assert of_files([(Path("it.yaml"), FILE)]) == [
        ("VirtualService", "mlmesh/a"),
        ("KubernetesGateway", "shop/b"),
        ("Namespace", "/shop"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{apiVersion: v1, kind: Service, metadata: {}}", "it.yaml:1: metadata.name: is missing"),
        ("{apiVersion: v1, kind: Service}", "metadata.name: is missing"),
        ("{apiVersion: v1, kind: Servce, metadata: {name: a}}", 'did you mean "Service"'),
        ("{apiVersion: v1, kind", "it.yaml:1"),
    ],
)
def test_what_has_no_kind_or_no_name_is_refused(text: str, expected: str) -> None:
    with pytest.raises(InvalidResource, match=expected):
        of_files([(Path("it.yaml"), text)])


def test_standard_input_is_a_file_too(mesh: FakeMesh) -> None:
    mesh.local["DeleteResources"] = lambda _request, _context: pb.DeleteResourcesResponse()
    assert mesh.run("delete", "-f", "-", text=FILE).exit_code == 0
    (request,) = mesh.local.requests["DeleteResources"]
    assert [one.name for one in request.resources] == ["mlmesh/a", "shop/b", "/shop"]


def test_names_get_the_namespace_but_those_of_kinds_that_have_none() -> None:
    assert named(["VirtualService", "a", "Gateway/b", "Sidecar", "shop/c", "Namespace", "shop"], "mlmesh") == [
        ("VirtualService", "mlmesh/a"),
        ("Gateway", "mlmesh/b"),
        ("Sidecar", "shop/c"),
        ("Namespace", "/shop"),
    ]
