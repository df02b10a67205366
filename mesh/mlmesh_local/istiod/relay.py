"""gRPC clients without a sidecar, served by Istio's control plane: it hears what they ask, they hear what it says.

They know our control plane only, which knows who they are. Istio makes for them what it makes for every client without
a proxy (generator "grpc"), so nothing is changed on the way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

import grpc

from mlmesh_local.envoy_types import build, message_class
from mlmesh_local.istiod.client import channel_to
from mlmesh_local.istiod.nodes import Node
from mlmesh_local.proxyless.node import ProxylessNode

CLIENTS_MAX: Final = 1000
_METHOD: Final = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
_RESPONSE: Final = "envoy.service.discovery.v3.DiscoveryResponse"
_NOWHERE: Final = "127.0.0.1"
"""Address of a client: no pod's, for nothing is served there."""

Context = grpc.aio.ServicerContext[Any, Any]


class Relay:
    """Streams of clients, each with one of its own to Istio at ``address``."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._open = 0

    async def serve(self, guest: ProxylessNode, first: Any, requests: AsyncIterator[Any], context: Context) -> None:
        """Follow a client's stream until either side ends it; gRPC clients come again by themselves."""
        if self._open >= CLIENTS_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"at most {CLIENTS_MAX} clients without a sidecar")
        self._open += 1
        try:
            async with channel_to(self._address) as channel:
                call = channel.stream_stream(
                    _METHOD,
                    request_serializer=lambda message: message.SerializeToString(),
                    response_deserializer=message_class(_RESPONSE).FromString,
                )(_asked(guest, first, requests))
                async for response in call:
                    await context.write(response)
        except grpc.aio.AioRpcError as error:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE, f"Istio's control plane ended the stream: {error.details()}"
            )
        finally:
            self._open -= 1


async def _asked(guest: ProxylessNode, first: Any, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    first.node.CopyFrom(build("envoy.config.core.v3.Node", _node(guest).plain()))
    yield first
    async for request in requests:
        request.ClearField("node")
        yield request


def _node(guest: ProxylessNode) -> Node:
    return Node(
        name=guest.id.rpartition("~")[2],
        namespace=guest.namespace,
        address=_NOWHERE,
        labels=guest.labels,
        service_account=guest.service_account,
        metadata={"GENERATOR": "grpc"},
    )
