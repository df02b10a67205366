"""Random but valid worlds, given to both sides; what differs is made small and printed as YAML.

    python -m tests.differential.fuzz --count 50 --seed 7      # worlds of seeds 7 to 56
    python -m tests.differential.fuzz --seed 7 --show          # only the YAML of one seed

A world mixes kinds: what single cases of single fields do not meet. The same seed is always the same world.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.differential.compare import MISSING, Mismatch, accepted
from tests.differential.fuzzing import base, destinations, entries, gateways, routes, security, telemetry
from tests.differential.fuzzing.chance import Chance, Doc
from tests.differential.sides import Theirs
from tests.differential.suite import Outcome, compare
from tests.differential.table import Case
from tests.support import tools

# How often each kind is drawn.
_PARTS = (
    *[entries.service_entry] * 2,
    entries.workload_entry,
    *[entries.sidecar] * 2,
    *[gateways.gateway] * 2,
    *[routes.virtual_service] * 5,
    gateways.http_route,
    *[destinations.destination_rule] * 4,
    *[security.peer_authentication] * 2,
    *[security.authorization_policy] * 3,
    *[security.request_authentication] * 2,
    *[telemetry.telemetry] * 2,
)
# Needed by others: made first.
_FIRST = (base.mesh_config, entries.service_entry, gateways.gateway, destinations.destination_rule)
TRIES = 150
# What a document is not valid, or not the same, without.
_NEEDED = ("selector", "resolution", "protocol", "name", "number", "provider", "action", "hosts", "port")


def documents(seed: int) -> list[Doc]:
    """The world of a seed."""
    chance = Chance(seed)
    base.base(chance)
    if chance.yes(0.4):
        base.mesh_config(chance)
    parts = [chance.one(_PARTS) for _ in range(chance.number(3, 9))]
    for part in sorted(parts, key=lambda part: _FIRST.index(part) if part in _FIRST else len(_FIRST)):
        part(chance)
    return chance.documents


def case(name: str, found: Sequence[Doc], proxies: tuple[str, ...] = ()) -> Case:
    """A case of the table of these documents: every proxy is compared where none are named."""
    proxies = proxies or tuple(document["metadata"]["name"] for document in found if document["kind"] == "Deployment")
    return Case(name=name, file="fuzz", own=text(found), world="none", proxies=proxies)


def text(found: Sequence[Doc]) -> str:
    """As YAML."""
    return yaml.dump_all(json.loads(json.dumps(found)), sort_keys=False, default_flow_style=None, width=150)


def signs(outcome: Outcome) -> set[str]:
    """What is wrong, roughly: the same fault has the same sign in a smaller world."""
    if outcome.refusal:
        return {"refusal"}
    if outcome.error or outcome.crash:
        return {outcome.error[:40] or outcome.crash}
    return {_sign(mismatch) for mismatch in outcome.left}


def _sign(mismatch: Mismatch) -> str:
    parts = [re.sub(r"\d+|.*[.|].*", "N", part) for part in mismatch.path[1:]]
    sides = "".join("-" if value == MISSING else "+" for value in (mismatch.ours, mismatch.theirs))
    return f"{parts[0]} {' '.join(parts[-2:])} {sides}"


class Sides:
    """Both sides; Istio's is started anew when it may not know what it says any more."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self._listed = accepted()
        self._theirs: Theirs | None = None

    async def compare(self, name: str, found: Sequence[Doc], proxies: tuple[str, ...] = ()) -> Outcome:
        """One world; all its proxies when none are named."""
        if self._theirs is None:
            self._theirs = await Theirs.start(self._program, self._folder)
        one = case(name, found, proxies)
        try:
            return await compare(self._theirs, one, self._listed)
        except Exception as error:
            crash = await self._theirs.crash()
            await self.stop()
            return Outcome(case=one, fields=frozenset(), error="" if crash else f"Istio: {error!r}", crash=crash)

    async def stop(self) -> None:
        """End Istio's."""
        theirs, self._theirs = self._theirs, None
        if theirs is not None:
            await theirs.stop()


async def smaller(sides: Sides, found: list[Doc], first: Outcome) -> list[Doc]:
    """Without documents, and parts of them, that the difference does not need."""
    wanted = signs(first)
    # One proxy is enough, and much quicker.
    proxies = (first.left[0].path[0],) if first.left else ()
    if proxies:
        wanted = {_sign(mismatch) for mismatch in first.left if mismatch.path[0] in proxies}
    tries = 0
    progress = True
    while progress and tries < TRIES:
        progress = False
        for candidate in _candidates(found, proxies):
            tries += 1
            if tries > TRIES:
                break
            outcome = await sides.compare("smaller", candidate, proxies)
            if signs(outcome) & wanted:
                found, progress = candidate, True
                break
    return found


