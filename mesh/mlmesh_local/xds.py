"""The control plane's gRPC side: delta ADS to every Envoy, secrets in-band, acknowledgements to those who wait.

Attach an `AdsServer` to a grpc.aio server, give it secrets and snapshots by node id, and await acknowledgements.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, cast

import grpc

from mlmesh_local.delta import DeltaStream, Request, Response
from mlmesh_local.envoy_types import message_class
from mlmesh_local.model import NodeStatus, Secret
from mlmesh_local.snapshot import Named, Snapshot, pack_secrets
from mlmesh_runtime.errors import InvalidInput, TimedOut

logger = logging.getLogger(__name__)

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
METHOD = "DeltaAggregatedResources"
_REQUEST = "envoy.service.discovery.v3.DeltaDiscoveryRequest"
_RESPONSE = "envoy.service.discovery.v3.DeltaDiscoveryResponse"
REJECTION_CHARACTERS_MAX = 2000

Authorize = Callable[[str, Mapping[str, str]], bool]
"""Whether a caller with this metadata may have the configuration, and the private key, of a node."""


class ConfigurationRejectedError(InvalidInput):
    """Envoy refused configuration; its last good one stays active. The message has Envoy's own text."""

    default_reason = "INVALID_RESOURCE"

    def __init__(self, rejections: Mapping[str, str]) -> None:
        text = "\n".join(f"{node}: Envoy refused it: {reason}" for node, reason in sorted(rejections.items()))
        super().__init__(text)
        self.rejections = dict(rejections)


