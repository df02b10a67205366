"""The audit log: who changed what, each entry chained to the one before by its digest. Pure, but for `entries`.

An entry's digest is the hex SHA-256 over one JSON object, in UTF-8, with keys sorted, no spaces, and no escapes but
those that JSON needs:

    {"actor":…,"detail":…,"method":…,"previous_digest":…,"resource":…,"sequence":…,"time":…}

`sequence` is a number, `time` the number of microseconds since the epoch (UTC), the others are strings, `detail` the
very text of the entry. So whoever has the entries can check them without this code.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from mlmesh_registry.events import to_micros
from mlmesh_registry.versions import canonical

NO_DIGEST = "0" * 64
"""What the first entry has as the digest of the one before."""

REGISTRY = "registry"
"""Actor of what the registry does by itself; no SPIFFE id looks like it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One change. `detail` is JSON with sorted keys; `sequence` counts up from 1 without gap."""

    sequence: int
    time: datetime
    actor: str
    method: str
    resource: str
    detail: str
    previous_digest: str
    digest: str = ""


def chained(
    *,
    sequence: int,
    time: datetime,
    actor: str,
    method: str,
    resource: str,
    detail: Mapping[str, object],
    previous_digest: str,
) -> AuditEntry:
    """Make the entry that follows the one whose digest is given."""
    text = canonical(dict(detail)).decode()
    entry = AuditEntry(
        sequence=sequence,
        time=time,
        actor=actor,
        method=method,
        resource=resource,
        detail=text,
        previous_digest=previous_digest,
    )
    return replace(entry, digest=digest_of(entry))


def digest_of(entry: AuditEntry) -> str:
    """Digest that an entry must have, computed from its other fields."""
    covered = {
        "sequence": entry.sequence,
        "time": to_micros(entry.time),
        "actor": entry.actor,
        "method": entry.method,
        "resource": entry.resource,
        "detail": entry.detail,
        "previous_digest": entry.previous_digest,
    }
    return hashlib.sha256(canonical(covered)).hexdigest()


def broken_at(entries: Iterable[AuditEntry], *, after: AuditEntry | None = None, gaps: bool = False) -> int | None:
    """Sequence of the first entry that is not what was written, None when all are.

    Args:
        entries: by sequence. The first must be entry 1 or follow `after`, unless gaps are allowed.
        after: the last entry that was checked, when the log is read in pages.
        gaps: the entries are a selection: where one is missing, the chain is not followed over it.

    That the newest entries were cut off cannot be seen from the rest: remember the last digest seen, and compare.
    """
    before = after
    for entry in entries:
        due = 1 if before is None else before.sequence + 1
        linked = NO_DIGEST if before is None else before.digest
        follows = entry.sequence == due
        if not follows and (not gaps or (before is not None and entry.sequence < due)):
            return min(due, entry.sequence)
        if (follows and entry.previous_digest != linked) or entry.digest != digest_of(entry):
            return entry.sequence
        before = entry
    return None


def root(resource: str) -> str:
    """First two segments of a resource name: what its changes are found by."""
    return "/".join(resource.split("/")[:2])
