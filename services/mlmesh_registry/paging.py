"""Page tokens: opaque, bound to their query, and stable while things are added (keyset, not offset). Pure."""

import base64
import binascii
import hashlib
import json

from mlmesh_runtime.errors import InvalidInput

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 1000

Key = str | int


def page_size(requested: int) -> int:
    """0 means the default; more than the maximum is the maximum (google.aip.dev/158)."""
    if requested < 0:
        raise InvalidInput("page_size: negative", field="page_size")
    return min(requested or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)


def make_token(query: str, *last: Key) -> str:
    """Token of the page after the one whose last item has this key; `query` names the list and its filter."""
    body = json.dumps([_mark(query), *last], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(body).decode().rstrip("=")


def read_token(token: str, query: str, *kinds: type[Key]) -> tuple[Key, ...] | None:
    """Key of a token, None for the first page. Errors: InvalidInput for a token that this query did not make."""
    if not token:
        return None
    try:
        body = json.loads(base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True))
        mark, *last = body
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise _refused() from error
    if mark != _mark(query) or [type(key) for key in last] != list(kinds):
        raise _refused()
    if any(isinstance(key, int) and not -(2**63) <= key < 2**63 for key in last):
        raise _refused()
    return tuple(last)


def _mark(query: str) -> str:
    return hashlib.sha256(query.encode()).hexdigest()[:8]


def _refused() -> InvalidInput:
    return InvalidInput("page_token: not a token of this list; start without one", field="page_token")
