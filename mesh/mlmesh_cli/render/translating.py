"""Envoy's resources, as a table of names, as one tree, and as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from rich.console import RenderableType
from rich.text import Text

from mlmesh_cli.render.status import table
from mlmesh_local.inspection import Item

Tree = dict[str, dict[str, dict[str, Any]]]


def items_tree(items: Sequence[Item]) -> Tree:
    """Resources by proxy, short type name and name."""
    result: Tree = {}
    for item in items:
        result.setdefault(item.proxy, {}).setdefault(item.type, {})[item.name] = item.content
    return result


def items_yaml(items: Sequence[Item]) -> str:
    """The tree as YAML, without anchors, in one order."""
    return yaml_text(items_tree(items))


def yaml_text(value: Any) -> str:
    """A value as YAML, without anchors, in its own order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def items_table(items: Sequence[Item]) -> RenderableType:
    """One row a resource; a proxy and a type are named where they begin."""
    result = table("proxy", "type", "name", "version", ">bytes")
    before: tuple[str, str] = ("", "")
    for item in items:
        proxy = item.proxy if item.proxy != before[0] else ""
        kind = item.type if (item.proxy, item.type) != before else ""
        result.add_row(proxy, kind, item.name, item.version, f"{item.size:,}")
        before = (item.proxy, item.type)
    return result if result.row_count else Text("nothing", style="dim")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, _data: Any) -> bool:
        """Equal parts are written twice: references between resources would be ours, not Envoy's."""
        return True
