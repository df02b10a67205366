"""Where a field of a resource stands, found by reading its text again: for what is refused only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlmesh_local.resources.problems import At
from mlmesh_local.resources.tree import parse_yaml

if TYPE_CHECKING:
    from mlmesh_local.resources.resource_set import Resource


def field_place(resource: Resource, *path: str | int) -> At:
    """The place of a field; of one that is not there, or of a resource of a List, the line of what is around it."""
    start = resource.spec.meta.at
    place = start
    for step in path:
        place = place.field(f"[{step}]" if isinstance(step, int) else step)
    roots = [tree.root for tree in parse_yaml(start.source, resource.text)] if resource.text else []
    if len(roots) != 1 or not isinstance(roots[0].value, dict) or "items" in roots[0].value:
        return place
    node = roots[0]
    # The text of a resource begins where the resource does.
    offset = start.line - node.line
    for step in path:
        value, inner = node.value, None
        if isinstance(value, dict) and isinstance(step, str):
            inner = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            inner = value[step]
        if inner is None:
            break
        node = inner
    return At(source=place.source, line=node.line + offset, resource=place.resource, path=place.path)
