"""What goes for good: versions and models past their purge_time, and blobs that nobody uses any more.

A step is one short transaction, so nobody waits long and a crash loses no more than a step. Rows go first, bytes after
the commit: what a crash leaves is noted, and removed by the next run.
"""

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import sqlalchemy as sa

from mlmesh_registry import moves, names, quotas, references, tables
from mlmesh_registry.audit import REGISTRY
from mlmesh_registry.database import Database, Write
from mlmesh_registry.events import to_micros
from mlmesh_registry.references import Unused
from mlmesh_runtime.errors import InvalidInput

log = logging.getLogger(__name__)

NAMED_MAX = 1000
"""Most blobs, and most versions and models, that a report names."""
_VERSIONS_A_STEP = 100
_BLOBS_A_STEP = 100

Remove = Callable[[Collection[str]], Awaitable[None]]
"""Remove the bytes of digests that have no row any more; that they are gone already is no error."""


@dataclass(slots=True, kw_only=True)
class Report:
    """What was removed, or would be. `blobs` and `purged` name the first NAMED_MAX of them."""

    freed_bytes: int = 0
    blobs: list[str] = field(default_factory=list)
    blob_count: int = 0
    purged: list[str] = field(default_factory=list)
    purged_count: int = 0

    def add_blobs(self, found: Sequence[Unused]) -> None:
        """Tell of blobs."""
        self.freed_bytes += sum(blob.size_bytes for blob in found)
        self.blob_count += len(found)
        self.blobs += [names.blob_name(blob.sha256) for blob in found[: NAMED_MAX - len(self.blobs)]]

    def add_purged(self, found: Sequence[str]) -> None:
        """Tell of versions or models."""
        self.purged_count += len(found)
        self.purged += found[: NAMED_MAX - len(self.purged)]


class Garbage:
    """Collects garbage of one registry.

    Args:
        remove: see Remove.
        clock: the present time, timezone-aware UTC.
        grace: blobs stay for this long after they came or were last used.
    """

    def __init__(self, database: Database, *, remove: Remove, clock: Callable[[], datetime], grace: timedelta) -> None:
        self._database = database
        self._remove = remove
        self._clock = clock
        self._grace = grace

    async def collect(self, *, grace: timedelta | None, dry_run: bool, actor: str = REGISTRY) -> Report:
        """Purge what is past its time and remove blobs that were unused for the grace period (None: the setting).

        Errors: InvalidInput for a grace below the setting, unless dry_run.
        """
        if grace is None:
            grace = self._grace
        if grace < timedelta() or (grace < self._grace and not dry_run):
            text = f"grace: {grace.total_seconds():g} s, at least {self._grace.total_seconds():g} s is kept"
            raise InvalidInput(text, field="grace")
        if dry_run:
            return await self._database.read(lambda connection: _foreseen(connection, self._clock(), grace))
        report = Report()
        await self._purge(report, actor)
        await self._condemn(report, grace, actor)
        await self.remove_condemned()
        return report

    async def remove_condemned(self) -> None:
        """Remove the bytes of blobs that were given up, by this run or one that a crash ended."""
        while some := await self._database.read(lambda connection: references.condemned(connection, _BLOBS_A_STEP)):
            await self._remove([blob.sha256 for blob in some])
            gone = some
            await self._database.write(lambda write: references.removed(write, gone))  # noqa: B023  awaited in its turn

    async def _purge(self, report: Report, actor: str) -> None:
        for step in (_purge_versions, _purge_models):
            while purged := await self._database.write(step, actor=actor):
                report.add_purged(purged)

    async def _condemn(self, report: Report, grace: timedelta, actor: str) -> None:
        def step(write: Write) -> Sequence[Unused]:
            found = references.unused(write.connection, to_micros(write.now - grace), _BLOBS_A_STEP)
            references.condemn(write, found)
            for blob in found:
                write.audit(_method(write), names.blob_name(blob.sha256), {"size_bytes": blob.size_bytes})
            return found

        while found := await self._database.write(step, actor=actor):
            report.add_blobs(found)


