"""Which blobs are worth keeping: those that a version uses, and for a grace period those that came or were used.

All inside the caller's write transaction, of which there is one at a time; so "is it used?" has one answer. A blob that
is given up loses its row and is condemned in one commit; its bytes go after that. The same bytes that come again have
another place, so what is wanted is never removed with what is not. A crash in between leaves bytes without a row, and a
note of them, never a row without bytes.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import quotas
from mlmesh_registry.database import Write
from mlmesh_registry.events import to_micros
from mlmesh_registry.tables import blobs, condemned_blobs, uploads, version_blobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Unused:
    """A blob that no version uses, and where its bytes are (see the ledger's Blob)."""

    sha256: str
    location: str
    size_bytes: int


def wanted(write: Write, sha256: str) -> None:
    """Somebody who wants to upload a blob that is here was told so: its grace begins anew."""
    unused = blobs.c.unused_since.is_not(None)
    write.connection.execute(
        blobs.update().where(blobs.c.sha256 == sha256, unused).values(unused_since=to_micros(write.now))
    )


def arrived(write: Write, sha256: str, size_bytes: int) -> None:
    """A blob that was not here is. Call it in the transaction that gives it its row."""
    quotas.add_blob(write, size_bytes)
    write.connection.execute(blobs.update().where(blobs.c.sha256 == sha256).values(unused_since=to_micros(write.now)))


def used(write: Write, sha256s: Collection[str]) -> None:
    """A version uses these."""
    for some in _some(sorted(sha256s)):
        write.connection.execute(blobs.update().where(blobs.c.sha256.in_(some)).values(unused_since=None))


def released(write: Write, sha256s: Collection[str]) -> None:
    """Versions that used these are gone; the grace of those that no other uses begins."""
    still = sa.exists().where(version_blobs.c.sha256 == blobs.c.sha256)
    for some in _some(sorted(sha256s)):
        write.connection.execute(
            blobs.update().where(blobs.c.sha256.in_(some), ~still).values(unused_since=to_micros(write.now))
        )


def unused(connection: sa.Connection, until: int, limit: int | None = None) -> Sequence[Unused]:
    """Blobs that were unused at a time (microseconds) and are since, with no upload of the same bytes under way."""
    coming = sa.exists().where(uploads.c.sha256 == blobs.c.sha256, uploads.c.finished.is_(False))
    query = sa.select(blobs.c.sha256, blobs.c.location, blobs.c.size_bytes)
    query = query.where(blobs.c.unused_since <= until, ~coming)
    rows = connection.execute(query.order_by(blobs.c.unused_since, blobs.c.sha256).limit(limit))
    return [_unused(row) for row in rows]


def condemn(write: Write, found: Sequence[Unused]) -> None:
    """Give unused blobs up. Their bytes are still here, and noted."""
    for some in _some([blob.sha256 for blob in found]):
        # A repeated FinishUpload must not speak of a blob that is gone.
        write.connection.execute(uploads.delete().where(uploads.c.sha256.in_(some)))
        write.connection.execute(blobs.delete().where(blobs.c.sha256.in_(some)))
    if found:
        now = to_micros(write.now)
        write.connection.execute(
            condemned_blobs.insert(),
            [
                {"sha256": each.sha256, "location": each.location, "size_bytes": each.size_bytes, "time": now}
                for each in found
            ],
        )
        quotas.remove_blobs(write, sum(blob.size_bytes for blob in found))


def condemned(connection: sa.Connection, limit: int) -> Sequence[Unused]:
    """Blobs given up whose bytes may still be here, the oldest first."""
    rows = connection.execute(condemned_blobs.select().order_by(condemned_blobs.c.time).limit(limit))
    return [_unused(row) for row in rows]


def removed(write: Write, gone: Sequence[Unused]) -> None:
    """The bytes of these condemned blobs are gone."""
    column = condemned_blobs.c
    for each in gone:
        here = column.sha256 == each.sha256, column.location == each.location
        write.connection.execute(condemned_blobs.delete().where(*here))


def _unused(row: Any) -> Unused:
    return Unused(sha256=row.sha256, location=row.location, size_bytes=row.size_bytes)


def _some(sha256s: Sequence[str], most: int = 500) -> Iterator[Sequence[str]]:
    """Databases bound the number of parameters of a statement."""
    return (sha256s[first : first + most] for first in range(0, len(sha256s), most))
