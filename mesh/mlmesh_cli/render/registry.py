"""`mlmesh models`, `audit`, `quota`: histories, gates, signatures, lineage, limits. Readable at 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from google.protobuf.json_format import MessageToDict
from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.render import text as t
from mlmesh_cli.render.status import table


def gate_results_table(results: Iterable[pb.GateResult]) -> RenderableType:
    """One row a gate: whether it lets pass, and its figures."""
    result = table("gate", "", "finding")
    for found in results:
        mark = Text("passed", style="green") if found.passed else Text("refused", style="bold red")
        result.add_row(found.gate, mark, found.message)
    return result if result.row_count else Text("no gate guards this alias", style="dim")


def gates_table(gates: Iterable[pb.Gate]) -> RenderableType:
    """One row a gate: which aliases it guards, and its condition."""
    result = table("gate", "aliases", "condition")
    for gate in gates:
        result.add_row(gate.id, ", ".join(gate.aliases) or "all", condition(gate))
    return result if result.row_count else Text("no gates: aliases move freely", style="dim")


def condition(gate: pb.Gate) -> str:
    """A gate's condition as one line."""
    kind = gate.WhichOneof("condition") or ""
    facts = MessageToDict(getattr(gate, kind), preserving_proto_field_name=True) if kind else {}
    return " ".join([kind.replace("_", " "), *(f"{name}={value}" for name, value in sorted(facts.items()))])


def moves_table(moves: Iterable[pb.AliasMove], now: datetime) -> RenderableType:
    """One row a move, newest first."""
    result = table("alias", "from", "to", "moved", "by", "reason")
    for move in moves:
        result.add_row(
            t.last(move.alias),
            t.last(move.from_version) if move.from_version else "-",
            Text(t.last(move.to_version), style="cyan") if move.to_version else Text("removed", style="red"),
            t.ago(move.time, now),
            t.last(move.actor) or "-",
            move.reason.split("\n")[0][:60] or "-",
        )
    return result if result.row_count else Text("it never moved", style="dim")


def signatures_table(signatures: Iterable[pb.VersionSignature], now: datetime) -> RenderableType:
    """One row a signature: whether it holds now, by which key."""
    result = table("signature", "key", "stored", "by", "problem")
    for signature in signatures:
        mark = Text("valid", style="green") if signature.valid else Text("not valid", style="bold red")
        key = f"{signature.key_id[:12]}…" if signature.key_id else "-"
        result.add_row(
            mark, key, t.ago(signature.create_time, now), t.last(signature.creator) or "-", signature.problem
        )
    return result if result.row_count else Text("no signatures", style="dim")


def quota_table(quotas: Iterable[pb.Quota]) -> RenderableType:
    """One row a scope: used of limit."""
    result = table("of", ">bytes", ">versions", ">models", "etag")
    for quota in quotas:
        whole = quota.name in ("", "models/-")
        result.add_row(
            "the registry" if whole else t.last(quota.name),
            _used(t.size(quota.bytes_used), t.size(quota.bytes_max) if quota.bytes_max else "", quota.bytes_max),
            _used(str(quota.versions_used), str(quota.versions_max), quota.versions_max),
            _used(str(quota.models_used), str(quota.models_max), quota.models_max) if whole else "-",
            quota.etag,
        )
    return result


def _used(used: str, most: str, limit: int) -> str:
    return f"{used} of {most}" if limit else used


def audit_table(entries: Iterable[pb.AuditEntry]) -> RenderableType:
    """One row an entry, oldest first."""
    result = table(">no.", "time", "who", "what", "resource", "digest")
    for entry in entries:
        time = datetime.fromtimestamp(t.unix(entry.time), UTC).strftime("%Y-%m-%d %H:%M:%S")
        who = t.last(entry.actor) or "-"
        result.add_row(str(entry.sequence), time, who, entry.method, entry.resource, f"{entry.digest[:8]}…")
    return result if result.row_count else Text("no entries", style="dim")


def garbage_view(found: pb.CollectGarbageResponse) -> RenderableType:
    """What was removed, or would be."""
    done = "would be" if found.dry_run else "were"
    lines = [
        Text(f"{found.blob_count} blobs {done} removed, {t.size(found.freed_bytes)}"),
        Text(f"{found.purged_count} models and versions {done} purged"),
        *(Text(f"  {name}", style="dim") for name in (*found.purged, *found.blobs)),
    ]
    more = found.blob_count + found.purged_count - len(found.blobs) - len(found.purged)
    return Group(*lines, *([Text(f"  and {more} more", style="dim")] if more else []))


def lineage_tree(
    version: pb.ModelVersion, parents: dict[str, Sequence[str]], children: dict[str, Sequence[str]]
) -> RenderableType:
    """A version with what it was made from, and what was made from it; branches by resource name."""
    tree = Tree(Text(t.model_version(version.name), style="bold"))
    for title, branches in (("made from", parents), ("made into", children)):
        top = tree.add(Text(title, style="dim"))
        _grow(top, version.name, branches, set())
        if not branches.get(version.name):
            top.add(Text("nothing known", style="dim"))
    facts = version.lineage
    for name, value in (
        ("job", facts.job),
        ("study", facts.study),
        ("data set", f"{facts.dataset} {facts.dataset_fingerprint[:12]}".strip()),
        ("code", facts.code_digest[:12]),
        ("environment", facts.environment_digest[:12]),
        ("source", facts.source_uri),
    ):
        if value:
            tree.add(Text(f"{name}: ", style="dim") + Text(value))
    return tree


def _grow(node: Tree, name: str, branches: dict[str, Sequence[str]], above: set[str]) -> None:
    for other in branches.get(name, ()):
        again = other in above
        branch = node.add(Text(t.model_version(other) + (" (again)" if again else "")))
        if not again:
            _grow(branch, other, branches, above | {name, other})
