"""ModelStreamInfer: requests as they come, answers in their order, errors in their place.

A reader queues requests with the batcher as they arrive; the writer sends answers in that order. At most
`IN_FLIGHT_MAX` requests of a stream are on their way, so a client that does not read holds back only its own requests.
When the server goes away the stream ends at a message boundary: what was read is answered, then UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from mlmesh_inference.catalog import Catalog
from mlmesh_inference.oip.infer import Started, shutting_down, start
from mlmesh_runtime.errors import MeshError
from mlmesh_runtime.status import InternalError
from open_inference import grpc_service_pb2 as pb

_LOG = logging.getLogger(__name__)

IN_FLIGHT_MAX: Final = 64
"""Requests of one stream between being read and being answered."""

Write = Callable[[pb.ModelStreamInferResponse], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failed:
    id: str
    model_name: str
    error: MeshError


_Item = Started | _Failed
_Queue = asyncio.Queue[_Item | MeshError | None]


async def answer(
    catalog: Catalog,
    messages: AsyncIterable[pb.ModelInferRequest],
    write: Write,
    *,
    going_away: asyncio.Event,
    grpc_errors: bool,
) -> None:
    """Answer a stream to its end.

    Args:
        write: sends one answer; waits while the client is behind.
        going_away: set when the server drains.
        grpc_errors: the first request that fails ends the stream with its status, instead of an answer in its place.
    """
    # The place of the request being answered counts too, hence one less in the queue.
    queue: _Queue = asyncio.Queue(IN_FLIGHT_MAX - 1)
    async with asyncio.TaskGroup() as group:
        reader = group.create_task(_read(catalog, messages, queue, going_away))
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, MeshError):
                    raise item
                await write(await _reply(item, grpc_errors=grpc_errors))
        finally:
            reader.cancel()
            while not queue.empty():
                _withdraw(queue.get_nowait())


async def _read(
    catalog: Catalog, messages: AsyncIterable[pb.ModelInferRequest], queue: _Queue, going_away: asyncio.Event
) -> None:
    async with asyncio.TaskGroup() as group:
        requests = group.create_task(_requests(catalog, messages, queue))
        going = group.create_task(going_away.wait())
        await asyncio.wait({requests, going}, return_when=asyncio.FIRST_COMPLETED)
        going.cancel()
        if not requests.done():
            requests.cancel()
            await asyncio.wait({requests})
            await queue.put(shutting_down())


async def _requests(catalog: Catalog, messages: AsyncIterable[pb.ModelInferRequest], queue: _Queue) -> None:
    item: _Item
    async for message in messages:
        try:
            item = start(catalog, message)
        except MeshError as error:
            item = _Failed(id=message.id, model_name=message.model_name, error=error)
        except Exception as error:
            item = _Failed(id=message.id, model_name=message.model_name, error=_unexpected(error))
        try:
            await queue.put(item)
        except asyncio.CancelledError:
            _withdraw(item)
            raise
    await queue.put(None)


def _withdraw(item: _Item | MeshError | None) -> None:
    """Tell the batcher that nobody waits; an outcome that is there already counts as seen."""
    if isinstance(item, Started) and not item.outcome.cancel() and not item.outcome.cancelled():
        item.outcome.exception()


async def _reply(item: _Item, *, grpc_errors: bool) -> pb.ModelStreamInferResponse:
    if isinstance(item, Started):
        try:
            response = pb.ModelStreamInferResponse(infer_response=await item.finish())
            response.infer_response.parameters["triton_final_response"].bool_param = True
        except MeshError as error:
            item = _Failed(id=item.id, model_name=item.model.name, error=error)
        except Exception as error:
            item = _Failed(id=item.id, model_name=item.model.name, error=_unexpected(error))
        else:
            return response
    if grpc_errors:
        raise item.error
    response = pb.ModelStreamInferResponse(error_message=item.error.message)
    response.infer_response.id = item.id
    response.infer_response.model_name = item.model_name
    response.infer_response.parameters["triton_final_response"].bool_param = True
    return response


def _unexpected(error: Exception) -> InternalError:
    fixed = InternalError.fresh()
    _LOG.error("unexpected error in a stream", exc_info=error, extra={"log_id": fixed.log_id})
    return fixed
