"""YAML is read as Kubernetes and Istio read it: booleans, numbers, merge keys, lists of resources."""

from __future__ import annotations

import pytest

from mlmesh_local.resources import Document, InvalidResource, VirtualService, load_resources
from mlmesh_local.resources.mesh_config import MeshConfig
from mlmesh_local.resources.scalars import plain_scalar
from mlmesh_local.resources.tree import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("y", True),
        ("N", False),
        ("on", True),
        ("Off", False),
        ("yEs", "yEs"),
        ("~", None),
        ("Null", None),
        ("22:22", "22:22"),
        ("2024-05-01T10:00:00Z", "2024-05-01T10:00:00Z"),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 15),
        ("-0b11", -3),
        ("080", 80.0),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1.2.3", "1.2.3"),
        ("_1", "_1"),
        ("-", "-"),
    ],
)
def test_scalars_without_quotes(text: str, value: object) -> None:
    read = plain_scalar(text)
    assert (read, type(read)) == (value, type(value))


def test_quotes_and_tags_make_text() -> None:
    (tree,) = parse_yaml("a.yaml", """{a: "y", b: 'on', c: !!str 12, d: !!int "12", e: y}""")
    assert tree.root.plain() == {"a": "y", "b": "on", "c": "12", "d": 12, "e": True}


def test_merge_keys_give_what_a_mapping_lacks() -> None:
    text = "{a: &a {x: 1, y1: 1}, b: &b {x: 2, z: 2}, c: {<<: [*a, *b], z: 3}, d: {x: 4, <<: *a}}"
    (tree,) = parse_yaml("a.yaml", text)
    assert tree.root.plain()["c"] == {"x": 1, "y1": 1, "z": 3}
    assert tree.root.plain()["d"] == {"x": 4, "y1": 1}
    with pytest.raises(InvalidResource, match='"<<" takes a mapping'):
        list(parse_yaml("a.yaml", "{<<: 1}"))


def test_lists_of_one_kind_are_read() -> None:
    text = """
apiVersion: networking.istio.io/v1
kind: VirtualServiceList
items:
- apiVersion: networking.istio.io/v1
  kind: VirtualService
  metadata: {name: a}
  spec: {hosts: [a.example], http: [{directResponse: {status: 2e2}}]}
"""
    (spec,) = load_resources([Document(source="a.yaml", text=text)]).specs(VirtualService)
    assert spec.meta.name == "a"


def test_lists_may_hold_lists_or_nothing() -> None:
    entry = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}"
    text = f"{{apiVersion: v1, kind: List, items: [{{apiVersion: v1, kind: List, items: [{entry}]}}]}}"
    assert len(load_resources([Document(source="a.yaml", text=text)])) == 1
    assert len(load_resources([Document(source="a.yaml", text="{apiVersion: v1, kind: List}")])) == 0


def test_json_may_be_indented_with_tabs_and_yaml_may_not() -> None:
    (tree,) = parse_yaml("a.json", '{\n\t"a": [\n\t\t1\n\t]\n}')
    assert tree.root.plain() == {"a": [1]}
    with pytest.raises(InvalidResource):
        list(parse_yaml("a.yaml", "a:\n\t- 1\n"))


def test_numbers_in_quotes_are_numbers_in_mesh_config_only() -> None:
    mesh = """
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data:
  mesh: |
    extensionProviders:
    - name: authz
      envoyExtAuthzGrpc: {service: authz.shop.svc.cluster.local, port: "9000"}
"""
    (spec,) = load_resources([Document(source="a.yaml", text=mesh)]).specs(MeshConfig)
    assert [one.port for one in spec.authorizers] == [9000]
    route = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: a}
spec: {hosts: [a.example], http: [{directResponse: {status: "200"}}]}
"""
    with pytest.raises(InvalidResource, match="must be a whole number, not a string"):
        load_resources([Document(source="a.yaml", text=route)])


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidResource, match="not valid YAML: special characters are not allowed"):
        list(parse_yaml("a.yaml", "\0"))
