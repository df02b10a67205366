"""`mlmesh infer` with images, texts and sounds."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from mlmesh_cli.media import Heard, readable


def heard_view(heard: Sequence[Heard]) -> RenderableType:
    """What came back to each of them."""
    parts: list[RenderableType] = []
    for one in heard:
        version = f"  version {one.version}" if one.version else ""
        parts.append(Text(one.name, style="bold").append(version, style="cyan"))
        parts += [Text(f"  {line}", style="red" if one.error else "") for line in readable(one)]
    return Group(*parts)
