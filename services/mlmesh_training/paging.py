"""Page tokens of lists that go by a number, newest first. Pure."""

from __future__ import annotations

from mlmesh_runtime.errors import InvalidInput


def page_key(token: str) -> int | None:
    """The number in a page token, None for the first page. Errors: InvalidInput."""
    if not token:
        return None
    head, _, number = token.partition("-")
    if head != "before" or not (number.isascii() and number.isdigit()) or len(number) > 18:
        raise InvalidInput("page_token: not a token of this list; start without one", field="page_token")
    return int(number)


def page_token(key: int | None) -> str:
    """The token of the page that goes on before a number; empty for none."""
    return "" if key is None else f"before-{key}"
