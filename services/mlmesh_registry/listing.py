"""Pages of a list by filter and order, in time that grows with the page and not with the list.

A page is found by its keys first; rows are read for those alone. Where a condition of the filter names few rows of an
index, these are looked at and no others; else the list is read in its order until the page is full. SQLite has no
statistics to choose by, so what is few is counted, up to a bound.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import filter as language
from mlmesh_registry.comparing import Clause
from mlmesh_registry.fields import Figure, Keys, Sort
from mlmesh_registry.filter import Expression, Not, Restriction, Word, refuse, shown
from mlmesh_registry.ordering import Order, parse_order, wrong_order
from mlmesh_registry.schema import Schema
from mlmesh_registry.sql import Unindexed

FEW_KEYS = 2000
"""Most rows of an index that are worth looking at one by one and sorting."""
_VERY_FEW_KEYS = 100

Place = int | float | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Either:
    """Rows that some of the parts names."""

    parts: tuple["Source", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Each:
    """Rows that all of the parts name."""

    parts: tuple["Source", ...]


Source = Keys | Either | Each


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A filter and an order, understood. Errors of neither come later."""

    schema: Schema
    where: tuple[Clause, ...]
    source: Source | None
    required: tuple[Restriction, ...]
    orders: tuple[tuple[Order, Sort], ...]
    best: Figure | None
    live: bool


def plan(schema: Schema, filter_text: str, order_text: str, *, show_deleted: bool) -> Plan:
    """Understand what is asked for. Errors: InvalidInput (INVALID_FILTER, INVALID_FIELD of order_by)."""
    expression = language.parse(filter_text)
    where, source = (None, None) if expression is None else _matched(schema, expression)
    orders = tuple((order, _sort(schema, order)) for order in parse_order(order_text))
    first = schema.field(orders[0][0].path) if orders else None
    return Plan(
        schema=schema,
        where=() if where is None else (where,),
        source=source,
        required=tuple(_required(expression)),
        orders=orders,
        best=first if isinstance(first, Figure) else None,
        live=not show_deleted,
    )


def _matched(schema: Schema, expression: Expression) -> tuple[Clause, Source | None]:
    match expression:
        case Word():
            found = schema.prose.word(expression)
            return found.where, found.keys
        case Restriction():
            return _restricted(schema, expression)
        case Not():
            return sa.not_(_matched(schema, expression.part)[0]), None
        case language.All():
            parts = [_matched(schema, part) for part in expression.parts]
            sources = tuple(source for _, source in parts if source is not None)
            return sa.and_(*(where for where, _ in parts)), Each(parts=sources) if sources else None
        case language.Any():
            parts = [_matched(schema, part) for part in expression.parts]
            sources = tuple(source for _, source in parts if source is not None)
            whole = len(sources) == len(parts)
            return sa.or_(*(where for where, _ in parts)), Either(parts=sources) if whole else None


def _restricted(schema: Schema, restriction: Restriction) -> tuple[Clause, Source | None]:
    field = schema.field(restriction.path)
    if field is None:
        refuse(restriction.position, f"one of the fields {schema.names}", shown(restriction.field))
    if restriction.operator == "!=":
        return sa.not_(field.match(replace(restriction, operator="=")).where), None
    found = field.match(restriction)
    return found.where, found.keys


def _required(expression: Expression | None) -> Iterator[Restriction]:
    """Comparisons that every row must meet."""
    if isinstance(expression, Restriction) and expression.operator != "!=":
        yield expression
    elif isinstance(expression, language.All):
        for part in expression.parts:
            yield from _required(part)


def _sort(schema: Schema, order: Order) -> Sort:
    field = schema.field(order.path)
    sort = field.sort() if field is not None else None
    if sort is None:
        raise wrong_order(f"{shown('.'.join(order.path))} is no field to order by")
    return sort


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One column of an order; the last is the key."""

    value: sa.ColumnElement[Any]
    kind: type[int] | type[float] | type[str]
    descending: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One part of a list, which comes whole before the next.

    Attributes:
        query: its rows; the columns are those of the steps.
        steps: the order in it.
        prefix: what a place in it begins with, before the values of the steps; the parts are in order of it.
    """

    query: sa.Select[Any]
    steps: tuple[Step, ...]
    prefix: tuple[Place, ...] = ()

    def page(self, place: Sequence[Place] | None, limit: int) -> sa.Select[Any] | None:
        """Select at most `limit` rows behind a place (None: from the start), in order; None where none can be."""
        query = self.query
        if place is not None:
            begin = tuple(place[: len(self.prefix)])
            if self.prefix < begin:
                return None
            if self.prefix == begin:
                query = query.where(*_behind(self.steps, place[len(self.prefix) :]))
        return query.order_by(*(s.value.desc() if s.descending else s.value.asc() for s in self.steps)).limit(limit)


def find(
    connection: sa.Connection, asked: Plan, place: Sequence[Place] | None, limit: int
) -> Sequence[Sequence[Place]]:
    """Places of at most `limit` rows behind a place (None: from the start), in order. A place ends with the key."""
    few = few_keys(connection, asked.source)
    found: list[Sequence[Place]] = []
    for phase in phases(asked, few):
        query = phase.page(place, limit - len(found)) if len(found) < limit else None
        if query is not None:
            found += [(*phase.prefix, *row) for row in connection.execute(query)]
    return found


