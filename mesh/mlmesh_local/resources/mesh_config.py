"""MeshConfig: the settings of the whole mesh, where Istio keeps them: the key `mesh` of the ConfigMap `istio`.

https://istio.io/latest/docs/reference/config/istio.mesh.v1alpha1/
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.mesh_hosts import HostSettings, host_settings
from mlmesh_local.resources.meta import Meta
from mlmesh_local.resources.model_security import ExternalAuthorizer
from mlmesh_local.resources.problems import At
from mlmesh_local.resources.providers import parse_authorizers
from mlmesh_local.resources.tree import Node, parse_yaml

ROOT_NAMESPACE = "istio-system"
NAME = "istio"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """Settings of the mesh. Defaults are Istio's (pkg/config/mesh/mesh.go).

    ``trust_domain`` empty leaves that of the running mesh.
    """

    meta: Meta
    trust_domain: str = ""
    trust_domain_aliases: tuple[str, ...] = ()
    enable_auto_mtls: bool = True
    hosts: HostSettings = field(default_factory=HostSettings)
    authorizers: tuple[ExternalAuthorizer, ...] = ()


def is_mesh_config(namespace: str, name: str) -> bool:
    """Whether a ConfigMap is the one that holds the settings of the mesh; others mean nothing here."""
    return namespace == ROOT_NAMESPACE and name == NAME


def parse_mesh_config(meta: Meta, body: Fields) -> MeshConfig:
    """Read the ConfigMap."""
    body.ignored("immutable", "binaryData")
    with body.message("data") as data:
        data.ignored("meshNetworks")
        node = data.raw("mesh")
        place = data.place("mesh")
    return _settings(meta, Fields(_inner(node, place), place, body.problems))


def _inner(node: Node | None, place: At) -> Node:
    """The YAML inside the text of a value, on the lines of the file."""
    if node is None or not isinstance(node.value, str):
        return Node(place.line, None)
    # The text of a block begins on the line after its key.
    trees = list(parse_yaml(place.source, "\n" * place.line + node.value))
    return trees[0].root if trees else Node(place.line, None)


def _settings(meta: Meta, fields: Fields) -> MeshConfig:
    with fields:
        return MeshConfig(
            meta=meta,
            trust_domain=fields.text("trustDomain"),
            trust_domain_aliases=fields.texts("trustDomainAliases"),
            enable_auto_mtls=fields.boolean("enableAutoMtls", default=True),
            hosts=host_settings(fields),
            authorizers=parse_authorizers(fields),
        )
