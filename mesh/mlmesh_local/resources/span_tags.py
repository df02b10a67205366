"""Tags of spans, as Telemetry and a proxy's configuration name them."""

from __future__ import annotations

from typing import cast

from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model_telemetry import Tag, TagKind, Tags


def custom_tags(fields: Fields, *, formatters: bool = True) -> Tags:
    """`customTags` of a Telemetry or of a proxy's configuration (which has no formatters), by name."""
    found: dict[str, Tag] = {}
    for name, node, at in fields.entries("customTags"):
        if not name:
            fields.problems.add(at, "the name of a tag must not be empty")
        with Fields(node, at, fields.problems) as tag:
            kinds = ("literal", "environment", "header", "formatter")
            kind = tag.one_of(*(kinds if formatters else kinds[:3]), required=False)
            if not kind:
                continue
            with tag.message(kind) as inner:
                value = inner.text("name" if kind in ("environment", "header") else "value", required=True)
                default = inner.text("defaultValue") if kind in ("environment", "header") else ""
            # The name is one of four that were asked for.
            found[name] = Tag(kind=cast("TagKind", kind), value=value, default=default)
    return tuple(sorted(found.items()))
