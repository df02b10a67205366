"""Where aliases pointed: one row for every move and removal, written in its transaction."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import names
from mlmesh_registry.conditions import GateResult
from mlmesh_registry.database import Write
from mlmesh_registry.events import from_micros, to_micros
from mlmesh_registry.names import AliasName
from mlmesh_registry.tables import alias_moves
from mlmesh_registry.versions import canonical

_MOVES = alias_moves.c


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasMove:
    """One move: from a version (None: the alias was new) to another (None: it was removed)."""

    model: str
    alias: str
    from_version: int | None
    to_version: int | None
    time: datetime
    actor: str
    reason: str
    revision: int
    gate_results: tuple[GateResult, ...] = ()

    @property
    def name(self) -> str:
        """Resource name of the alias."""
        return str(AliasName(model=self.model, alias=self.alias))


def insert(write: Write, move: AliasMove) -> None:
    """Add a move."""
    found = [{"gate": each.gate, "passed": each.passed, "message": each.message} for each in move.gate_results]
    write.connection.execute(
        alias_moves.insert().values(
            revision=move.revision,
            model=move.model,
            alias=move.alias,
            from_version=move.from_version,
            to_version=move.to_version,
            time=to_micros(move.time),
            actor=move.actor,
            reason=move.reason,
            gate_results=canonical(found).decode(),
        )
    )


def moves(
    connection: sa.Connection, model_id: str, alias: str | None, before: tuple[Any, ...] | None, limit: int
) -> Sequence[AliasMove]:
    """Moves of an alias, or (None) of all of a model's, newest first, older than a revision."""
    query = alias_moves.select().where(_MOVES.model == model_id).order_by(_MOVES.revision.desc()).limit(limit)
    if alias is not None:
        query = query.where(_MOVES.alias == alias)
    if before is not None:
        query = query.where(_MOVES.revision < before[0])
    return [_move(row) for row in connection.execute(query)]


def held(
    connection: sa.Connection, model_id: str, number: int, aliases: Collection[str], now: datetime
) -> Mapping[str, timedelta]:
    """For each of these aliases that points or pointed at a version: how long at most without a break."""
    query = (
        sa.select(_MOVES.alias, _MOVES.from_version, _MOVES.to_version, _MOVES.time)
        .where(_MOVES.model == model_id, _MOVES.alias.in_(aliases))
        .where(sa.or_(_MOVES.from_version == number, _MOVES.to_version == number))
        .order_by(_MOVES.revision)
    )
    since: dict[str, datetime] = {}
    longest: dict[str, timedelta] = {}
    for row in connection.execute(query) if aliases else ():
        time = from_micros(row.time)
        if row.to_version == number:
            since[row.alias] = time
        elif row.alias in since:
            longest[row.alias] = max(longest.get(row.alias, timedelta()), time - since.pop(row.alias))
    for alias, time in since.items():
        longest[alias] = max(longest.get(alias, timedelta()), now - time)
    return longest


def forget(write: Write, model_id: str) -> None:
    """Drop the history of a model that is gone: its name may come again."""
    write.connection.execute(alias_moves.delete().where(_MOVES.model == model_id))


def version_name(model_id: str, number: int | None) -> str:
    """Resource name of where a move came from or went; empty for nowhere."""
    return "" if number is None else f"{names.model_name(model_id)}/versions/{number}"


def _move(row: sa.Row[Any]) -> AliasMove:
    return AliasMove(
        model=row.model,
        alias=row.alias,
        from_version=row.from_version,
        to_version=row.to_version,
        time=from_micros(row.time),
        actor=row.actor,
        reason=row.reason,
        revision=row.revision,
        gate_results=tuple(GateResult(**found) for found in json.loads(row.gate_results)),
    )
