"""Make the README's pictures from a real run: `python tools/recording.py` tells the demo and draws what it printed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLUMNS = 112
STEP = re.compile(r"^\W*(\d)\. ")
# Picture to the steps of the story that it shows.
PICTURES = {"demo-training.svg": (2, 3), "demo-traffic.svg": (4, 5)}


def main() -> None:
    """Run the demo and write the pictures."""
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_INTERACTIVE": "0", "COLUMNS": str(COLUMNS)}
    program = Path(sys.executable).with_name("mlmesh")
    done = subprocess.run([str(program), "demo"], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    steps = split(done.stdout.splitlines())
    for name, wanted in PICTURES.items():
        (DOCS / name).write_text(draw([line for step in wanted for line in steps[step]]))


def split(lines: list[str]) -> dict[int, list[str]]:
    """Lines by the step in whose panel or below it they stand."""
    steps: dict[int, list[str]] = {}
    current: list[str] = []
    for line in lines:
        found = STEP.match(Text.from_ansi(line).plain)
        if found:
            current = steps.setdefault(int(found[1]), [])
        current.append(line)
    return steps


def draw(lines: list[str]) -> str:
    """The lines as an SVG of a terminal, with no font from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, crop=True)
    svg = console.export_svg(title="make demo")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    main()
