"""`mlmesh streams`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from mlmesh_cli.moving import Moved, Process
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table


def streams_table(processes: Sequence[Process]) -> RenderableType:
    """One row a process and version."""
    result = table("instance", "subset", "version", ">open streams")
    for process in processes:
        for name, count in sorted(process.streams.items()) or [("", 0)]:
            result.add_row(process.name, process.subset or "-", t.model_version(name) if name else "-", str(count))
    return result


def processes_dict(processes: Sequence[Process]) -> dict[str, Any]:
    """The same for JSON output."""
    return {
        "processes": [
            {"name": p.name, "address": p.address, "subset": p.subset, "streams": dict(p.streams)} for p in processes
        ]
    }


def moved_line(moved: Moved) -> str:
    """What came of it, in a sentence."""
    pinned = f"; {moved.pinned} cannot move" if moved.pinned else ""
    times = "time" if moved.asked == 1 else "times"
    return f"{moved.streams} open streams, asked {moved.asked} {times} to open again{pinned}"


def moved_view(moved: Moved) -> RenderableType:
    """What came of it, and where streams are now if that is known."""
    line = Text(moved_line(moved), style="green")
    return Group(streams_table(moved.processes), line) if moved.processes else line


def moved_dict(moved: Moved) -> dict[str, Any]:
    """The same for JSON output."""
    return {
        "streams": moved.streams,
        "asked": moved.asked,
        "pinned": moved.pinned,
        **processes_dict(moved.processes),
    }
