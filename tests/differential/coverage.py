"""Which fields of Istio's API no case of the table has yet.

python -m tests.differential.coverage [KIND...]
"""

from __future__ import annotations

import sys

from tests.differential import worlds
from tests.differential.fields import COMPARED, fields_of, known
from tests.differential.table import cases


def covered() -> set[str]:
    """Fields that cases set."""
    return {name for case in cases() for name in fields_of(worlds.documents(case.own))}


def uncovered() -> dict[str, list[str]]:
    """Fields by kind that no case sets."""
    found = covered()
    result: dict[str, list[str]] = {}
    for name, kind in sorted(known().items()):
        if name in COMPARED:
            result[name] = [f"{name}.{path}" for path, _ in kind.leaves if f"{name}.{path}" not in found]
    return result


def main() -> int:
    """Print them; 1 when there are any."""
    wanted = sys.argv[1:]
    total = 0
    for name, fields in uncovered().items():
        if wanted and name not in wanted:
            continue
        total += len(fields)
        sys.stdout.write(f"{name}: {len(fields)} of {len(known()[name].leaves)} fields in no case\n")
        for field in fields:
            sys.stdout.write(f"  {field}\n")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
