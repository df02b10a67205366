"""Stages of versions as words."""

from __future__ import annotations

from rich.text import Text

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.render import text as t

_STAGE_STYLES = {
    pb.VERSION_STAGE_ACTIVE: "green",
    pb.VERSION_STAGE_DEPRECATED: "yellow",
    pb.VERSION_STAGE_QUARANTINED: "bold red",
}


def stage(value: pb.VersionStage.ValueType) -> Text:
    """A stage as one word."""
    name = t.enum_name("VERSION_STAGE_", pb.VersionStage.Name(value))
    return Text(name, style=_STAGE_STYLES.get(value, "dim"))
