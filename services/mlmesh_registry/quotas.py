"""How much a model, or the whole registry, may hold and holds: counted with every change, never by looking at all.

The bytes of a model are those of the distinct files of its versions; the bytes of the registry are those of every blob
that is stored. Deleted versions and models count until they are purged. Errors: Overloaded (QUOTA_EXCEEDED).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import names, tables
from mlmesh_registry.database import Write
from mlmesh_runtime.errors import InvalidInput, Overloaded

ALL = "-"
"""Scope of the whole registry; no model id looks like it."""

_QUOTAS = tables.quotas.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may be held at most; 0 is no limit. `models_max` is for the whole registry only."""

    bytes_max: int = 0
    versions_max: int = 0
    models_max: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Limits and use of a scope: a model's id, or ALL. `changes` counts changes of the limits."""

    scope: str
    limits: Limits
    bytes_used: int
    versions_used: int
    models_used: int
    changes: int

    @property
    def name(self) -> str:
        """Resource name."""
        return names.model_name(self.scope)

    @property
    def etag(self) -> str:
        """Changes with every change of the limits."""
        return f"q{self.changes}"


def check_limits(limits: Limits, scope: str) -> Limits:
    """Refuse limits that are none. Errors: InvalidInput naming the field."""
    for name in ("bytes_max", "versions_max", "models_max"):
        if not 0 <= getattr(limits, name) < 2**63:
            raise InvalidInput(f"quota.{name}: expected 0 or more", field=f"quota.{name}")
    if limits.models_max and scope != ALL:
        text = f"quota.models_max: only {names.ALL_MODELS} has models; expected 0"
        raise InvalidInput(text, field="quota.models_max")
    return limits


def find(connection: sa.Connection, scope: str) -> Quota | None:
    """Read limits and use."""
    row = connection.execute(tables.quotas.select().where(_QUOTAS.scope == scope)).one_or_none()
    if row is None:
        return None
    return Quota(
        scope=row.scope,
        limits=Limits(bytes_max=row.bytes_max, versions_max=row.versions_max, models_max=row.models_max),
        bytes_used=row.bytes_used,
        versions_used=row.versions_used,
        models_used=row.models_used,
        changes=row.changes,
    )


def put_limits(write: Write, quota: Quota, limits: Limits) -> Quota:
    """Replace limits; what is stored already stays."""
    values = {"bytes_max": limits.bytes_max, "versions_max": limits.versions_max, "models_max": limits.models_max}
    after = replace(quota, limits=limits, changes=quota.changes + 1)
    write.connection.execute(
        tables.quotas.update().where(_QUOTAS.scope == quota.scope).values(**values, changes=after.changes)
    )
    return after


def add_model(write: Write, model_id: str) -> None:
    """Count a new model, if it fits."""
    everything = _of(write.connection, ALL)
    _check(everything, "models", everything.models_used, 1, everything.limits.models_max)
    write.connection.execute(
        tables.quotas.insert().values(
            scope=model_id,
            bytes_max=0,
            versions_max=0,
            models_max=0,
            bytes_used=0,
            versions_used=0,
            models_used=0,
            changes=0,
        )
    )
    _count(write, ALL, models_used=1)


def add_version(write: Write, model_id: str, sizes: dict[str, int]) -> None:
    """Count a new version that is not stored yet, if it fits; `sizes` are those of its distinct blobs, by SHA-256."""
    mine, everything = _of(write.connection, model_id), _of(write.connection, ALL)
    for quota in (mine, everything):
        _check(quota, "versions", quota.versions_used, 1, quota.limits.versions_max)
    here = _used_by(write.connection, model_id, sizes)
    more = sum(size for sha256, size in sizes.items() if sha256 not in here)
    _check(mine, "bytes", mine.bytes_used, more, mine.limits.bytes_max)
    _count(write, model_id, bytes_used=more, versions_used=1)
    _count(write, ALL, versions_used=1)


def check_upload(write: Write, size_bytes: int) -> None:
    """Refuse an upload that the registry has no room for, together with all that are under way."""
    everything = _of(write.connection, ALL)
    if not everything.limits.bytes_max:
        return
    column = tables.uploads.c
    under_way = sa.select(sa.func.coalesce(sa.func.sum(column.size_bytes), 0)).where(column.finished.is_(False))
    announced = int(write.connection.execute(under_way).scalar_one())
    _check(everything, "bytes", everything.bytes_used + announced, size_bytes, everything.limits.bytes_max)


def add_blob(write: Write, size_bytes: int) -> None:
    """Count bytes that are stored now. They were let in when their upload began."""
    _count(write, ALL, bytes_used=size_bytes)


def remove_blobs(write: Write, size_bytes: int) -> None:
    """Count bytes that are stored no longer."""
    _count(write, ALL, bytes_used=-size_bytes)


def remove_versions(write: Write, model_id: str, count: int, sizes: dict[str, int]) -> None:
    """Count versions that are gone already, and those of their blobs that no other version of the model uses."""
    here = _used_by(write.connection, model_id, sizes)
    less = sum(size for sha256, size in sizes.items() if sha256 not in here)
    _count(write, model_id, bytes_used=-less, versions_used=-count)
    _count(write, ALL, versions_used=-count)


def remove_model(write: Write, model_id: str) -> None:
    """Count a model that is gone; its versions went before."""
    write.connection.execute(tables.quotas.delete().where(_QUOTAS.scope == model_id))
    _count(write, ALL, models_used=-1)


def _of(connection: sa.Connection, scope: str) -> Quota:
    found = find(connection, scope)
    if found is None:
        raise AssertionError(f"nothing was counted of {scope}")
    return found


def _used_by(connection: sa.Connection, model_id: str, sha256s: Iterable[str]) -> Collection[str]:
    column = tables.version_blobs.c
    wanted = sorted(sha256s)
    found: set[str] = set()
    for first in range(0, len(wanted), _IN_MAX):
        chosen = column.sha256.in_(wanted[first : first + _IN_MAX])
        query = sa.select(column.sha256).where(chosen, column.model == model_id).distinct()
        found.update(connection.execute(query).scalars())
    return found


def _count(write: Write, scope: str, **more: int) -> None:
    values: dict[str, Any] = {name: _QUOTAS[name] + count for name, count in more.items() if count}
    if values:
        write.connection.execute(tables.quotas.update().where(_QUOTAS.scope == scope).values(**values))


def _check(quota: Quota, what: str, used: int, more: int, most: int) -> None:
    if not most or used + more <= most or not more:
        return
    text = f"{quota.name}: {used} {what} of {most} are used, {more} more do not fit; see SetQuota"
    metadata = {"quota": quota.name, "limit": f"{what}_max", "max": str(most), "used": str(used), "wanted": str(more)}
    raise Overloaded(text, reason="QUOTA_EXCEEDED", metadata=metadata, retry_after_s=None)


# Databases bound the number of parameters of a statement.
_IN_MAX = 500
