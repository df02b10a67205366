"""Names of what `mlmesh delete` deletes."""

from __future__ import annotations

from mlmesh_cli.deleting import named


def test_names_get_the_namespace_but_those_of_kinds_that_have_none() -> None:
    assert named(["VirtualService", "a", "Gateway/b", "Sidecar", "shop/c", "Namespace", "shop"], "mlmesh") == [
        ("VirtualService", "mlmesh/a"),
        ("Gateway", "mlmesh/b"),
        ("Sidecar", "shop/c"),
        ("Namespace", "/shop"),
    ]
