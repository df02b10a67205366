"""Checks and findings, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from mlmesh_cli.render.status import table
from mlmesh_local.doctor import Check, Finding

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}


def checks_table(checks: Iterable[Check]) -> RenderableType:
    """One row a check."""
    result = table("id", "severity", "looks at", "finds")
    for check in checks:
        result.add_row(check.id, Text(check.severity, style=_STYLES[check.severity]), check.layer, check.title)
    return result


def findings_view(findings: Sequence[Finding], at: str) -> RenderableType:
    """Findings, the worst first, each with its place, why it matters and what to do."""
    if not findings:
        return Text(f"{at}: nothing found", style="green")
    parts: list[RenderableType] = []
    before = ""
    for one in findings:
        if one.id != before:
            head = Text(f"{one.severity} ", style=_STYLES[one.severity])
            head.append(f"{one.id} {one.title}", style="bold")
            parts += [head, _indented(one.why), _indented(f"fix: {one.fix}"), _indented(one.source, "dim")]
        before = one.id
        line = Text("· ")
        line.append(" ".join(word for word in (one.resource, one.part) if word))
        line.append(f" {one.detail}  " if one.resource else f"{one.detail}  ")
        line.append(one.where, style="cyan")
        parts.append(Padding(line, (0, 0, 0, 2)))
    counts = {severity: sum(one.severity == severity for one in findings) for severity in _STYLES}
    told = ", ".join(f"{count} of the kind {severity}" for severity, count in counts.items() if count)
    return Group(*parts, Text(f"{at}: {told}"))


def _indented(text: str, style: str = "default") -> RenderableType:
    return Padding(Text(text, style=style), (0, 0, 0, 2))
