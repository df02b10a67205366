"""Where configuration comes from: names in Envoy's configuration back to a resource, its file and its line."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.values import Place
from mlmesh_local.resources import InvalidResource, Resource, ResourceSet
from mlmesh_local.resources.tree import Node, parse_yaml

_CONFIG = re.compile(r"^/apis/([^/]+)/[^/]+/namespaces/([^/]+)/([^/]+)/([^/]+)$")
_POLICY = re.compile(r"^(?:istio-ext-authz-)?ns\[([^\]]*)\]-policy\[([^\]]*)\]-rule\[(\d+)\]")


class Provenance:
    """Finds places in the resources of one world."""

    def __init__(self, resources: ResourceSet) -> None:
        self._by_name: dict[tuple[str, str], Resource] = {}
        for resource in resources:
            self._by_name[(_folded(resource.kind), resource.name)] = resource
        self._trees: dict[tuple[str, str], Node | None] = {}

    def resource(self, kind: str, name: str) -> Resource | None:
        """A resource by kind ("VirtualService" or "virtual-service") and "namespace/name"."""
        return self._by_name.get((_folded(kind), name))

    def place(self, kind: str, name: str, *path: str | int) -> Place:
        """Where a part of a resource was written; the line of what is there of the path."""
        resource = self.resource(kind, name)
        if resource is None:
            return Place(kind=kind, name=name, part=_part(path))
        at = resource.spec.meta.at
        tree = self._tree(resource)
        line, there = (at.line, path) if tree is None else _follow(tree, path)
        if tree is not None:
            # The text of a document starts where its resource does, but for items of a List.
            line += at.line - tree.line
        source = f"{at.source}:{line}" if at.line else at.source
        return Place(kind=resource.kind, name=name, part=_part(there), source=source)

    def of_config(self, metadata: Mapping[str, Json], *path: str | int) -> Place | None:
        """The place that Istio's own provenance ("istio": {"config": ...}) names."""
        filters: Mapping[str, Json] = metadata.get("filter_metadata", {})
        found = _CONFIG.match(str(filters.get("istio", {}).get("config", "")))
        if not found:
            return None
        _, namespace, kind, name = found.groups()
        resource = self.resource(kind, f"{namespace}/{name}")
        return self.place(resource.kind if resource else kind, f"{namespace}/{name}", *path)

    def of_route(self, route: Json) -> Place | None:
        """The rule, and the match of it, that a route was made from."""
        metadata = route.get("metadata", {})
        own: Json = metadata.get("filter_metadata", {}).get("mlmesh", {})
        path: list[str | int] = []
        if "rule" in own:
            path = ["spec", str(own.get("list", "http")), int(own["rule"])]
            if own.get("match") is not None and int(own["match"]) >= 0:
                path += ["match", int(own["match"])]
        return self.of_config(metadata, *path)

    def of_policy(self, policy: str) -> Place | None:
        """The rule of the AuthorizationPolicy that an RBAC policy's name tells."""
        found = _POLICY.match(policy)
        if not found:
            return None
        namespace, name, index = found.groups()
        return self.place("AuthorizationPolicy", f"{namespace}/{name}", "spec", "rules", int(index))

    def of_issuer(self, issuer: str) -> Place | None:
        """The rule of a RequestAuthentication that knows an issuer of tokens."""
        for resource in self._by_name.values():
            if resource.kind != "RequestAuthentication" or not issuer:
                continue
            for index, rule in enumerate(resource.plain.get("spec", {}).get("jwtRules", ())):
                if rule.get("issuer") == issuer:
                    return self.place(resource.kind, resource.name, "spec", "jwtRules", index)
        return None

    def _tree(self, resource: Resource) -> Node | None:
        key = (resource.kind, resource.name)
        if key not in self._trees:
            self._trees[key] = None
            try:
                for tree in parse_yaml(resource.source, resource.text):
                    self._trees[key] = _find(tree.root, resource)
                    break
            except InvalidResource:
                # Resources that were made and not read have no text.
                return None
        return self._trees[key]


def _folded(kind: str) -> str:
    return kind.replace("-", "").lower()


def _part(path: tuple[str | int, ...]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    return text


def _find(root: Node, resource: Resource) -> Node | None:
    """The resource's own node: the root, or one of the items of a List."""
    value = root.value
    items = value.get("items") if isinstance(value, dict) else None
    if items is None or not isinstance(items.value, list):
        return root
    return next((item for item in items.value if item.plain() == resource.plain), None)


def _follow(node: Node, path: tuple[str | int, ...]) -> tuple[int, tuple[str | int, ...]]:
    """The line of what is there of a path, and that much of the path."""
    for index, step in enumerate(path):
        value = node.value
        inner: Node | None = None
        if isinstance(step, int) and isinstance(value, list) and step < len(value):
            inner = value[step]
        elif isinstance(step, str) and isinstance(value, dict):
            inner = value.get(step)
        if inner is None:
            # "match" without its entry says nothing more than its rule.
            there = path[:index]
            return node.line, there
        node = inner
    return node.line, path
