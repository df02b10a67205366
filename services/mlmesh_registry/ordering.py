"""The language of orders: AIP-132 (google.aip.dev/132) text to fields. Pure.

Fields are separated by commas, each with an optional `desc` (or `asc`): `metrics.accuracy desc, create_time`.
Errors: InvalidInput (INVALID_FIELD) for `order_by`.
"""

import re
from dataclasses import dataclass

from mlmesh_registry.filter import shown
from mlmesh_runtime.errors import InvalidInput

ORDER_CHARS_MAX = 256
ORDER_FIELDS_MAX = 4

_FIELD = re.compile(r"""\s*((?:[^\s,."]+|"[^"]*")(?:\.(?:[^\s,."]+|"[^"]*"))*)(?:\s+(\S+))?\s*""")
_PART = re.compile(r'"([^"]*)"|[^\s,."]+')


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A field to order by."""

    path: tuple[str, ...]
    descending: bool


def parse_order(text: str) -> tuple[Order, ...]:
    """Fields of an order, none of an empty one."""
    if not text.strip():
        return ()
    if len(text) > ORDER_CHARS_MAX:
        raise wrong_order(f"{len(text)} characters, at most {ORDER_CHARS_MAX}")
    found = tuple(_order(part) for part in text.split(","))
    if len(found) > ORDER_FIELDS_MAX:
        raise wrong_order(f"{len(found)} fields, at most {ORDER_FIELDS_MAX}")
    if len({order.path for order in found}) < len(found):
        raise wrong_order("the same field twice")
    return found


def wrong_order(text: str) -> InvalidInput:
    """Build the error of a wrong order."""
    return InvalidInput(f"order_by: {text}", field="order_by")


def _order(text: str) -> Order:
    found = _FIELD.fullmatch(text)
    if found is None:
        raise wrong_order(f"expected fields, each with an optional desc, separated by commas; found {shown(text)}")
    direction = found[2] or "asc"
    if direction.lower() not in ("asc", "desc"):
        raise wrong_order(f"expected asc or desc behind a field, found {shown(direction)}")
    path = tuple(part[1] if part[1] is not None else part[0] for part in _PART.finditer(found[1]))
    return Order(path=path, descending=direction.lower() == "desc")
