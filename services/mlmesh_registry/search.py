"""Lists of versions and of models: filtered, ordered, a page at a time."""

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from mlmesh_registry import rows
from mlmesh_registry.database import Database
from mlmesh_registry.listing import Place, Plan, find, kinds_of_place, place_of, plan
from mlmesh_registry.names import model_name
from mlmesh_registry.paging import make_token, page_size, read_token
from mlmesh_registry.schema import model_schema, version_schema
from mlmesh_registry.versions import Model, Version
from mlmesh_runtime.errors import InvalidInput, NotFound

_TOKEN_CHARS_MAX = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How a list is asked for: the fields that both list requests have."""

    size: int = 0
    token: str = ""
    filter: str = ""
    order_by: str = ""
    show_deleted: bool = False


class Search:
    """Lists of versions and of models, filtered and ordered.

    Errors: InvalidInput (INVALID_FILTER; INVALID_FIELD of order_by, page_size, page_token), NotFound (MODEL_NOT_FOUND).
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list_versions(self, model_id: str | None, asked: Asked) -> tuple[Sequence[Version], str]:
        """One page of the versions of a model, or (None) of all; newest first where no order is asked for."""
        schema = version_schema(model_id)
        wanted = plan(schema, asked.filter, asked.order_by, show_deleted=asked.show_deleted)

        def transact(connection: sa.Connection) -> tuple[Sequence[Version], str]:
            if model_id is not None and rows.model(connection, model_id) is None:
                raise NotFound(f"{model_name(model_id)} not found", reason="MODEL_NOT_FOUND")
            keys, more = page(connection, f"versions of {model_id or '-'}", wanted, asked)
            found = {version.revision: version for version in rows.versions_of(connection, keys)}
            return [found[key] for key in keys], more

        return await self._database.read(transact)

    async def list_models(self, asked: Asked) -> tuple[Sequence[Model], str]:
        """One page of the models; by name where no order is asked for."""
        wanted = plan(model_schema(), asked.filter, asked.order_by, show_deleted=asked.show_deleted)

        def transact(connection: sa.Connection) -> tuple[Sequence[Model], str]:
            keys, more = page(connection, "models", wanted, asked)
            found = {model.id: model for model in rows.models_of(connection, keys)}
            return [found[key] for key in keys], more

        return await self._database.read(transact)


def page(connection: sa.Connection, name: str, wanted: Plan, asked: Asked) -> tuple[Sequence[Any], str]:
    """Keys of one page of a list, and the token of the next ("" on the last). The name tells lists apart."""
    size = page_size(asked.size)
    query = json.dumps([name, asked.filter, asked.order_by, asked.show_deleted])
    token = read_token(asked.token, query, str)
    behind = None if token is None else _place(connection, wanted, str(token[0]))
    found = find(connection, wanted, behind, size + 1)
    more = _token(query, found[size - 1]) if len(found) > size else ""
    return [place[-1] for place in found[:size]], more


def _token(query: str, place: Sequence[Place]) -> str:
    token = make_token(query, json.dumps([*place], ensure_ascii=False))
    # Long labels do not fit; the place is then looked up by its key.
    return token if len(token) <= _TOKEN_CHARS_MAX else make_token(query, json.dumps([place[-1]]))


def _place(connection: sa.Connection, wanted: Plan, text: str) -> Sequence[Place]:
    """Place of a token, which anybody may have written."""
    kinds = kinds_of_place(wanted)
    with contextlib.suppress(ValueError, RecursionError):
        place = json.loads(text)
        if isinstance(place, list) and len(place) == 1 < len(kinds) and _are(place, kinds[-1:]):
            place = place_of(connection, wanted, place[0])
        if place is not None and _are(place, kinds):
            return tuple(place)
    raise InvalidInput("page_token: not a token of this list, or its place is gone", field="page_token")


def _are(values: object, kinds: Sequence[type[Place]]) -> bool:
    """Whether these are values of these kinds that every database takes."""
    if not isinstance(values, Sequence) or [type(value) for value in values] != [*kinds]:
        return False
    for value in values:
        if isinstance(value, str) and ("\0" in value or not _encodable(value)):
            return False
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
    return True


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
