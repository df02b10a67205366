"""Runs cases of the table and prints what differs: the way to work on one area.

python -m tests.differential.report [PART_OF_A_NAME...]        such as "virtual_service" or "gateway:mutual"
"""

from __future__ import annotations

import asyncio
import collections
import re
import sys
import tempfile
from pathlib import Path

from tests.differential.suite import Outcome, run
from tests.differential.table import cases
from tests.support import tools

COMMON = 15


def main() -> int:
    """Run; 1 when something differs that is not accepted."""
    wanted = sys.argv[1:]
    table = [case for case in cases() if not wanted or any(word in case.id for word in wanted)]
    program = tools.find("pilot-discovery")
    if program is None:
        raise SystemExit("pilot-discovery is not built: tools/build.sh pilot-discovery")
    with tempfile.TemporaryDirectory(prefix="istiod-") as folder:
        outcomes = asyncio.run(run(program, Path(folder), table))
    bad = [outcome for outcome in outcomes if not _is_good(outcome)]
    for outcome in bad:
        _show(outcome)
    common: collections.Counter[str] = collections.Counter()
    for outcome in bad:
        common.update({re.sub(r"\d+", "N", " / ".join(mismatch.path)) for mismatch in outcome.left})
    sys.stdout.write("\nmost common places:\n")
    for place, count in common.most_common(COMMON):
        sys.stdout.write(f"{count:5} {place}\n")
    sys.stdout.write(f"{len(outcomes)} cases, {len(bad)} not the same\n")
    return 1 if bad else 0


def _is_good(outcome: Outcome) -> bool:
    if outcome.case.refused:
        return bool(outcome.refusal)
    return not (outcome.left or outcome.refusal or outcome.error)


def _show(outcome: Outcome) -> None:
    sys.stdout.write(f"\n=== {outcome.case.id}\n")
    if outcome.refusal:
        sys.stdout.write(f"ours refuses: {outcome.refusal}\n")
    if outcome.error:
        sys.stdout.write(f"error: {outcome.error}\n")
    for mismatch in outcome.left:
        sys.stdout.write(f"{mismatch}\n")


if __name__ == "__main__":
    sys.exit(main())
