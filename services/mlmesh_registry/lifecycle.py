"""Stages, deletion and return of versions and models in SQL. Nothing goes for good here; see garbage.py.

Errors: NotFound (MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND), Conflict (ETAG_MISMATCH), WrongState (VERSION_QUARANTINED,
VERSION_IN_USE, VERSION_DELETED, MODEL_NOT_EMPTY, MODEL_DELETED).
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from mlmesh_registry import rows
from mlmesh_registry.audit import REGISTRY
from mlmesh_registry.database import Database, Write
from mlmesh_registry.events import DeletedModel, DeletedVersion
from mlmesh_registry.lookups import check_etag_if_given, live_model, live_version, model_of, version_of
from mlmesh_registry.names import VersionName, blob_name
from mlmesh_registry.versions import REASON_CHARS_MAX, Model, Stage, Version, check_text
from mlmesh_runtime.errors import NotFound, WrongState

_BATCH = 500


class Lifecycle:
    """Part of SqlModelStore. `actor` is the SPIFFE id of the caller, empty outside a mesh.

    Args:
        deleted_kept: how long what is deleted can be brought back.
    """

    def __init__(self, database: Database, deleted_kept: timedelta) -> None:
        self._database = database
        self._deleted_kept = deleted_kept

    async def set_stage(self, name: VersionName, stage: Stage, *, reason: str, etag: str, actor: str) -> Version:
        """Move a version to a stage. To the stage and reason that it has is a no-op."""
        check_text(reason, "reason", REASON_CHARS_MAX)

        def transact(write: Write) -> Version:
            live_model(write.connection, name.model)
            before = live_version(write.connection, name)
            check_etag_if_given(before.name, before.etag, etag)
            if (before.stage, before.stage_reason) == (stage, reason):
                return before
            if before.corrupt_time is not None and stage != "QUARANTINED":
                text = f"{name} was quarantined for its bytes; VerifyModelVersion must find them whole first"
                raise WrongState(text, reason="VERSION_QUARANTINED")
            after = replace(before, stage=stage, stage_reason=reason, meta_revision=write.next_revision())
            rows.update_version(write, after)
            write.record(after.meta_revision, _bare(after))
            detail = {"from": before.stage, "to": stage, "reason": reason, "revision": after.meta_revision}
            write.audit("SetModelVersionStage", after.name, detail)
            return after

        return await self._database.write(transact, actor=actor)

    async def quarantine_blob(self, sha256: str, reason: str) -> Sequence[Version]:
        """Quarantine every version that uses a blob whose bytes are not those published.

        Those that are quarantined for their bytes already are left alone, so telling it again changes nothing. The
        rest is returned. Some at a time: a blob may be in 100,000 versions.
        """
        found: list[Version] = []
        after: tuple[str, int] | None = None
        while True:
            step = functools.partial(_quarantine, sha256=sha256, reason=reason, after=after)
            some, after = await self._database.write(step, actor=REGISTRY)
            found.extend(some)
            if after is None:
                return found

    async def record_verified(self, name: VersionName, *, began: datetime, actor: str) -> Version:
        """Note that all bytes of a version were read from `began` on and found whole; its stage stays.

        What was found corrupt since then is another finding, and stands.
        """

        def transact(write: Write) -> Version:
            before = version_of(write.connection, name)
            cleared = before.corrupt_time is not None and before.corrupt_time <= began
            corrupt_time = None if cleared else before.corrupt_time
            after = replace(before, verify_time=write.now, corrupt_time=corrupt_time)
            rows.verified(write, after)
            write.audit("VerifyModelVersion", after.name, {"digest": after.digest, "whole": True})
            return after

        return await self._database.write(transact, actor=actor)

    async def delete_version(self, name: VersionName, *, etag: str, actor: str) -> Version:
        """Hide a version. One that is deleted stays as it is."""

        def transact(write: Write) -> Version:
            model_of(write.connection, name.model)
            before = version_of(write.connection, name)
            check_etag_if_given(before.name, before.etag, etag)
            if before.delete_time is not None:
                return before
            if before.aliases:
                users = ", ".join(f"models/{name.model}/aliases/{alias}" for alias in before.aliases)
                raise WrongState(f"{name} is pointed at by {users}", reason="VERSION_IN_USE")
            after = replace(
                before,
                meta_revision=write.next_revision(),
                delete_time=write.now,
                purge_time=write.now + self._deleted_kept,
            )
            rows.update_version(write, after)
            write.record(after.meta_revision, _deleted(after))
            write.audit("DeleteModelVersion", after.name, {"digest": after.digest, "revision": after.meta_revision})
            return after

        return await self._database.write(transact, actor=actor)

    async def undelete_version(self, name: VersionName, *, actor: str) -> Version:
        """Bring a version back. One that is not deleted stays as it is."""

        def transact(write: Write) -> Version:
            live_model(write.connection, name.model)
            before = version_of(write.connection, name)
            if before.purge_time is None:
                return before
            if before.purge_time <= write.now:
                raise NotFound(f"{name} is past its purge_time", reason="MODEL_VERSION_NOT_FOUND")
            after = replace(before, meta_revision=write.next_revision(), delete_time=None, purge_time=None)
            rows.update_version(write, after)
            write.record(after.meta_revision, _bare(after))
            write.audit("UndeleteModelVersion", after.name, {"digest": after.digest, "revision": after.meta_revision})
            return after

        return await self._database.write(transact, actor=actor)

    async def delete_model(self, model_id: str, *, etag: str, force: bool, actor: str) -> Model:
        """Hide a model, with force also its versions. One that is deleted stays as it is."""

        def transact(write: Write) -> Model:
            before = model_of(write.connection, model_id)
            check_etag_if_given(before.name, before.etag, etag)
            if before.delete_time is not None:
                return before
            if taken := rows.aliases(write.connection, model_id, None, 1):
                raise WrongState(f"{taken[0].name} points into it; delete its aliases first", reason="MODEL_NOT_EMPTY")
            versions = rows.live_versions(write.connection, model_id, 1 if not force else None)
            if versions and not force:
                raise WrongState(f"{before.name} has versions; force takes them along", reason="MODEL_NOT_EMPTY")
            purge_time = write.now + self._deleted_kept
            taken_along = [
                DeletedVersion(
                    model=each.model,
                    number=each.number,
                    digest=each.digest,
                    revision=each.revision,
                    meta_revision=revision,
                    delete_time=write.now,
                    purge_time=purge_time,
                )
                for each, revision in zip(versions, write.next_revisions(len(versions)), strict=True)
            ]
            rows.delete_with_model(write, taken_along)
            write.record_all([(each.meta_revision, each) for each in taken_along])
            after = replace(before, delete_time=write.now, purge_time=purge_time, revision=write.next_revision())
            rows.update_model(write, after)
            write.record(after.revision, DeletedModel(model=after))
            detail = {"force": force, "versions": len(taken_along), "revision": after.revision}
            write.audit("DeleteModel", after.name, detail)
            return after

        return await self._database.write(transact, actor=actor)

    async def undelete_model(self, model_id: str, *, actor: str) -> Model:
        """Bring a model back with the versions that it took along. One that is not deleted stays as it is."""

        def transact(write: Write) -> Model:
            before = model_of(write.connection, model_id)
            if before.purge_time is None:
                return before
            if before.purge_time <= write.now:
                raise NotFound(f"{before.name} is past its purge_time", reason="MODEL_NOT_FOUND")
            after = replace(before, delete_time=None, purge_time=None, revision=write.next_revision())
            rows.update_model(write, after)
            write.record(after.revision, after)
            count = 0
            while some := rows.taken_along(write.connection, model_id, _BATCH):
                back = [
                    replace(each, meta_revision=revision, delete_time=None, purge_time=None)
                    for each, revision in zip(some, write.next_revisions(len(some)), strict=True)
                ]
                rows.undelete_with_model(write, back)
                write.record_all([(each.meta_revision, _bare(each)) for each in back])
                count += len(back)
            write.audit("UndeleteModel", after.name, {"versions": count, "revision": after.revision})
            return after

        return await self._database.write(transact, actor=actor)


def _quarantine(
    write: Write, *, sha256: str, reason: str, after: tuple[str, int] | None
) -> tuple[Sequence[Version], tuple[str, int] | None]:
    """One step: the versions that it changed, and behind which the next begins; None when there is none."""
    users = rows.versions_with(write.connection, sha256, after, _BATCH)
    found = [user for user in users if user.corrupt_time is None]
    served = [user for user in found if user.stage != "QUARANTINED"]
    revisions = dict(zip((user.revision for user in served), write.next_revisions(len(served)), strict=True))
    changed = [
        replace(user, corrupt_time=write.now, stage="QUARANTINED", stage_reason=reason, meta_revision=revision)
        if (revision := revisions.get(user.revision))
        else replace(user, corrupt_time=write.now)
        for user in found
    ]
    rows.quarantine(write, changed)
    told = [user for user in changed if user.revision in revisions]
    # To those who follow, a deleted version is gone; its return will tell the stage.
    write.record_all([(user.meta_revision, _deleted(user) if user.delete_time else _bare(user)) for user in told])
    write.audit_all(
        [
            (
                "Quarantine",
                now.name,
                {"blob": blob_name(sha256), "from": was.stage, "reason": reason, "revision": now.meta_revision},
            )
            for was, now in zip(found, changed, strict=True)
        ]
    )
    return changed, (users[-1].model, users[-1].number) if len(users) == _BATCH else None


def _bare(version: Version) -> Version:
    """As the log keeps it: aliases have changes of their own."""
    return replace(version, aliases=())


def _deleted(version: Version) -> DeletedVersion:
    assert version.delete_time is not None  # noqa: S101  for the type checker
    assert version.purge_time is not None  # noqa: S101
    return DeletedVersion(
        model=version.model,
        number=version.number,
        digest=version.digest,
        revision=version.revision,
        meta_revision=version.meta_revision,
        delete_time=version.delete_time,
        purge_time=version.purge_time,
    )
