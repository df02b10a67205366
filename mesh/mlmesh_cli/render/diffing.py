"""What a change would do, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from mlmesh_local.differing import ConfigDifference, Difference, ResourceDifference, named

_STYLES = {"created": "green", "configured": "yellow", "deleted": "red"}
_MARKS = {"created": "+", "configured": "~", "deleted": "-"}


def difference_view(difference: Difference, *, verbose: bool = False) -> RenderableType:
    """Resources with their fields, what proxies are told, and the consequences; `verbose` with JSON."""
    if difference.empty:
        return Text("nothing differs", style="green")
    parts: list[RenderableType] = []
    for resource in difference.resources:
        parts += _resource(resource)
    for change in difference.config:
        parts += _change(change, verbose=verbose)
    for names, action in ((difference.created, "created"), (difference.deleted, "deleted")):
        if names:
            parts.append(Text(f"{_MARKS[action]} proxies {named(names)}", style=f"bold {_STYLES[action]}"))
    if not difference.config:
        parts.append(Text("no proxy that runs is told anything else", style="green"))
    for consequence in difference.consequences:
        parts.append(Text(f"! {consequence}", style="bold red" if "CUT" in consequence else "default"))
    return Group(*parts)


def _resource(resource: ResourceDifference) -> Iterator[RenderableType]:
    head = Text(f"{_MARKS[resource.action]} {resource.kind} {resource.name}", style=f"bold {_STYLES[resource.action]}")
    head.append(f"  {resource.action}  ", style="default")
    head.append(resource.source, style="cyan")
    yield head
    if resource.action == "configured":
        yield from _lines(resource.lines)


def _change(change: ConfigDifference, *, verbose: bool) -> Iterator[RenderableType]:
    style = "bold red" if change.cuts else f"bold {_STYLES[change.action]}"
    head = Text(f"{_MARKS[change.action]} {change.type.removesuffix('s')} {change.name}", style=style)
    head.append(f"  of {named(change.proxies)}", style="default")
    yield head
    yield from _lines(change.summary)
    if verbose:
        yield from (Padding(line, (0, 0, 0, 2)) for line in _lines(change.lines))


def _lines(lines: Iterable[str]) -> Iterator[RenderableType]:
    for line in lines:
        style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "dim")
        yield Padding(Text(line, style=style, overflow="fold"), (0, 0, 0, 2))
