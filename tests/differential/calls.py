"""Random worlds and random calls: what real Envoys do with them is what `mlmesh explain` says.

    python -m tests.differential.calls --count 20 --seed 7            # worlds of seeds 7 to 26, by ours and by Istio
    python -m tests.differential.calls --seed 7 --show                # only the YAML and the calls of one seed

Every call is explained first, by what the sidecars were really sent, and then made; the same seed is always the same.
"""

from __future__ import annotations

import argparse
import sys

from tests.differential.calling.runs import report, search
from tests.differential.calling.worlds import ISSUERS, world
from tests.support import tools
from tests.support.tokens import Issuer


def main() -> int:
    """Run; 1 when something is not as it was said."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential.calls", description=__doc__)
    parser.add_argument("--count", type=int, default=1, help="worlds; 1 when not said")
    parser.add_argument("--seed", type=int, default=1, help="of the first world; 1 when not said")
    parser.add_argument("--ours", action="store_true", help="without Istio's control plane")
    parser.add_argument("--show", action="store_true", help="print the worlds and calls, make none")
    chosen = parser.parse_args()
    seeds = range(chosen.seed, chosen.seed + chosen.count)
    if chosen.show:
        issuers = {name: Issuer(name) for name in ISSUERS}
        for seed in seeds:
            text, calls = world(seed, "127.0.0.1", issuers)
            sys.stdout.write(f"{text}---\n" + "".join(f"# {n}: {call}\n" for n, call in enumerate(calls)))
        return 0
    tally = search(None if chosen.ours else tools.find("pilot-discovery"), seeds)
    report(tally)
    return 1 if tally.found else 0


if __name__ == "__main__":
    sys.exit(main())