class _Node:
    """One Envoy: what it shall run, and its stream while it is connected."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.secrets: Named = {}
        self.stream: DeltaStream | None = None
        self.wake = asyncio.Event()
        self.acked_version = ""
        self.rejection = ""

    def status(self) -> NodeStatus:
        return NodeStatus(
            connected=self.stream is not None,
            version=self.snapshot.version if self.snapshot else "",
            acked_version=self.acked_version,
            rejection=self.rejection,
        )


class AdsServer:
    """Configuration of every node, kept in memory. Use it from one event loop."""

    def __init__(self, *, authorize: Authorize = lambda _node_id, _metadata: True) -> None:
        self._authorize = authorize
        self._nodes: dict[str, _Node] = {}
        self._changed = asyncio.Event()

    def attach(self, server: grpc.aio.Server) -> None:
        """Serve ADS on a server that has not started yet."""
        handler = grpc.stream_stream_rpc_method_handler(
            self._serve,
            request_deserializer=message_class(_REQUEST).FromString,
            response_serializer=lambda message: message.SerializeToString(deterministic=True),
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))

    def update(self, node_id: str, snapshot: Snapshot) -> None:
        """Give a node a configuration, now or when it connects. The same one again changes nothing."""
        node = self._node(node_id)
        node.snapshot = snapshot
        node.rejection = ""
        if node.stream is not None:
            node.stream.set_snapshot(snapshot)
            self._note(node)
        node.wake.set()

    def set_secrets(self, node_id: str, secrets: Mapping[str, Secret]) -> None:
        """Replace all secrets of a node, by SDS name. Open connections go on with those they have."""
        node = self._node(node_id)
        node.secrets = pack_secrets(secrets)
        if node.stream is not None:
            node.stream.set_secrets(node.secrets)
            node.rejection = node.stream.rejection
        node.wake.set()

    def forget(self, node_id: str) -> None:
        """Drop a node that is gone for good. Its stream, if any, is ended."""
        node = self._nodes.pop(node_id, None)
        if node is not None:
            node.snapshot = None
            node.stream = None
            node.wake.set()
        self._notify()

    def status(self, node_id: str) -> NodeStatus:
        """What is known of a node; an unknown one is not connected."""
        node = self._nodes.get(node_id)
        return node.status() if node else NodeStatus(connected=False, version="", acked_version="", rejection="")

    def statuses(self) -> dict[str, NodeStatus]:
        """What is known of every node."""
        return {node_id: node.status() for node_id, node in self._nodes.items()}

    async def wait_acked(self, version: str, *, timeout_s: float) -> None:
        """Wait until every connected node that was given this version runs all of it.

        Raises ConfigurationRejectedError as soon as one refuses it, TimedOut that names who has not answered.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed = self._changed
                    if self._is_acked(version):
                        return
                    await changed.wait()
        except TimeoutError:
            late = ", ".join(sorted(self._late(version)))
            raise TimedOut(f"not acknowledged within {timeout_s:g} s by {late}", reason="NOT_ACKNOWLEDGED") from None

    async def wait_connected(self, node_id: str, *, timeout_s: float) -> None:
        """Wait until a node is connected and runs all of what it was given, secrets too. Raises as `wait_acked`."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed = self._changed
                    node = self._node(node_id)
                    if node.rejection:
                        raise ConfigurationRejectedError({node_id: node.rejection})
                    if node.stream is not None and node.stream.acked_version:
                        return
                    await changed.wait()
        except TimeoutError:
            raise TimedOut(f"{node_id} was not configured within {timeout_s:g} s", reason="NOT_ACKNOWLEDGED") from None

    def _is_acked(self, version: str) -> bool:
        given = {i: n for i, n in self._nodes.items() if n.stream and n.snapshot and n.snapshot.version == version}
        rejections = {node_id: node.rejection for node_id, node in given.items() if node.rejection}
        if rejections:
            raise ConfigurationRejectedError(rejections)
        return all(node.acked_version == version for node in given.values())

    def _late(self, version: str) -> list[str]:
        return [
            node_id
            for node_id, node in self._nodes.items()
            if node.stream and node.snapshot and node.snapshot.version == version and node.acked_version != version
        ]

    def _node(self, node_id: str) -> _Node:
        return self._nodes.setdefault(node_id, _Node())

    def _note(self, node: _Node) -> None:
        """Take over what a stream has learnt, and tell those who wait."""
        stream = node.stream
        if stream is None:
            return
        acked = stream.acked_version
        if acked:
            node.acked_version = acked
        if stream.rejection and stream.rejection != node.rejection:
            node.rejection = stream.rejection[:REJECTION_CHARACTERS_MAX]
            logger.warning("Envoy refused configuration: %s", node.rejection)
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _serve(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        first = await anext(aiter(requests), None)
        if first is None:
            return
        node_id = first.node.id
        metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        if not node_id or not self._authorize(node_id, metadata):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this node is not known")
        node = self._node(node_id)
        stream = DeltaStream()
        stream.set_secrets(node.secrets)
        if node.snapshot is not None:
            stream.set_snapshot(node.snapshot)
        # A reconnection replaces the stream before; the old one notices and ends.
        node.stream = stream
        node.acked_version = ""
        node.wake.set()
        stream.receive(_request(first))
        logger.info("Envoy connected", extra={"node": node_id})
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(requests, node, stream))
                await self._write(context, node, stream, reader)
                reader.cancel()
        finally:
            if node.stream is stream:
                node.stream = None
            self._notify()
            logger.info("Envoy disconnected", extra={"node": node_id})

    async def _read(self, requests: AsyncIterator[Any], node: _Node, stream: DeltaStream) -> None:
        async for message in requests:
            stream.receive(_request(message))
            if node.stream is stream:
                self._note(node)
            node.wake.set()
        node.wake.set()

    async def _write(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        node: _Node,
        stream: DeltaStream,
        reader: asyncio.Task[None],
    ) -> None:
        while node.stream is stream and not reader.done():
            node.wake.clear()
            for response in stream.poll():
                await context.write(_response(response))
            self._note(node)
            await node.wake.wait()


def _request(message: Any) -> Request:
    error = message.error_detail.message if message.HasField("error_detail") else ""
    return Request(
        type_url=message.type_url,
        subscribe=tuple(name for name in message.resource_names_subscribe if name != "*"),
        unsubscribe=tuple(message.resource_names_unsubscribe),
        known=dict(message.initial_resource_versions),
        nonce=message.response_nonce,
        error=error or ("refused without a reason" if message.HasField("error_detail") else ""),
    )


def _response(response: Response) -> Any:
    message = cast("Any", message_class(_RESPONSE)())
    message.type_url = response.type_url
    message.nonce = response.nonce
    message.system_version_info = response.nonce
    message.removed_resources.extend(response.removed)
    for packed in response.resources:
        resource = message.resources.add()
        resource.name = packed.name
        resource.version = packed.version
        resource.resource.type_url = response.type_url
        resource.resource.value = packed.content
    return message
