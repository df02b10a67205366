"""Which versions stay in memory when not all that are wanted fit: the ones used last (least recently used go first)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Key = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A version in memory.

    Attributes:
        key: model and version. memory_bytes: what it takes. used_s: when it was last asked, on any one clock.
        pinned: whether another version needs it, so that it cannot go alone.
    """

    key: Key
    memory_bytes: int
    used_s: float
    pinned: bool = False


def make_room(residents: Iterable[Resident], *, budget_bytes: int, coming_bytes: int = 0) -> list[Key]:
    """Versions to put to sleep so that the others and what is coming fit, the longest unused first.

    Args:
        budget_bytes: of all together; 0 is no bound. coming_bytes: of versions on their way.

    One version may be larger than the budget: it then is the only one, since refusing it would help nobody.
    """
    present = sorted(residents, key=lambda each: (each.used_s, each.key))
    if not budget_bytes:
        return []
    total = coming_bytes + sum(each.memory_bytes for each in present)
    leaving: list[Key] = []
    # What was used last stays, unless something else is on its way.
    candidates = present if coming_bytes else present[:-1]
    for each in candidates:
        if total <= budget_bytes:
            break
        if not each.pinned and each.memory_bytes:
            leaving.append(each.key)
            total -= each.memory_bytes
    return leaving
