"""Comparisons of a column with what a filter says, as SQL. Errors: InvalidInput (INVALID_FILTER)."""

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from mlmesh_registry.events import to_micros
from mlmesh_registry.filter import Literal, Restriction, refuse, shown
from mlmesh_registry.sql import START_CHARS, Position, after_all

Clause = sa.ColumnElement[bool]
Column = sa.ColumnElement[Any]

HAS = ":"
_INT64 = 2**63
_INTEGER = re.compile(r"[+-]?\d{1,19}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_TIME = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII
)
_ORDERINGS: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": lambda left, right: left < right,
    "<=": lambda left, right: left <= right,
    ">": lambda left, right: left > right,
    ">=": lambda left, right: left >= right,
    "=": lambda left, right: left == right,
    HAS: lambda left, right: left == right,
}


def allow(restriction: Restriction, *operators: str) -> None:
    """Refuse a comparison that the field does not have; `!=` comes as `=`."""
    if restriction.operator not in operators:
        spelled = ["= or !=" if operator == "=" else ": (has)" for operator in operators]
        refuse(restriction.position, f"{' or '.join(spelled)} behind {shown(restriction.field)}", restriction.operator)


def text_clause(text: Column, restriction: Restriction) -> Clause:
    """Text: = with stars at the ends, orderings, and : for what it holds (a lone star: for anything)."""
    value = restriction.value
    if restriction.operator == "=":
        return _same(text, value)
    if restriction.operator == HAS:
        if value.anything:
            return text != ""
        return Position(text, sa.literal(value.text)) > 0 if value.text else sa.true()
    _closed(value, restriction.operator)
    found: Clause = _ORDERINGS[restriction.operator](text, value.text)
    return found


def text_holds(text: str, restriction: Restriction) -> bool:
    """Say what text_clause would, of text at hand."""
    value = restriction.value
    if restriction.operator == "=":
        if value.open_start and value.open_end:
            return value.text in text
        if value.open_start:
            return text.endswith(value.text)
        return text.startswith(value.text) if value.open_end else text == value.text
    if restriction.operator == HAS:
        return bool(text) if value.anything else value.text in text
    return bool(_ORDERINGS[restriction.operator](text, value.text))


def start_clauses(start: Column, restriction: Restriction) -> tuple[Clause, ...]:
    """What text_clause implies of the start of a text, for its index."""
    value, operator = restriction.value, restriction.operator
    known = value.text[:START_CHARS]
    if operator == "=":
        if value.open_start:
            return ()
        if value.open_end:
            behind = after_all(known)
            return (start >= known,) if behind is None else (start >= known, start < behind)
        return (start == known,)
    if operator == HAS:
        return ()
    return (start <= known,) if operator in ("<", "<=") else (start >= known,)


def figure(column: Column, restriction: Restriction) -> Clause:
    """Compare with a finite number."""
    value = restriction.value
    number = float(value.name) if _NUMBER.fullmatch(value.name) else math.inf
    if not math.isfinite(number):
        refuse(value.position, "a number", shown(value.name))
    found: Clause = _ORDERINGS[restriction.operator](column, number)
    return found


def integer_clause(column: Column, restriction: Restriction) -> Clause:
    """Compare with a whole number of 64 bits."""
    value = restriction.value
    if restriction.operator == HAS and value.anything:
        return sa.true()
    if not _INTEGER.fullmatch(value.name) or not -_INT64 <= int(value.name) < _INT64:
        refuse(value.position, "a whole number", shown(value.name))
    found: Clause = _ORDERINGS[restriction.operator](column, int(value.name))
    return found


def time_clause(column: Column, restriction: Restriction) -> Clause:
    """Compare microseconds with an RFC 3339 time; what it says beyond microseconds counts, too."""
    value, operator = restriction.value, restriction.operator
    if operator == HAS and value.anything:
        return sa.true()
    micros, exact = _micros(value)
    if operator in ("=", HAS):
        return column == micros if exact else sa.false()
    if operator in ("<", ">="):
        micros += not exact
    found: Clause = _ORDERINGS[operator](column, micros)
    return found


def _same(text: Column, value: Literal) -> Clause:
    known, size = value.text, len(value.text)
    if value.open_start and value.open_end:
        return Position(text, sa.literal(known)) > 0 if known else sa.true()
    if value.open_start:
        length = sa.func.length(text)
        return sa.and_(length >= size, sa.func.substr(text, length - size + 1) == known)
    return sa.func.substr(text, 1, size) == known if value.open_end else text == known


def _closed(value: Literal, operator: str) -> None:
    if value.open_start or value.open_end:
        refuse(value.position, f"a value without * behind {operator}", shown(value.name))


def _micros(value: Literal) -> tuple[int, bool]:
    """Microseconds since the epoch, rounded down, and whether that is all."""
    found = _TIME.fullmatch(value.name)
    try:
        if found is None:
            raise ValueError(value.name)
        time = datetime(*map(int, found.groups()[:6]), tzinfo=UTC)  # type: ignore[misc, arg-type]
        hours, minutes = int(found[9] or 0), int(found[10] or 0)
        if hours > 23 or minutes > 59:
            raise ValueError(value.name)
        east = timedelta(hours=hours, minutes=minutes) * (-1 if found[8] == "-" else 1)
        nanos = int((found[7] or "").ljust(9, "0"))
        return to_micros(time - east) + nanos // 1000, nanos % 1000 == 0
    except (ValueError, OverflowError):
        refuse(value.position, "a time such as 2026-01-31T12:00:00Z", shown(value.name))
