"""What the story claims, and whether it held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from mlmesh_cli.render.status import table


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A claim, whether it held, and the figures behind it."""

    claim: str
    held: bool
    detail: str


@dataclass(slots=True)
class Checks:
    """The claims made so far."""

    all: list[Check] = field(default_factory=list)

    def add(self, claim: str, held: bool, detail: str = "") -> bool:
        """Notes a claim; gives back whether it held."""
        self.all.append(Check(claim=claim, held=held, detail=detail))
        return held

    @property
    def failed(self) -> list[Check]:
        """The claims that did not hold."""
        return [check for check in self.all if not check.held]

    def as_dict(self) -> dict[str, Any]:
        """For JSON output."""
        return {
            "held": not self.failed,
            "checks": [{"claim": c.claim, "held": c.held, "detail": c.detail} for c in self.all],
        }


def checks_table(checks: Checks) -> RenderableType:
    """One row a claim."""
    result = table("", "claim", "measured")
    for check in checks.all:
        mark = Text("✓", style="bold green") if check.held else Text("✗", style="bold red")
        result.add_row(mark, check.claim, Text(check.detail, style="default" if check.held else "red"))
    return result
