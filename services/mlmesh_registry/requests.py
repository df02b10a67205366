"""Idempotency: the first answer to a request_id, kept in the transaction that it answers for."""

import json
from typing import Any

from mlmesh_registry import tables
from mlmesh_registry.database import Write
from mlmesh_registry.events import to_micros
from mlmesh_registry.versions import canonical, check_text
from mlmesh_runtime.errors import AlreadyExists

REQUEST_ID_CHARS_MAX = 128


def first_answer(write: Write, method: str, request_id: str, fingerprint: str) -> dict[str, Any] | None:
    """What was answered to this request_id of this caller and method; None when it is new (or empty).

    Errors: AlreadyExists (REQUEST_ID_REUSED) when it came with other content.
    """
    if not request_id:
        return None
    check_text(request_id, "request_id", REQUEST_ID_CHARS_MAX)
    column = tables.requests.c
    query = tables.requests.select().where(
        column.actor == write.actor, column.method == method, column.request_id == request_id
    )
    row = write.connection.execute(query).one_or_none()
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        raise AlreadyExists(f"{method}: this request_id came before with other content", reason="REQUEST_ID_REUSED")
    answer: dict[str, Any] = json.loads(row.answer)
    return answer


def remember(write: Write, method: str, request_id: str, fingerprint: str, answer: dict[str, Any]) -> None:
    """Keep the first answer; an empty request_id asks for no such promise. Replaces an answer that is void."""
    if not request_id:
        return
    forget(write, method, request_id)
    write.connection.execute(
        tables.requests.insert().values(
            actor=write.actor,
            method=method,
            request_id=request_id,
            fingerprint=fingerprint,
            answer=canonical(answer).decode(),
            time=to_micros(write.now),
        )
    )


def forget(write: Write, method: str, request_id: str) -> None:
    """Drop an answer."""
    column = tables.requests.c
    write.connection.execute(
        tables.requests.delete().where(
            column.actor == write.actor, column.method == method, column.request_id == request_id
        )
    )
