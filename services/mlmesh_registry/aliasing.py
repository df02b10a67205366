"""Aliases in SQL: compare-and-set, the gates in the way, and the history of every move.

Errors: NotFound (MODEL_NOT_FOUND, MODEL_VERSION_NOT_FOUND, MODEL_ALIAS_NOT_FOUND), Conflict (ETAG_MISMATCH), WrongState
(GATE_REFUSED, VERSION_QUARANTINED, VERSION_DELETED, MODEL_DELETED), InvalidInput.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from mlmesh_registry import gates, moves, rows
from mlmesh_registry.conditions import Gate, GateResult, HeldAlias, Signed
from mlmesh_registry.database import Database, Write
from mlmesh_registry.events import DeletedAlias
from mlmesh_registry.lookups import check_etag, live_model, live_version, model_of, version_of
from mlmesh_registry.moves import AliasMove
from mlmesh_registry.names import AliasName, VersionName
from mlmesh_registry.paging import make_token, page_size, read_token
from mlmesh_registry.versions import REASON_CHARS_MAX, Alias, Version, check_text
from mlmesh_runtime.errors import InvalidInput, NotFound, WrongState

KeyIds = Callable[[sa.Connection, str, int], Collection[str]]
"""Ids of the keys, trusted now, that signed a version: of a connection, a model and a number."""


def no_key_ids(_connection: sa.Connection, _model_id: str, _number: int) -> Collection[str]:
    """Trust no key."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The alias after a move, or None when a gate refused what was only asked; and what each gate found."""

    alias: Alias | None
    results: tuple[GateResult, ...] = ()


