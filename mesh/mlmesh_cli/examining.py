"""What `mlmesh doctor` looks at: manifests, or the running mesh and what it tells of itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlmesh_cli.connection import Connection
from mlmesh_cli.errors import CliError, ExitCode
from mlmesh_cli.probing import known_streams, probe
from mlmesh_cli.worlds import live_world, offline, read_files
from mlmesh_local.doctor import Check, Context, Finding, others_of
from mlmesh_local.resources import Document
from mlmesh_local.resources.parse import IGNORED_KINDS
from mlmesh_local.resources.tree import parse_yaml

SCHEMA = "mlmesh.doctor/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """A context, what a person should know of how it was made, and what was looked at, in a word or two."""

    context: Context
    notes: tuple[str, ...]
    at: str


async def context_of(state_dir: Path, paths: Sequence[Path] | None) -> Looked:
    """Manifests where they are named, else the running mesh, else what `mlmesh up` would read."""
    if paths is None:
        try:
            return await _running(state_dir)
        except CliError as error:
            if error.exit_code != ExitCode.NOT_RUNNING:
                raise
    documents, notes = read_files(paths or ())
    # Kinds of others hold queries, and the mesh would refuse some of them.
    seen = offline(_without_others(documents))
    others = list(others_of(documents))
    context = Context(seen.world, others=others, streaming=known_streams(), now_s=time.time())
    return Looked(context=context, notes=(*notes, *seen.notes), at="manifests")


async def _running(state_dir: Path) -> Looked:
    async with Connection.from_environment(state_dir) as connection:
        control = await connection.control()
        seen = await live_world(control)
        facts = await probe(control, await connection.status(), seen.world)
    context = Context(seen.world, streaming=known_streams(), facts=facts, now_s=time.time())
    return Looked(context=context, notes=(*seen.notes, *facts.unasked), at="the running mesh")


def _without_others(documents: Iterable[Document]) -> list[Document]:
    others = {(one.source, one.root.line) for one in others_of(documents) if one.kind not in IGNORED_KINDS}
    if not others:
        return list(documents)
    return [
        Document(source=document.source, text="\n" * (tree.root.line - 1) + tree.text)
        for document in documents
        for tree in parse_yaml(document.source, document.text)
        if (document.source, tree.root.line) not in others
    ]


def check_documents(checks: Iterable[Check]) -> dict[str, Any]:
    """Checks as JSON values."""
    names = ("id", "severity", "layer", "title", "why", "fix", "source")
    return {"schema": SCHEMA, "checks": [{name: getattr(check, name) for name in names} for check in checks]}


def finding_documents(findings: Iterable[Finding], at: str) -> dict[str, Any]:
    """Findings as JSON values."""
    return {"schema": SCHEMA, "looked_at": at, "findings": [dataclasses.asdict(one) for one in findings]}
