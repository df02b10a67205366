"""Prints the Envoy configuration that Istio, and we, make of YAML files, and how they differ.

    python -m tests.differential.dump FILE... [--proxy NAME] [--type cds|eds|lds|rds|ecds] [--ours|--theirs|--diff]

A proxy is a Deployment of the files by name; without any the example world of tests/support/mesh_world.py is added.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, LISTENER, ROUTES
from mlmesh_local.istiod.client import EXTENSION, Resources
from mlmesh_runtime.errors import MeshError
from tests.differential import sides, worlds
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
    parser.add_argument("--type", action="append", default=[], choices=sorted(TYPES), help="all when not given")
    parser.add_argument("--name", default="", help="only resources whose name contains this")
    parser.add_argument("--raw", action="store_true", help="as sent, not normalised")
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


def _shown(configuration: dict[str, Resources], chosen: argparse.Namespace) -> dict[str, Any]:
    types = chosen.type or list(TYPES)
    return {
        proxy: {
            short: {name: item for name, item in sorted(resources.get(TYPES[short], {}).items()) if chosen.name in name}
            for short in types
        }
        for proxy, resources in configuration.items()
    }


def main() -> int:
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
    result: dict[str, Any] = {}
    if not chosen.theirs:
        try:
            result["ours"] = _shown(sides.ours(text, found, names), chosen)
        except MeshError as error:
            print(f"ours refuses it: {error.message}", file=sys.stderr)
    if not chosen.ours:
        result["theirs"] = _shown(asyncio.run(_theirs(text, found, names)), chosen)
    if chosen.diff:
        texts = [json.dumps(result.get(side, {}), indent=1, sort_keys=True).splitlines() for side in ("ours", "theirs")]
        print("\n".join(difflib.unified_diff(*texts, "ours", "theirs", lineterm="", n=6)))
    else:
        print(json.dumps(next(iter(result.values())) if len(result) == 1 else result, indent=1, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
