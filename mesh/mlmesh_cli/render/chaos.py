"""`mlmesh chaos`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table


def faults_view(faults: Sequence[pb.Fault], routes: Sequence[str], now: datetime) -> RenderableType:
    """Faults that are active, of processes, connections and routes."""
    if not faults and not routes:
        return Text("no fault is active", style="green")
    result: Table = table("where", "fault", ">connections", "ends in")
    for fault in faults:
        connections = str(fault.connections) if fault.connections else "-"
        result.add_row(fault.instance, Text(fault.description, style="red"), connections, t.until(fault.end_time, now))
    for name in routes:
        result.add_row(f"VirtualService {name}", Text("delay or abort", style="red"), "-", "mlmesh chaos clear")
    return result
