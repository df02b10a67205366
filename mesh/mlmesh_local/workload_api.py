"""The SPIFFE Workload API: identities from another issuer, such as SPIRE, over gRPC on a Unix socket.

Messages and numbers are those of the standard (https://github.com/spiffe/spiffe/blob/main/standards/
SPIFFE_Workload_API.md, its workload.proto is Apache-2.0): only what is used is described here, in a pool of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool

from mlmesh_local.svids import ForeignIssuer, Svid
from mlmesh_runtime.errors import InvalidInput

logger = logging.getLogger(__name__)

METHOD = "/SpiffeWorkloadAPI/FetchX509SVID"
# The header keeps web pages and the like, which cannot set it, from asking (standard, section 5).
METADATA = (("workload.spiffe.io", "true"),)
RETRY_S = 1.0
RETRY_MAX_S = 30.0
_Field = descriptor_pb2.FieldDescriptorProto


@functools.cache
def message(name: str) -> Any:
    """Class of a message: X509SVIDRequest, X509SVIDResponse, X509SVID."""
    pool = DescriptorPool()
    file = descriptor_pb2.FileDescriptorProto(name="workload.proto", syntax="proto3")
    file.message_type.add(name="X509SVIDRequest")
    svid = file.message_type.add(name="X509SVID")
    kinds = {"spiffe_id": _Field.TYPE_STRING, "hint": _Field.TYPE_STRING}
    for number, field in enumerate(("spiffe_id", "x509_svid", "x509_svid_key", "bundle", "hint"), 1):
        kind = kinds.get(field, _Field.TYPE_BYTES)
        svid.field.add(name=field, number=number, type=kind, label=_Field.LABEL_OPTIONAL)
    response = file.message_type.add(name="X509SVIDResponse")
    response.field.add(
        name="svids", number=1, type=_Field.TYPE_MESSAGE, label=_Field.LABEL_REPEATED, type_name=".X509SVID"
    )
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def target(socket: str) -> str:
    """gRPC target of SPIFFE_ENDPOINT_SOCKET: "unix:///path" or "tcp://ADDRESS:PORT". Raises InvalidInput."""
    scheme, _, rest = socket.partition(":")
    if scheme == "unix" and rest.startswith("/"):
        return f"unix:{'/' + rest.lstrip('/')}"
    if scheme == "tcp" and rest.startswith("//"):
        return rest.removeprefix("//")
    raise InvalidInput(
        f'{socket!r} is not an address of a SPIFFE Workload API: write "unix:///run/spire/agent.sock"',
        field="spiffe_endpoint_socket",
    )


async def obtain(socket: str, issuer: ForeignIssuer, identities: Sequence[str], *, timeout_s: float) -> None:
    """Wait until the issuer has these identities. Raises WrongState that tells how to register those it has not."""
    target(socket)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await _follow(socket, issuer.take, lambda: not issuer.missing(identities))
    issuer.check(identities)


async def follow(socket: str, issuer: ForeignIssuer) -> None:
    """Give the issuer every set of identities that the API sends, for ever; a lost connection is made again."""
    await _follow(socket, issuer.take, lambda: False)


async def _follow(socket: str, take: Callable[[list[Svid]], None], is_enough: Callable[[], bool]) -> None:
    delay_s = RETRY_S
    while True:
        try:
            async for svids in _updates(socket):
                delay_s = RETRY_S
                take(svids)
                if is_enough():
                    return
        except grpc.aio.AioRpcError as error:
            # PERMISSION_DENIED: no identity is registered for this process yet.
            logger.warning("no identities from the SPIFFE Workload API", extra={"problem": error.details()})
        await asyncio.sleep(delay_s)
        delay_s = min(2 * delay_s, RETRY_MAX_S)


async def _updates(socket: str) -> AsyncIterator[list[Svid]]:
    async with grpc.aio.insecure_channel(target(socket)) as channel:
        call = channel.unary_stream(
            METHOD,
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=message("X509SVIDResponse").FromString,
        )(message("X509SVIDRequest")(), metadata=METADATA)
        async for response in call:
            yield [
                Svid(identity=item.spiffe_id, chain=item.x509_svid, key=item.x509_svid_key, bundle=item.bundle)
                for item in response.svids
            ]