async def _least(sides: Sides, world: list[Doc], outcome: Outcome) -> tuple[list[Doc], Outcome]:
    """The smallest world that still differs, and how."""
    if outcome.error:
        return world, outcome
    least = await smaller(sides, world, outcome)
    again = await sides.compare("least", least)
    return (least, again) if signs(again) else (world, outcome)


def _candidates(found: list[Doc], proxies: Sequence[str]) -> Iterator[list[Doc]]:
    for index in reversed(range(len(found))):
        rest = found[:index] + found[index + 1 :]
        if found[index]["metadata"]["name"] not in proxies or found[index]["kind"] != "Deployment":
            yield rest
    for index, document in enumerate(found):
        if document["apiVersion"] in ("v1", "apps/v1"):
            continue
        for path in _paths(document["spec"]):
            yield [*found[:index], {**document, "spec": _less(document["spec"], path)}, *found[index + 1 :]]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Places that may be left out, the largest first."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value) if len(value) > 1 or not path else []
    elif isinstance(value, list):
        keys = list(range(len(value))) if len(value) > 1 else []
    yield from ((*path, key) for key in keys if key not in _NEEDED)
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _paths(item, (*path, key))


def _less(value: Any, path: tuple[Any, ...]) -> Any:
    result = copy.deepcopy(value)
    place = result
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return result


def invalid(worlds: dict[int, list[Doc]]) -> str:
    """What `istioctl validate` says against the worlds: faults of the generator."""
    if tools.find("istioctl") is None:
        return ""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        words: list[str] = []
        for seed, found in worlds.items():
            path = Path(folder) / f"{seed}.yaml"
            # Of Services it asks for names of ports where `appProtocol` says what they are.
            path.write_text(text([document for document in found if document["kind"] != "Service"]))
            words += ["-f", str(path)]
        result = tools.run("istioctl", "validate", *words)
        return "" if result.returncode == 0 else (result.stdout + result.stderr).partition("Error:")[2]


@dataclass(frozen=True, slots=True)
class Found:
    """Seeds that differ, and those whose worlds Istio's control plane does not survive."""

    bad: list[int]
    crashing: list[int]


async def search(program: Path, folder: Path, worlds: dict[int, list[Doc]], *, shrink: bool = True) -> Found:
    """Compare worlds and print what differs."""
    sides = Sides(program, folder)
    found = Found([], [])
    try:
        for seed, world in worlds.items():
            outcome = await sides.compare(str(seed), world)
            if outcome.left or outcome.error or outcome.crash:
                # Istio may keep something of a world before.
                await sides.stop()
                outcome = await sides.compare(str(seed), world)
            if outcome.crash:
                found.crashing.append(seed)
                sys.stdout.write(f"\n=== seed {seed}: Istio itself failed: {outcome.crash}\n")
            elif signs(outcome):
                found.bad.append(seed)
                _show(seed, *(await _least(sides, world, outcome) if shrink else (world, outcome)))
    finally:
        await sides.stop()
    return found


def _show(seed: int, found: list[Doc], outcome: Outcome) -> None:
    lines = [f"\n=== seed {seed}", text(found), outcome.refusal, outcome.error, *(str(m) for m in outcome.left[:12])]
    sys.stdout.write("\n".join(line for line in lines if line) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Run; 1 when something differs or is invalid."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1, help="worlds; 1 when not said")
    parser.add_argument("--seed", type=int, default=1, help="of the first world; 1 when not said")
    parser.add_argument("--show", action="store_true", help="print the worlds, compare nothing")
    parser.add_argument("--whole", action="store_true", help="do not make what differs smaller")
    chosen = parser.parse_args()
    worlds = {seed: documents(seed) for seed in range(chosen.seed, chosen.seed + chosen.count)}
    if chosen.show:
        sys.stdout.write("---\n".join(text(found) for found in worlds.values()))
        return 0
    refused = invalid(worlds)
    if refused:
        sys.stdout.write(f"istioctl validate refuses: {refused}\n")
    program = tools.find("pilot-discovery")
    if program is None:
        raise SystemExit("pilot-discovery is not built: tools/build.sh pilot-discovery")
    with tempfile.TemporaryDirectory(prefix="istiod-") as folder:
        found = asyncio.run(search(program, Path(folder), worlds, shrink=not chosen.whole))
    sys.stdout.write(f"{len(worlds)} worlds, {len(found.bad)} not the same: {' '.join(map(str, found.bad))}\n")
    if found.crashing:
        sys.stdout.write(f"Istio itself failed at {len(found.crashing)}: {' '.join(map(str, found.crashing))}\n")
    return 1 if found.bad or refused else 0


if __name__ == "__main__":
    sys.exit(main())