def _purge_versions(write: Write) -> Sequence[str]:
    """Purge some versions that are past their time; their names."""
    column, used = tables.versions.c, tables.version_blobs.c
    query = sa.select(column.model, column.number, column.digest).where(column.purge_time <= to_micros(write.now))
    due = write.connection.execute(query.order_by(column.purge_time, column.revision).limit(_VERSIONS_A_STEP)).all()
    freed: dict[str, tuple[int, dict[str, int]]] = {}
    for row in due:
        mine = used.model == row.model, used.number == row.number
        sizes = sa.select(tables.blobs.c.sha256, tables.blobs.c.size_bytes).join(tables.version_blobs).where(*mine)
        count, known = freed.get(row.model, (0, {}))
        known |= {blob.sha256: blob.size_bytes for blob in write.connection.execute(sizes)}
        freed[row.model] = count + 1, known
        write.connection.execute(tables.version_blobs.delete().where(*mine))
        # What else is known of a version goes with its row.
        gone = column.model == row.model, column.number == row.number
        write.connection.execute(tables.versions.delete().where(*gone))
        write.audit(_method(write), _version_name(row.model, row.number), {"digest": row.digest})
    for model_id, (count, sizes_of) in freed.items():
        quotas.remove_versions(write, model_id, count, sizes_of)
        references.released(write, sizes_of.keys())
    return [_version_name(row.model, row.number) for row in due]


def _purge_models(write: Write) -> Sequence[str]:
    """Purge some models that are past their time; their names. Their versions went before."""
    column = tables.models.c
    left = sa.exists().where(tables.versions.c.model == column.id)
    query = sa.select(column.id).where(column.purge_time <= to_micros(write.now), ~left).order_by(column.purge_time)
    due = write.connection.execute(query.limit(_VERSIONS_A_STEP)).scalars().all()
    for model_id in due:
        moves.forget(write, model_id)
        quotas.remove_model(write, model_id)
        write.connection.execute(tables.models.delete().where(column.id == model_id))
        write.audit(_method(write), names.model_name(model_id), {})
    return [names.model_name(model_id) for model_id in due]


def _foreseen(connection: sa.Connection, now: datetime, grace: timedelta) -> Report:
    """What a run at this time would remove."""
    version, model, used = tables.versions.c, tables.models.c, tables.version_blobs.c
    report, at = Report(), to_micros(now)
    due = sa.select(version.model, version.number).where(version.purge_time <= at)
    rows = connection.execute(due.order_by(version.purge_time, version.revision))
    report.add_purged([_version_name(row.model, row.number) for row in rows])
    models = sa.select(model.id).where(model.purge_time <= at).order_by(model.purge_time)
    report.add_purged([names.model_name(model_id) for model_id in connection.execute(models).scalars()])
    found = list(references.unused(connection, to_micros(now - grace)))
    if not grace:
        # What is purged in a run is unused from then on; with no grace it goes in the same run.
        mine = sa.and_(version.model == used.model, version.number == used.number)
        dying, living = version.purge_time <= at, sa.or_(version.purge_time.is_(None), version.purge_time > at)
        released = sa.select(used.sha256).join(tables.versions, mine).where(dying)
        users = tables.version_blobs.alias()
        kept = (
            sa.exists()
            .where(users.c.sha256 == tables.blobs.c.sha256)
            .where(version.model == users.c.model, version.number == users.c.number, living)
        )
        blob = tables.blobs.c
        query = sa.select(blob.sha256, blob.location, blob.size_bytes).where(blob.sha256.in_(released), ~kept)
        found += [
            Unused(sha256=row.sha256, location=row.location, size_bytes=row.size_bytes)
            for row in connection.execute(query.order_by(blob.sha256))
        ]
    report.add_blobs(found)
    return report


def _method(write: Write) -> str:
    """What the audit log calls it: done by itself, or asked for."""
    return "Purge" if write.actor == REGISTRY else "CollectGarbage"


def _version_name(model_id: str, number: int) -> str:
    return f"{names.model_name(model_id)}/versions/{number}"
