"""Rows packed into messages: a server's cost is per message, a row more costs next to nothing."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from mlmesh_client.errors import ServerError
from mlmesh_client.messages import Inputs, Model, Result, arrays_of
from mlmesh_client.tensors import Array

ROWS_PER_MESSAGE: Final = 64
"""Most rows of a message where the caller names no number. More gain little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Rows that go together: `first` is the number of the first, `count` how many.

    A model without a batch dimension gets one row a message, as it is.
    """

    inputs: Mapping[str, Array]
    first: int
    count: int
    batched: bool


class Packer:
    """Packs rows of one shape; a row of another shape begins another message.

    Args:
        model: what the rows are for. rows_per_message: 0 for what the model takes, at most ROWS_PER_MESSAGE.
    """

    def __init__(self, model: Model, *, rows_per_message: int = 0) -> None:
        if rows_per_message < 0:
            raise ValueError(f"rows_per_message is 0 or more; got {rows_per_message}")
        self._batched = model.batches
        most = rows_per_message or min(model.rows_max or ROWS_PER_MESSAGE, ROWS_PER_MESSAGE)
        self._most = most if self._batched else 1
        self._model = model
        if self._batched:
            self._model = replace(model, inputs=tuple(replace(s, shape=s.shape[1:]) for s in model.inputs))
        self._rows: list[dict[str, Array]] = []
        self._shapes: Any = None
        self._count = 0

    def add(self, row: Inputs) -> list[Message]:
        """Take a row; the messages that are full. Raises InvalidInput for a row that the model does not take."""
        arrays = {spec.name: array for spec, array in arrays_of(self._model, row)}
        shapes = {name: array.shape for name, array in arrays.items()}
        full = self.rest() if self._rows and shapes != self._shapes else []
        self._shapes = shapes
        self._rows.append(arrays)
        if len(self._rows) >= self._most:
            full += self.rest()
        return full

    def rest(self) -> list[Message]:
        """What is left."""
        rows, self._rows = self._rows, []
        if not rows:
            return []
        first, self._count = self._count, self._count + len(rows)
        inputs = {name: np.stack([row[name] for row in rows]) for name in rows[0]} if self._batched else rows[0]
        return [Message(inputs=inputs, first=first, count=len(rows), batched=self._batched)]


def split(result: Result, message: Message) -> list[Result]:
    """A result a row, with the row's number as its id."""
    numbers = range(message.first, message.first + message.count)
    if result.error is not None or not message.batched:
        return [replace(result, id=str(number)) for number in numbers]
    for name, array in result.outputs.items():
        if array.shape[:1] != (message.count,):
            error = ServerError(
                f"output '{name}' has shape {list(array.shape)} for {message.count} rows", code="INTERNAL"
            )
            return [replace(result, id=str(number), outputs={}, error=error) for number in numbers]
    return [
        replace(result, id=str(number), outputs={name: array[place] for name, array in result.outputs.items()})
        for place, number in enumerate(numbers)
    ]


async def each(rows: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    """Rows of either kind."""
    if isinstance(rows, AsyncIterable):
        async for row in rows:
            yield row
    else:
        for row in rows:
            yield row
