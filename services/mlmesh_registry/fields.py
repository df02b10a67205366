"""What filters compare and orders sort by: each kind of field as SQL, with bound parameters.

What holds of every field: `!=` is true where `=` is not, also where there is nothing to compare; the other comparisons
are false there. Text is compared character by character; descriptions without case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import sqlalchemy as sa

from mlmesh_registry.comparing import (
    HAS,
    Clause,
    allow,
    figure,
    integer_clause,
    start_clauses,
    text_clause,
    text_holds,
    time_clause,
)
from mlmesh_registry.filter import Restriction, Word, refuse, shown
from mlmesh_registry.sql import START_CHARS, Position, Unindexed, folded

Keys = sa.Select[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A condition on the rows of a list.

    Attributes:
        where: the condition.
        keys: keys of all rows that meet it, found by an index; None where no index tells.
    """

    where: Clause
    keys: Keys | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sort:
    """What a list is ordered by.

    Attributes:
        value: what is compared.
        kind: int, float or str.
        joined: table that has it, and which of its rows belong to a row of the list; None where the list has it itself.
        nullable: whether rows may lack it; those come last whatever the direction.
    """

    value: sa.ColumnElement[Any]
    kind: type[int] | type[float] | type[str]
    joined: tuple[sa.FromClause, Clause] | None = None
    nullable: bool = False


