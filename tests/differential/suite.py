"""Runs the table against both sides, with one control plane of Istio for all, and keeps what came out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlmesh_local.resources import InvalidResource
from tests.differential import sides, worlds
from tests.differential.compare import Accepted, Mismatch, accepted, mismatches, sort_out
from tests.differential.fields import fields_of
from tests.differential.meaning import meaning
from tests.differential.table import Case, world

RESULT = Path(__file__).resolve().parents[2] / "build" / "differential.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came out of one case."""

    case: Case
    fields: frozenset[str]
    left: tuple[Mismatch, ...] = ()
    used: dict[str, int] = field(default_factory=dict)
    refusal: str = ""
    error: str = ""


async def run(program: Path, folder: Path, table: Iterable[Case]) -> list[Outcome]:
    """Run cases one after another."""
    listed = accepted()
    theirs = await sides.Theirs.start(program, folder)
    outcomes: list[Outcome] = []
    fresh = True
    try:
        for case in table:
            if not fresh or (case.alone and outcomes):
                await theirs.stop()
                theirs = await sides.Theirs.start(program, folder)
            fresh = not case.alone
            try:
                outcomes.append(await _one(theirs, case, listed))
            except Exception as error:
                # Istio may fall over a case.
                outcomes.append(Outcome(case=case, fields=frozenset(), error=f"Istio: {error!r}"))
                fresh = False
    finally:
        await theirs.stop()
    return outcomes


async def _one(theirs: sides.Theirs, case: Case, listed: Sequence[Accepted]) -> Outcome:
    documents = [*worlds.documents(world(case.world)), *worlds.documents(case.own)]
    members = worlds.members(documents)
    fields = frozenset(fields_of(worlds.documents(case.own)))
    try:
        ours = sides.ours([world(case.world), case.own], members, case.proxies)
    except InvalidResource as refusal:
        return Outcome(case=case, fields=fields, refusal=refusal.message)
    except Exception as error:
        return Outcome(case=case, fields=fields, error=f"{type(error).__name__}: {error}")
    mine: dict[str, Any] = {name: meaning(item, "ours") for name, item in ours.items()}
    left: list[Mismatch] = []
    used: dict[str, int] = {}
    for _ in range(2):
        answers = await theirs.ask(documents, members, case.proxies)
        other = {name: meaning(item, "theirs") for name, item in answers.items()}
        left, used = sort_out(list(mismatches(mine, other)), listed)
        if not left:
            break
    return Outcome(case=case, fields=fields, left=tuple(left), used=used)


def write(outcomes: Sequence[Outcome], listed: Sequence[Accepted], path: Path = RESULT) -> None:
    """The table of fields for the documentation: field path -> "same", "differs (id)" or "refused (id)"."""
    by_id = {item.id: item for item in listed}
    fields: dict[str, str] = {}
    notes: dict[str, set[str]] = {}
    for outcome in outcomes:
        good = not outcome.left and not outcome.error
        for name in sorted(outcome.fields):
            if outcome.refusal:
                concerned = by_id.get(outcome.case.refused)
                if concerned and name in concerned.fields and fields.get(name) != "same":
                    fields[name] = f"refused ({concerned.id})"
                continue
            if not good:
                fields.setdefault(name, "not proved")
                continue
            differs = sorted(key for key in outcome.used if name in by_id[key].fields)
            for key in differs:
                notes.setdefault(name, set()).add(key)
            # What is the same for one value and differs for another is the same, with a note.
            if not differs:
                fields[name] = "same"
            elif fields.get(name) != "same":
                fields[name] = f"differs ({', '.join(differs)})"
    path.parent.mkdir(exist_ok=True)
    summary = {
        "cases": len(outcomes),
        "same": sum(not o.left and not o.refusal and not o.error for o in outcomes),
        "refused": sum(bool(o.refusal) for o in outcomes),
    }
    result = {
        "summary": summary,
        "fields": dict(sorted(fields.items())),
        "notes": {name: sorted(ids) for name, ids in sorted(notes.items())},
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
