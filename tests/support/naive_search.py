"""Filters and orders as a person would explain them, over values in memory: what the SQL is compared with."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from mlmesh_registry import filter as language
from mlmesh_registry.filter import Expression, Literal, Not, Restriction, Word
from mlmesh_registry.versions import Model, Version

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    ":": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def holds(expression: Expression | None, item: Version | Model) -> bool:  # noqa: PLR0911  a table
    """Whether a filter lets something through."""
    match expression:
        case None:
            return True
        case Word(value=value):
            owner = item.id if isinstance(item, Model) else item.model
            prose = item.description if isinstance(item, Model) else item.content.description
            return any(value.text.casefold() in text for text in (prose.casefold(), owner))
        case Not(part=part):
            return not holds(part, item)
        case language.All(parts=parts):
            return all(holds(part, item) for part in parts)
        case language.Any(parts=parts):
            return any(holds(part, item) for part in parts)
        case Restriction(operator="!=") as restriction:
            equal = Restriction(path=restriction.path, operator="=", value=restriction.value)
            return not holds(equal, item)
        case Restriction():
            return _compared(expression, item)
    raise AssertionError(expression)


def _compared(restriction: Restriction, item: Version | Model) -> bool:  # noqa: PLR0911  a table
    path, value, how = restriction.path, restriction.value, restriction.operator
    found = value_of(path, item)
    if isinstance(found, (list, dict)):
        return any(_text(each, "=", value) for each in found)
    if found is None:
        return False
    if how == ":" and value.anything and path[0] in ("labels", "metrics", "verify_time"):
        return True
    if path[0] == "labels":
        return _text(found, "=" if how == ":" else how, value)
    if path == ("description",):
        return _text(found.casefold(), how, _folded(value))
    if isinstance(found, str):
        return _text(found, how, value)
    return _COMPARE[how](found, _same_kind(found, value.name))


def value_of(path: tuple[str, ...], item: Version | Model) -> Any:  # noqa: PLR0911  a table
    """The field of something, None where it lacks it; lists and maps for `has`."""
    content = item if isinstance(item, Model) else item.content
    match path:
        case ("labels", key, *rest):
            return content.labels.get(".".join([key, *rest]))
        case ("metrics", key, *rest):
            return item.content.metrics.get(".".join([key, *rest]))
        case ("labels",) | ("metrics",):
            return dict(getattr(content, path[0]))
        case ("lineage", part):
            found = getattr(item.content.lineage, part)
            return list(found) if isinstance(found, tuple) else found
        case ("artifacts", "path"):
            return [artifact.path for artifact in item.content.artifacts]
        case ("aliases",):
            return list(item.aliases)
        case ("description",):
            return content.description
        case (name,):
            return getattr(item, name)
    raise AssertionError(path)


def _text(text: str, how: str, value: Literal) -> bool:
    if how == ":":
        return bool(text) if value.anything else value.text in text
    if how == "=":
        if value.open_start and value.open_end:
            return value.text in text
        if value.open_start:
            return text.endswith(value.text)
        return text.startswith(value.text) if value.open_end else text == value.text
    return _COMPARE[how](text, value.text)


def _folded(value: Literal) -> Literal:
    return Literal(text=value.text.casefold(), open_start=value.open_start, open_end=value.open_end)


def _same_kind(found: object, text: str) -> Any:
    if isinstance(found, datetime):
        return datetime.fromisoformat(text).astimezone(UTC)
    return int(text) if isinstance(found, int) else float(text)


def ordered(items: Sequence[Any], orders: Sequence[tuple[tuple[str, ...], bool]], *, newest_first: bool) -> list[Any]:
    """Items in an order of (path, descending); what lacks the field comes last, ties by key."""
    last = orders[-1][1] if orders else newest_first

    def compare(left: Any, right: Any) -> int:
        for path, descending in orders:
            one, other = value_of(path, left), value_of(path, right)
            if path[0] == "lineage":
                one, other = one or None, other or None
            if one == other:
                continue
            if one is None or other is None:
                return 1 if one is None else -1
            return (1 if one > other else -1) * (-1 if descending else 1)
        one, other = (item.id if isinstance(item, Model) else item.revision for item in (left, right))
        return ((one > other) - (one < other)) * (-1 if last else 1)

    return sorted(items, key=functools.cmp_to_key(compare))
