"""What sidecars were told and run, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from mlmesh_cli.configurations import Live, Told
from mlmesh_cli.render.status import table
from mlmesh_local.inspection import TYPES

_STYLES = {"same": "green", "warming": "yellow", "draining": "dim", "unused": "dim", "only in Envoy": "yellow"}


def summary_table(proxies: Sequence[Told]) -> RenderableType:
    """One row a sidecar: taken and sent resources by type."""
    kinds = (*TYPES, "secrets")
    result = table("proxy", "control plane", "version", "acked", *(f">{kind}" for kind in kinds))
    for one in proxies:
        message, counts = one.message, one.counts()
        connected = Text("connected", style="green") if message.connected else Text("away", style="red")
        same = message.acked_version == message.version
        acked = Text(message.acked_version or "-", style="green" if same else "yellow")
        cells = (f"{counts[kind][0]}/{counts[kind][1]}" if kind in counts else "-" for kind in kinds)
        result.add_row(one.name, connected, message.version, acked, *cells)
    refused = [Text(f"{p.name} refused: {p.message.rejection}", style="red") for p in proxies if p.message.rejection]
    return Group(result, *refused)


def sent_table(proxies: Sequence[Told]) -> RenderableType:
    """One row a resource."""
    result = table("proxy", "type", "name", "version", "taken", ">bytes")
    for one in proxies:
        before = ""
        for resource in one.message.resources:
            taken = Text("yes", style="green") if resource.acked else Text("no", style="yellow")
            name = one.name if not before else ""
            kind = resource.type if resource.type != before else ""
            result.add_row(name, kind, resource.name, resource.version, taken, f"{resource.size:,}")
            before = resource.type
    refused = [Text(f"{p.name} refused: {p.message.rejection}", style="red") for p in proxies if p.message.rejection]
    return Group(result, *refused)


def compared_view(head: RenderableType, compared: Mapping[str, Live], *, only_different: bool) -> RenderableType:
    """The head, and for each Envoy what it runs."""
    parts: list[RenderableType] = [head]
    for name, live in compared.items():
        if live.problem:
            parts.append(Text(f"{name}: {live.problem}", style="red"))
            continue
        count = sum(one.verdict == "same" for one in live.compared)
        whole = all(one.verdict in ("same", "unused") for one in live.compared)
        style = "green" if whole else "yellow"
        parts.append(
            Text(f"{name}: Envoy runs {count} of {len(live.compared)} resources as they were sent", style=style)
        )
        result = table("type", "name", "sent", "running", "verdict")
        for one in live.compared:
            if not only_different or one.verdict not in ("same", "unused"):
                verdict = Text(one.verdict, style=_STYLES.get(one.verdict, "red"))
                result.add_row(one.type, one.name, one.sent or "-", one.running or "-", verdict)
        if result.row_count:
            parts.append(result)
    return Group(*parts)
