"""Writes the list of accepted differences into docs/mesh/differential.md, from mesh/mlmesh_local/differences.yaml.

python -m tests.differential.page
"""

from __future__ import annotations

import sys

from tests.differential.compare import accepted
from tests.support.tools import ROOT

PAGE = ROOT / "docs" / "mesh" / "differential.md"
BEGIN = "<!-- differences: made by python -m tests.differential.page -->"
END = "<!-- end of differences -->"


def rendered() -> str:
    """The list as Markdown: a heading for each, so that other pages can link to it."""
    parts: list[str] = []
    for item in sorted(accepted(), key=lambda item: (item.kind == "platform", item.kind, item.id)):
        parts += [f"### {item.id}", "", f"{item.kind}. {item.what.strip()} *Why:* {item.why.strip()}", ""]
        if item.fields:
            parts += [f"Fields: {', '.join(f'`{name}`' for name in item.fields)}.", ""]
    return "\n".join(parts)


def with_list(text: str) -> str:
    """The page with the list as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{rendered()}\n{END}{after}"


def main() -> int:
    """Write the page."""
    PAGE.write_text(with_list(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
