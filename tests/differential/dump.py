"""Prints the Envoy configuration that Istio, and we, make of YAML files, and how they differ.

    python -m tests.differential.dump FILE... [--proxy NAME] [--diff | --ours | --theirs]
    python -m tests.differential.dump FILE... --raw [--type cds|eds|lds|rds|ecds] [--name PART] [--ours | --theirs]

A proxy is a Deployment of the files by name; files without one get the world of tests/support/mesh_world.py in front.
Without --raw what is shown is the configuration's meaning (tests/differential/meaning.py). --diff hides the differences
that mesh/mlmesh_local/differences.yaml accepts, unless --all is given.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, LISTENER, ROUTES
from mlmesh_local.istiod.client import EXTENSION, Resources
from mlmesh_runtime.errors import MeshError
from tests.differential import sides, worlds
from tests.differential.compare import accepted, mismatches, sort_out
from tests.differential.meaning import Side, meaning
from tests.support import tools
from tests.support.mesh_world import WORKLOADS

TYPES = {"cds": CLUSTER, "eds": ENDPOINTS, "lds": LISTENER, "rds": ROUTES, "ecds": EXTENSION}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.differential.dump",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help='YAML file or folder; "-" is standard input'
    )
    parser.add_argument("--proxy", action="append", default=[], help="Deployment's name; all when not given")
    parser.add_argument("--raw", action="store_true", help="resources as sent")
    parser.add_argument("--type", action="append", default=[], choices=sorted(TYPES), help="with --raw; default all")
    parser.add_argument("--name", default="", help="with --raw: only resources whose name contains this")
    parser.add_argument("--all", action="store_true", help="with --diff: accepted differences too")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ours", action="store_true")
    which.add_argument("--theirs", action="store_true")
    which.add_argument("--diff", action="store_true")
    return parser.parse_args()


async def _theirs(text: str, found: list[worlds.Member], names: list[str]) -> dict[str, Resources]:
    program = tools.find("pilot-discovery")
    if program is None:
        raise SystemExit("pilot-discovery is not built: tools/build.sh pilot-discovery")
    with tempfile.TemporaryDirectory(prefix="istiod-") as folder:
        theirs = await sides.Theirs.start(program, Path(folder))
        try:
            return await theirs.ask(worlds.documents(text), found, names)
        finally:
            await theirs.stop()


def _raw(resources: Resources, chosen: argparse.Namespace) -> dict[str, Any]:
    return {
        short: {name: item for name, item in sorted(resources.get(TYPES[short], {}).items()) if chosen.name in name}
        for short in chosen.type or list(TYPES)
    }


def _differ(trees: dict[str, dict[str, Any]], *, everything: bool) -> int:
    found = list(mismatches(trees.get("ours", {}), trees.get("theirs", {})))
    left, used = (found, {}) if everything else sort_out(found, accepted())
    for mismatch in left:
        sys.stdout.write(f"{mismatch}\n")
    counts = ", ".join(f"{name} {count}" for name, count in sorted(used.items())) or "none"
    sys.stdout.write(f"{len(left)} differences; accepted ones: {counts}\n")
    return 1 if left else 0


def main() -> int:
    """Run; 1 when a --diff shows something."""
    chosen = _arguments()
    text = "\n---\n".join(sys.stdin.read() if str(f) == "-" else worlds.read([f]) for f in chosen.files)
    found = worlds.members(worlds.documents(text))
    if not found:
        text = f"{WORKLOADS}\n---\n{text}"
        found = worlds.members(worlds.documents(text))
    names = chosen.proxy or [member.name for member in found]
    unknown = set(names) - {member.name for member in found}
    if unknown:
        raise SystemExit(f"no Deployment is named {', '.join(unknown)}; there are {', '.join(m.name for m in found)}")
    raw: dict[str, dict[str, Resources]] = {}
    if not chosen.theirs:
        try:
            raw["ours"] = sides.ours([text], found, names)
        except MeshError as error:
            sys.stderr.write(f"ours refuses it: {error.message}\n")
    if not chosen.ours:
        raw["theirs"] = asyncio.run(_theirs(text, found, names))
    shown: dict[str, dict[str, Any]] = {
        side: {p: _raw(r, chosen) if chosen.raw else meaning(r, cast("Side", side)) for p, r in proxies.items()}
        for side, proxies in raw.items()
    }
    if chosen.diff:
        return _differ(shown, everything=chosen.all)
    only = next(iter(shown.values()), {}) if len(shown) < 2 else shown
    sys.stdout.write(json.dumps(only, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
