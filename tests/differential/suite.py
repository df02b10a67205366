"""Runs the table against both sides, with one control plane of Istio for all, and keeps what came out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlmesh_local.resources import InvalidResource
from tests.differential import sides, worlds
from tests.differential.compare import Accepted, Mismatch, accepted, mismatches, sort_out
from tests.differential.fields import GATEWAY_API, fields_of, plain
from tests.differential.issuer import Issuer, issuer
from tests.differential.meaning import meaning
from tests.differential.secrets import secrets
from tests.differential.table import Case, world

STATUSES = Path(__file__).resolve().parent / "gateway_api"
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
    crash: str = ""
    """Istio's control plane fell over: what it said."""


async def run(program: Path, folder: Path, table: Iterable[Case]) -> list[Outcome]:
    """Run cases one after another."""
    with issuer() as answering:
        return await _run(program, folder, [_here(case, answering) for case in table], answering.keys())


def _here(case: Case, answering: Issuer) -> Case:
    return dataclasses.replace(case, own=answering.here(case.own))


async def _run(program: Path, folder: Path, table: Sequence[Case], key_sets: Mapping[str, str]) -> list[Outcome]:
    listed = accepted()
    theirs = await sides.Theirs.start(program, folder)
    outcomes: list[Outcome] = []
    fresh = True
    try:
        for case in table:
            outcome = Outcome(case=case, fields=frozenset())
            for _ in range(2):
                if not fresh or case.alone:
                    await theirs.stop()
                    documents = _documents(case) if case.alone else []
                    theirs = await sides.Theirs.start(program, folder, documents, worlds.members(documents))
                fresh = not case.alone
                try:
                    outcome = await compare(theirs, case, listed, key_sets)
                    if not outcome.left:
                        break
                    # Istio may still have something of the case before (a GRPCRoute where an HTTPRoute of its name
                    # stands now); what counts is what it makes of these documents alone.
                    fresh = False
                except Exception as error:
                    # Istio may fall over a case, or a busy machine over a deadline: the second time it is the case.
                    outcome = Outcome(case=case, fields=frozenset(), error=f"Istio: {error!r}")
                    fresh = False
            outcomes.append(outcome)
    finally:
        await theirs.stop()
    return outcomes


async def compare(
    theirs: sides.Theirs, case: Case, listed: Sequence[Accepted], key_sets: Mapping[str, str] | None = None
) -> Outcome:
    """One case, given to both sides."""
    documents = _documents(case)
    members = worlds.members(documents)
    fields = frozenset(fields_of(worlds.documents(case.own)))
    try:
        ours = sides.ours([world(case.world), case.own], members, case.proxies, key_sets)
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
        if case.accepted and left:
            left, used = [], {**used, case.accepted: len(left)}
        if not left:
            break
    return Outcome(case=case, fields=fields, left=tuple(left), used=used)


def _documents(case: Case) -> list[dict[str, Any]]:
    return [*worlds.documents(world(case.world)), *worlds.documents(case.own), *secrets(case.secrets)]


def write(outcomes: Sequence[Outcome], listed: Sequence[Accepted], path: Path = RESULT) -> None:
    """For the page of fields: by field path the cases in which both sides were the same, and accepted differences."""
    concerned = {item.id: {plain(name) for name in item.fields} for item in listed}
    fields: dict[str, dict[str, set[str]]] = {}
    for outcome in outcomes:
        if outcome.left or outcome.error or outcome.refusal:
            continue
        for name in outcome.fields:
            entry = fields.setdefault(name, {"cases": set(), "differs": set()})
            entry["cases"].add(outcome.case.id)
            entry["differs"].update(key for key in outcome.used if _concerns(concerned[key], plain(name)))
    for name, files in _in_statuses().items():
        fields.setdefault(name, {"cases": set(), "differs": set()})["cases"].update(files)
    path.parent.mkdir(exist_ok=True)
    result = {
        "cases": len(outcomes),
        "fields": {
            name: {key: sorted(values) for key, values in entry.items()} for name, entry in sorted(fields.items())
        },
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def _in_statuses() -> dict[str, set[str]]:
    """Fields of the Gateway API by the files of which test_gateway_api compares statuses and what is made of them."""
    found: dict[str, set[str]] = {}
    for file in sorted(STATUSES.glob("*.yaml")):
        documents = worlds.documents(file.read_text())
        for name in fields_of(one for one in documents if str(one["apiVersion"]).startswith(GATEWAY_API)):
            found.setdefault(name, set()).add(f"{STATUSES.name}/{file.stem}")
    return found


def _concerns(names: set[str], field: str) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)