class Field(Protocol):
    """A field. `match` gets every operator but `!=`. Errors: InvalidInput (INVALID_FILTER)."""

    def match(self, restriction: Restriction) -> Match:
        """Give the condition that a comparison with the field is."""
        ...

    def sort(self) -> Sort | None:
        """Give what to order by, None where the field has no order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextColumn:
    """Text of the list's own table. `keys` selects keys, where an index of the column leads to them."""

    column: sa.ColumnElement[Any]
    keys: Keys | None = None

    def match(self, restriction: Restriction) -> Match:
        """See Field."""
        value = restriction.value
        exact = restriction.operator == "=" and not (value.open_start or value.open_end)
        return Match(
            where=text_clause(Unindexed(self.column), restriction),
            keys=self.keys.where(self.column == value.text) if exact and self.keys is not None else None,
        )

    def sort(self) -> Sort | None:
        """See Field."""
        return Sort(value=self.column, kind=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberColumn:
    """A whole number, or a time in microseconds, of the list's own table; see TextColumn for `keys`."""

    column: sa.Column[Any]
    time: bool = False
    keys: Keys | None = None

    def match(self, restriction: Restriction) -> Match:
        """See Field."""
        clause = time_clause if self.time else integer_clause

        def where(column: sa.ColumnElement[Any]) -> Clause:
            found = clause(column, restriction)
            return sa.and_(column.is_not(None), found) if self.column.nullable else found

        keys = None if self.keys is None else self.keys.where(where(self.column))
        return Match(where=where(Unindexed(self.column)), keys=keys)

    def sort(self) -> Sort | None:
        """See Field."""
        return Sort(value=self.column, kind=int, nullable=bool(self.column.nullable))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnumColumn:
    """One of some names."""

    column: sa.Column[Any]
    names: tuple[str, ...]
    keys: Keys | None = None

    def match(self, restriction: Restriction) -> Match:
        """See Field."""
        allow(restriction, "=", HAS)
        name = restriction.value.name
        if name not in self.names:
            refuse(restriction.value.position, f"one of {', '.join(self.names)}", shown(name))
        keys = None if self.keys is None else self.keys.where(self.column == name)
        return Match(where=Unindexed(self.column) == name, keys=keys)

    def sort(self) -> Sort | None:
        """See Field."""
        return Sort(value=self.column, kind=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Text in a table of terms: a label, or a part of the lineage.

    Attributes:
        key: of the list's rows.
        table: whose first column is that key, with `field`, `start` and `value`.
        name: its `field`.
        absent: what is compared where there is none; None: nothing is, and has (:) compares the value, as of a map.
    """

    key: sa.Column[Any]
    table: sa.Table
    name: str
    absent: str | None = None

    def match(self, restriction: Restriction) -> Match:
        """See Field."""
        if restriction.operator == HAS and self.absent is None:
            restriction = replace(restriction, operator="=")
        term, other, indexed = self.table.alias(), self.table.alias(), self.table.alias()
        where: Clause = _some(*self._owned(term), *_value_clauses(term, restriction))
        if self.absent is not None and text_holds(self.absent, restriction):
            return Match(where=sa.or_(where, ~_some(*self._owned(other))))
        keys = sa.select(_owner(indexed)).where(indexed.c.field == self.name, *_value_clauses(indexed, restriction))
        return Match(where=where, keys=keys)

    def sort(self) -> Sort | None:
        """See Field."""
        term = self.table.alias()
        return Sort(value=term.c.value, kind=str, joined=(term, sa.and_(*self._owned(term))), nullable=True)

    def _owned(self, term: sa.FromClause) -> tuple[Clause, Clause]:
        return _owner(term) == self.key, term.c.field == self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """A repeated field in a table of terms, such as the parents: `lineage.parents:NAME`."""

    key: sa.Column[Any]
    table: sa.Table
    name: str

    def match(self, restriction: Restriction) -> Match:
        """See Field."""
        allow(restriction, HAS)
        return Term(key=self.key, table=self.table, name=self.name).match(restriction)

    def sort(self) -> Sort | None:
        """See Field."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A metric. `scope` is the condition that the whole list is of one model, which an index knows."""

    key: sa.Column[Any]
    table: sa.Table
    name: str
    scope: Callable[[sa.FromClause], tuple[Clause, ...]]

    def match(self, restriction: Restriction) -> Match:
        """See Field."""
        metric, indexed = self.table.alias(), self.table.alias()
        where = _some(metric.c.revision == self.key, metric.c.name == self.name, self.compared(metric, restriction))
        keys = sa.select(indexed.c.revision).where(
            *self.scope(indexed), indexed.c.name == self.name, self.compared(indexed, restriction)
        )
        return Match(where=where, keys=keys)

    def compared(self, metric: sa.FromClause, restriction: Restriction) -> Clause:
        """Give the condition on a row of the metrics that is of this one."""
        if restriction.operator == HAS and restriction.value.anything:
            return sa.true()
        return figure(metric.c.value, restriction)

    def sort(self) -> Sort | None:
        """See Field."""
        metric = self.table.alias()
        owned = sa.and_(metric.c.revision == self.key, metric.c.name == self.name)
        return Sort(value=metric.c.value, kind=float, joined=(metric, owned), nullable=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamesOf:
    """A map as a whole: `labels:team` is true where it has the key.

    Attributes:
        key: of the list's rows.
        table: whose first column is that key.
        column: of the table, with the names.
        prefix: what stands before a name there.
    """

    key: sa.Column[Any]
    table: sa.Table
    column: str
    prefix: str = ""

    def match(self, restriction: Restriction) -> Match:
        """See Field."""
        allow(restriction, HAS)
        row, indexed = self.table.alias(), self.table.alias()
        if restriction.value.anything:
            named = sa.func.substr(row.c[self.column], 1, len(self.prefix)) == self.prefix
            return Match(where=_some(_owner(row) == self.key, named))
        name = self.prefix + restriction.value.name
        return Match(
            where=_some(_owner(row) == self.key, row.c[self.column] == name),
            keys=sa.select(_owner(indexed)).where(indexed.c[self.column] == name),
        )

    def sort(self) -> Sort | None:
        """See Field."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Aliases:
    """Aliases of a version: `aliases:stable`.

    Attributes:
        versions: the list's table.
        aliases: the table of aliases.
    """

    versions: sa.Table
    aliases: sa.Table

    def match(self, restriction: Restriction) -> Match:
        """See Field."""
        allow(restriction, HAS)
        equal = replace(restriction, operator="=")
        alias, indexed, version = self.aliases.alias(), self.aliases.alias(), self.versions.alias()
        where = _some(
            alias.c.model == self.versions.c.model,
            alias.c.version == self.versions.c.number,
            text_clause(alias.c.alias, equal),
        )
        keys = (
            sa.select(version.c.revision)
            .where(version.c.model == indexed.c.model, version.c.number == indexed.c.version)
            .where(text_clause(indexed.c.alias, equal))
        )
        return Match(where=where, keys=keys)

    def sort(self) -> Sort | None:
        """See Field."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prose:
    """A description, compared without case. `also` are columns that a word alone is looked for in, too."""

    key: sa.Column[Any]
    table: sa.Table
    also: tuple[sa.Column[Any], ...] = field(default=())

    def match(self, restriction: Restriction) -> Match:
        """See Field."""
        value = replace(restriction.value, text=folded(restriction.value.text))
        restriction = replace(restriction, value=value)
        row, other = self.table.alias(), self.table.alias()
        where: Clause = _some(_owner(row) == self.key, text_clause(row.c.folded, restriction))
        if text_holds("", restriction):
            where = sa.or_(where, ~_some(_owner(other) == self.key))
        return Match(where=where)

    def word(self, word: Word) -> Match:
        """Give the condition that a word stands in it, or in one of the other columns."""
        text = folded(word.value.text)
        if not text:
            return Match(where=sa.true())
        row = self.table.alias()
        inside = _some(_owner(row) == self.key, Position(row.c.folded, sa.literal(text)) > 0)
        return Match(where=sa.or_(inside, *(Position(Unindexed(c), sa.literal(text)) > 0 for c in self.also)))

    def sort(self) -> Sort | None:
        """See Field."""
        return None


def _value_clauses(term: sa.FromClause, restriction: Restriction) -> Sequence[Clause]:
    """Conditions on the value of a term; the start of a short one is all of it, and needs no row behind the index."""
    starts, value = start_clauses(term.c.start, restriction), restriction.value
    exact = restriction.operator == "=" and not (value.open_start or value.open_end)
    if exact and len(value.text) < START_CHARS:
        return starts
    return *starts, text_clause(term.c.value, restriction)


def _some(*where: Clause) -> Clause:
    """Whether some row meets this, looked up for one row of the list at a time.

    The offset keeps PostgreSQL from joining whole tables instead: it takes conditions for independent of the order, and
    so for quicker to find out for all rows at once, where a page is full after a few.
    """
    found: Clause = sa.select(sa.literal(1)).where(*where).offset(0).exists()
    return found


def _owner(rows: sa.FromClause) -> sa.ColumnElement[Any]:
    return next(iter(rows.c))
