"""`mlmesh models import`: what would be made, and what was."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.importing import Import
from mlmesh_cli.render import text as t
from mlmesh_cli.render.models import labels_text, version_view
from mlmesh_cli.render.status import table
from mlmesh_cli.terminal import message_dict


def import_view(wanted: Import) -> RenderableType:
    """What an import would make."""
    files = table("file", ">size")
    for path, file in sorted(wanted.files.items()):
        files.add_row(path, t.size(file.size_bytes))
    facts = {
        "model": wanted.model,
        "source": wanted.version.lineage.source_uri,
        "aliases": ", ".join(wanted.aliases) or "-",
        "labels": labels_text(wanted.version.labels),
        "metrics": ", ".join(f"{name}={value:.6g}" for name, value in sorted(wanted.version.metrics.items())) or "-",
        "description": wanted.version.description or "-",
    }
    lines = [Text(f"{name}: ", style="bold") + Text(value, style="default") for name, value in facts.items()]
    dropped = [Text(f"left out: {why}", style="yellow") for why in wanted.left_out]
    return Group(*lines, files, *dropped, Text("dry run: nothing was made", style="dim"))


def import_value(wanted: Import) -> dict[str, Any]:
    """The same for scripts."""
    return {
        "model": wanted.model,
        "model_version": message_dict(wanted.version),
        "files": [{"path": path, "size_bytes": file.size_bytes} for path, file in sorted(wanted.files.items())],
        "aliases": [*wanted.aliases],
        "left_out": [*wanted.left_out],
        "dry_run": True,
    }


def imported_view(version: pb.ModelVersion, now: datetime, *, known: bool) -> RenderableType:
    """The version that was made, or that was here already."""
    line = Text("imported before; nothing was copied", style="dim") if known else Text("imported", style="green")
    return Group(line, version_view(version, now))