def place_of(connection: sa.Connection, asked: Plan, key: Place) -> Sequence[Place] | None:
    """Place of a row by its key, None where it is gone."""
    whole = _by_columns(replace(asked, where=(), live=False), asked.orders, None)
    row = connection.execute(whole.query.where(asked.schema.key == key)).one_or_none()
    return None if row is None else tuple(row)


def kinds_of_place(asked: Plan) -> Sequence[type[Place]]:
    """What a place consists of."""
    return [step.kind for step in _by_columns(asked, asked.orders, None).steps]


def phases(asked: Plan, few: Sequence[Keys] | None) -> Sequence[Phase]:
    """Parts of the list; `few` selects the only keys worth looking at."""
    if asked.best is None or few is not None:
        return [_by_columns(asked, asked.orders, few)]
    return [_with_figure(asked, asked.best), *_without_figure(asked, asked.best)]


def few_keys(connection: sa.Connection, source: Source | None) -> Sequence[Keys] | None:
    """Find the only keys worth looking at; None where they are too many, or no index tells."""
    found = None if source is None else _counted(connection, source)
    return None if found is None else found[1]


def _counted(connection: sa.Connection, source: Source) -> tuple[int, Sequence[Keys]] | None:
    if isinstance(source, Either):
        parts = []
        for part in source.parts:
            found = _counted(connection, part)
            if found is None:
                return None
            parts.append(found)
        count = sum(count for count, _ in parts)
        return None if count > FEW_KEYS else (count, [keys for _, some in parts for keys in some])
    if isinstance(source, Each):
        best: tuple[int, Sequence[Keys]] | None = None
        for part in source.parts:
            found = _counted(connection, part)
            if found is not None and (best is None or found[0] < best[0]):
                best = found
            if best is not None and best[0] <= _VERY_FEW_KEYS:
                break
        return best
    some = source.limit(FEW_KEYS + 1).subquery()
    count = connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()
    return None if count > FEW_KEYS else (count, [source])


def _by_columns(asked: Plan, orders: Sequence[tuple[Order, Sort]], few: Sequence[Keys] | None) -> Phase:
    schema = asked.schema
    source, steps = _ordered(schema.table, orders)
    steps.append(Step(value=schema.key, kind=_kind(schema.key), descending=_last_descends(asked)))
    query = sa.select(*(step.value for step in steps)).select_from(source).where(*_common(asked))
    if schema.model_id is not None:
        owner: sa.ColumnElement[Any] = schema.table.c.model
        query = query.where((owner if few is None else Unindexed(owner)) == schema.model_id)
    if few is not None:
        query = query.where(schema.key.in_(sa.union_all(*few) if len(few) > 1 else few[0]))
    return Phase(query=query, steps=tuple(steps))


def _with_figure(asked: Plan, figure: Figure) -> Phase:
    """Rows that have the metric that comes first in the order, from its index."""
    metric = figure.table.alias()
    order, _ = asked.orders[0]
    joined = metric.join(asked.schema.table, asked.schema.key == metric.c.revision)
    source, rest = _ordered(joined, asked.orders[1:])
    steps = (
        Step(value=metric.c.value, kind=float, descending=order.descending),
        *rest,
        Step(value=metric.c.revision, kind=int, descending=_last_descends(asked)),
    )
    bounds = (figure.compared(metric, each) for each in asked.required if each.path == order.path)
    query = sa.select(*(step.value for step in steps)).select_from(source).where(*_common(asked))
    query = query.where(*figure.scope(metric), metric.c.name == figure.name, *bounds)
    return Phase(query=query, steps=steps, prefix=(0,))


def _without_figure(asked: Plan, figure: Figure) -> Iterator[Phase]:
    """Rows that lack it, unless the filter asks for it."""
    if any(each.path == asked.orders[0][0].path for each in asked.required):
        return
    rest = _by_columns(asked, asked.orders[1:], None)
    metric = figure.table.alias()
    has = sa.exists().where(metric.c.revision == asked.schema.key, metric.c.name == figure.name)
    yield replace(rest, query=rest.query.where(~has), prefix=(1, 0.0))


def _common(asked: Plan) -> Iterator[Clause]:
    if asked.live:
        yield asked.schema.table.c.delete_time.is_(None)
    yield from asked.where


def _ordered(source: sa.FromClause, orders: Sequence[tuple[Order, Sort]]) -> tuple[sa.FromClause, list[Step]]:
    steps = []
    for order, sort in orders:
        value = sort.value
        if sort.joined is not None:
            source = source.outerjoin(*sort.joined)
        if sort.nullable:
            steps.append(Step(value=sa.case((value.is_(None), 1), else_=0), kind=int, descending=False))
            value = sa.func.coalesce(value, sort.kind())
        steps.append(Step(value=value, kind=sort.kind, descending=order.descending))
    return source, steps


def _last_descends(asked: Plan) -> bool:
    # The key goes the way of the field before it: an index can then be read in one direction.
    return asked.orders[-1][0].descending if asked.orders else asked.schema.newest_first


def _kind(column: sa.Column[Any]) -> type[int] | type[str]:
    return str if isinstance(column.type, sa.Text) else int


def _behind(steps: Sequence[Step], place: Sequence[Place]) -> Iterator[Clause]:
    """Rows behind a place: greater in the first column that differs. The first line is for the index."""
    yield steps[0].value <= place[0] if steps[0].descending else steps[0].value >= place[0]
    ways = []
    for position, step in enumerate(steps):
        same = (before.value == at for before, at in zip(steps[:position], place, strict=False))
        at = place[position]
        ways.append(sa.and_(*same, step.value < at if step.descending else step.value > at))
    yield sa.or_(*ways)