class Aliases:
    """Part of SqlModelStore. `actor` is the SPIFFE id of the caller, empty outside a mesh."""

    def __init__(self, database: Database, valid_key_ids: KeyIds) -> None:
        self._database = database
        self._valid_key_ids = valid_key_ids

    async def set_alias(
        self, name: AliasName, version: VersionName, *, etag: str, actor: str, reason: str = ""
    ) -> Alias:
        """Move an alias; see move_alias."""
        moved = await self.move_alias(name, version, etag=etag, actor=actor, reason=reason)
        assert moved.alias is not None  # noqa: S101  a refusal is raised unless only validation was asked for
        return moved.alias

    async def move_alias(
        self,
        name: AliasName,
        version: VersionName,
        *,
        etag: str,
        actor: str,
        reason: str = "",
        validate_only: bool = False,
    ) -> Moved:
        """Create (empty etag) or move an alias by compare-and-set; to where it points already is a no-op.

        With validate_only nothing moves, and a gate's refusal is an answer, not an error; the alias is then told as it
        would be, with the etag that the move needs.
        """
        if version.model != name.model:
            raise InvalidInput("version: of another model than the alias", field="version")
        check_text(reason, "reason", REASON_CHARS_MAX)

        def transact(write: Write) -> Moved:
            model = live_model(write.connection, name.model)
            before = rows.alias(write.connection, name)
            check_etag(str(name), before.etag if before else "", etag)
            candidate = version_of(write.connection, version)
            if before is not None and before.version == version.number and not validate_only:
                return Moved(alias=before)
            _check_standing(write.connection, version)
            results = self._judge(write, gates.guarding(model.gates, name.alias), candidate, before)
            refusal = gates.refusal(str(name), str(version), results)
            if refusal is not None and not validate_only:
                raise refusal
            after = Alias(
                model=name.model,
                alias=name.alias,
                version=version.number,
                update_time=write.now,
                updater=write.actor,
                revision=(before.revision if before else 0) if validate_only else write.next_revision(),
            )
            if not validate_only:
                _store(write, before, after, reason, results)
            return Moved(alias=None if refusal else after, results=results)

        return await self._database.write(transact, actor=actor)

    def _judge(
        self, write: Write, guards: Sequence[Gate], candidate: Version, before: Alias | None
    ) -> tuple[GateResult, ...]:
        """Ask every gate; only what one of them needs is looked up."""
        if not guards:
            return ()
        conditions = [gate.condition for gate in guards]
        model_id, connection = candidate.model, write.connection
        current = version_of(connection, VersionName(model=model_id, number=before.version)) if before else None
        others = {condition.alias for condition in conditions if isinstance(condition, HeldAlias)}
        signed = any(isinstance(condition, Signed) for condition in conditions)
        facts = gates.Facts(
            candidate=candidate,
            current=current,
            now=write.now,
            key_ids=frozenset(self._valid_key_ids(connection, model_id, candidate.number) if signed else ()),
            held=moves.held(connection, model_id, candidate.number, others, write.now),
        )
        return gates.evaluate(guards, facts)

    async def list_aliases(self, model_id: str | None, *, size: int, token: str) -> tuple[Sequence[Alias], str]:
        """One page by name, of a model or (None) of all."""
        query = f"aliases of {model_id or '-'}"
        size, after = page_size(size), read_token(token, query, str, str)

        def transact(connection: sa.Connection) -> Sequence[Alias]:
            if model_id is not None:
                model_of(connection, model_id)
            return rows.aliases(connection, model_id, after, size + 1)

        found = await self._database.read(transact)
        more = make_token(query, found[size - 1].model, found[size - 1].alias) if len(found) > size else ""
        return found[:size], more

    async def delete_alias(self, name: AliasName, *, etag: str, actor: str) -> None:
        """Remove an alias by compare-and-set. No gate is asked: taking away is always safe to try."""

        def transact(write: Write) -> None:
            model_of(write.connection, name.model)
            before = rows.alias(write.connection, name)
            if before is None:
                raise NotFound(f"{name} not found", reason="MODEL_ALIAS_NOT_FOUND")
            check_etag(str(name), before.etag, etag)
            rows.delete_alias(write, name)
            revision = write.next_revision()
            moves.insert(write, _move(write, name, (before.version, None), revision=revision))
            write.record(revision, DeletedAlias(model=name.model, alias=name.alias, version=before.version))
            write.audit("DeleteModelAlias", str(name), {"from": before.version_name, "revision": revision})

        await self._database.write(transact, actor=actor)

    async def list_moves(
        self, model_id: str, alias: str | None, *, size: int, token: str
    ) -> tuple[Sequence[AliasMove], str]:
        """One page of the history of an alias, or (None) of all of a model's, newest first.

        An alias that never was has no history, which is not an error: one that was removed still has its own.
        """
        query = f"moves of {model_id} {alias or '-'}"
        size, before = page_size(size), read_token(token, query, int)

        def transact(connection: sa.Connection) -> Sequence[AliasMove]:
            model_of(connection, model_id)
            return moves.moves(connection, model_id, alias, before, size + 1)

        found = await self._database.read(transact)
        more = make_token(query, found[size - 1].revision) if len(found) > size else ""
        return found[:size], more


def _check_standing(connection: sa.Connection, name: VersionName) -> None:
    """Refuse versions that nobody should serve."""
    version = live_version(connection, name)
    if version.stage == "QUARANTINED":
        why = f": {version.stage_reason}" if version.stage_reason else ""
        raise WrongState(f"{name} is quarantined{why}", reason="VERSION_QUARANTINED")


def _store(write: Write, before: Alias | None, after: Alias, reason: str, results: tuple[GateResult, ...]) -> None:
    name = AliasName(model=after.model, alias=after.alias)
    rows.put_alias(write, after)
    write.record(after.revision, after)
    between = before.version if before else None, after.version
    moves.insert(write, _move(write, name, between, revision=after.revision, reason=reason, results=results))
    write.audit(
        "SetModelAlias",
        after.name,
        {
            "from": before.version_name if before else "",
            "to": after.version_name,
            "reason": reason,
            "gates": [result.gate for result in results],
            "revision": after.revision,
        },
    )


def _move(
    write: Write,
    name: AliasName,
    between: tuple[int | None, int | None],
    *,
    revision: int,
    reason: str = "",
    results: tuple[GateResult, ...] = (),
) -> AliasMove:
    return AliasMove(
        model=name.model,
        alias=name.alias,
        from_version=between[0],
        to_version=between[1],
        time=write.now,
        actor=write.actor,
        reason=reason,
        revision=revision,
        gate_results=results,
    )
