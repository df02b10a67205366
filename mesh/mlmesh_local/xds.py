"""The control plane's gRPC side: ADS to every Envoy and gRPC client, secrets in-band, acknowledgements to who waits.

Attach an `AdsServer` to a grpc.aio server, give it secrets and snapshots by node id, and await acknowledgements. Envoys
speak the delta protocol, clients that need no sidecar (see `mlmesh_local.proxyless`) the state-of-the-world one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from mlmesh_local import wire
from mlmesh_local.delta import DeltaStream, Response, Stream
from mlmesh_local.envoy_types import PUSH_ORDER, SECRET, message_class, plain
from mlmesh_local.model import NodeStatus, Secret
from mlmesh_local.packing import Named
from mlmesh_local.proxyless.node import ProxylessNode
from mlmesh_local.sidecar import TOKEN_HEADER
from mlmesh_local.snapshot import Snapshot, pack_secrets
from mlmesh_local.sotw import WholeStream
from mlmesh_runtime.errors import InvalidInput, NotFound, TimedOut

logger = logging.getLogger(__name__)

SERVICE = wire.SERVICE
METHOD = wire.DELTA_METHOD
REJECTION_CHARACTERS_MAX = 2000
GUESTS_MAX = 1000

Context = grpc.aio.ServicerContext[Any, Any]
Authorize = Callable[[str, Mapping[str, str]], bool]
"""Whether a caller with this metadata may have the configuration, and the private key, of a node."""


class ConfigurationRejectedError(InvalidInput):
    """Envoy refused configuration; its last good one stays active. The message has Envoy's own text."""

    default_reason = "INVALID_RESOURCE"

    def __init__(self, rejections: Mapping[str, str]) -> None:
        text = "\n".join(f"{node}: Envoy refused it: {reason}" for node, reason in sorted(rejections.items()))
        super().__init__(text)
        self.rejections = dict(rejections)


@dataclass(frozen=True, slots=True, kw_only=True)
class SentResource:
    """One resource as the control plane has it for a node. ``content`` is empty for secrets: they hold private keys."""

    type_url: str
    name: str
    version: str
    size: int
    content: bytes
    """Serialized message of the type."""
    acked: bool
    """Whether the node runs this version of it."""


class Guests(Protocol):
    """Who makes configuration for clients that come and go by themselves."""

    def snapshot_of(self, node: ProxylessNode) -> Snapshot:
        """What a client is told now; `AdsServer.update_guests` when that changes."""


class GuestRelay(Protocol):
    """Serves the stream of a client without a sidecar that proved who it is."""

    async def serve(self, guest: ProxylessNode, first: Any, requests: AsyncIterator[Any], context: Context) -> None:
        """Until it ends; ``first`` is the first of its requests."""


class _Node:
    """One Envoy: what it shall run, and its stream while it is connected."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.secrets: Named = {}
        self.stream: Stream | None = None
        self.guest: ProxylessNode | None = None
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
        self.hosts: Guests | None = None
        """Who makes configuration for clients without a sidecar; None refuses them."""
        self.relay: GuestRelay | None = None
        """Who serves them in the place of ``hosts``."""
        self._guest_count = 0
        self._nodes: dict[str, _Node] = {}
        self._changed = asyncio.Event()

    def attach(self, server: grpc.aio.Server) -> None:
        """Serve ADS on a server that has not started yet."""
        methods = {
            wire.DELTA_METHOD: _handler(self._serve_delta, wire.DELTA_REQUEST),
            wire.WHOLE_METHOD: _handler(self._serve_whole, wire.WHOLE_REQUEST),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    def update(self, node_id: str, snapshot: Snapshot) -> None:
        """Give a node a configuration, now or when it connects. The same one again changes nothing."""
        self._give(self._node(node_id), snapshot)

    def _give(self, node: _Node, snapshot: Snapshot) -> None:
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

    def update_guests(self, make: Callable[[ProxylessNode], Snapshot]) -> None:
        """Give every client without a sidecar what is made for it."""
        for node in self._nodes.values():
            if node.guest is not None:
                self._give(node, make(node.guest))

    def guests(self) -> list[tuple[ProxylessNode, NodeStatus]]:
        """Clients without a sidecar that are connected now, one entry a stream."""
        return [(node.guest, node.status()) for node in self._nodes.values() if node.guest is not None]

    def sent(self, node_id: str, type_url: str = "") -> tuple[SentResource, ...]:
        """What a node is told (of a type): by type in the order of sending, then by name. Raises NotFound."""
        node = self._nodes.get(node_id)
        if node is None:
            raise NotFound(f"no proxy has the node id {node_id!r}", reason="WORKLOAD_NOT_FOUND")
        return tuple(_sent(node, type_url))

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
        return {node_id: node.status() for node_id, node in self._nodes.items() if node.guest is None}

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
        # A client that refuses keeps what it has and shows it in the status; it does not hold up the mesh.
        rejections = {node_id: node.rejection for node_id, node in given.items() if node.rejection and not node.guest}
        if rejections:
            raise ConfigurationRejectedError(rejections)
        return all(node.acked_version == version or node.rejection for node in given.values())

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
            logger.warning("configuration was refused: %s", node.rejection)
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _serve_delta(self, requests: AsyncIterator[Any], context: Context) -> None:
        first = await anext(aiter(requests), None)
        if first is None:
            return
        await self._check(first.node.id, _metadata(context), context)
        speaker = Speaker(DeltaStream(), wire.delta_request, wire.delta_response)
        await self._converse(first.node.id, speaker, first, requests, context)

    async def _serve_whole(self, requests: AsyncIterator[Any], context: Context) -> None:
        first = await anext(aiter(requests), None)
        if first is None:
            return
        guest = ProxylessNode.of_bootstrap(first.node.id, plain(first.node.metadata))
        speaker = Speaker(WholeStream(), wire.whole_request, wire.whole_response)
        if guest is None:
            await self._check(first.node.id, _metadata(context), context)
            await self._converse(first.node.id, speaker, first, requests, context)
            return
        # gRPC sends no metadata of its own with this call: the token is in the bootstrap's node.
        await self._check(guest.id, {TOKEN_HEADER: guest.token}, context)
        if self.relay is not None:
            await self.relay.serve(guest, first, requests, context)
            return
        if self.hosts is None or sum(node.guest is not None for node in self._nodes.values()) >= GUESTS_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"at most {GUESTS_MAX} clients without a sidecar")
            return
        # A process opens a stream for every target that it dials: they are apart.
        self._guest_count += 1
        node_id = f"{guest.id}#{self._guest_count}"
        node = self._node(node_id)
        node.guest = guest
        try:
            node.snapshot = self.hosts.snapshot_of(guest)
            await self._converse(node_id, speaker, first, requests, context)
        finally:
            self.forget(node_id)

    async def _check(self, node_id: str, metadata: Mapping[str, str], context: Context) -> None:
        if not node_id or not self._authorize(node_id, metadata):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this node is not known")

    async def _converse(
        self,
        node_id: str,
        speaker: Speaker,
        first: Any,
        requests: AsyncIterator[Any],
        context: Context,
    ) -> None:
        node = self._node(node_id)
        stream = speaker.stream
        stream.set_secrets(node.secrets)
        if node.snapshot is not None:
            stream.set_snapshot(node.snapshot)
        # A reconnection replaces the stream before; the old one notices and ends.
        node.stream = stream
        node.acked_version = ""
        node.wake.set()
        stream.receive(speaker.request(first))
        logger.info("proxy connected", extra={"node": node_id})
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(requests, node, speaker))
                await self._write(context, node, speaker, reader)
                reader.cancel()
        finally:
            if node.stream is stream:
                node.stream = None
            self._notify()
            logger.info("proxy disconnected", extra={"node": node_id})

    async def _read(self, requests: AsyncIterator[Any], node: _Node, speaker: Speaker) -> None:
        async for message in requests:
            speaker.stream.receive(speaker.request(message))
            if node.stream is speaker.stream:
                self._note(node)
            node.wake.set()
        node.wake.set()

    async def _write(self, context: Context, node: _Node, speaker: Speaker, reader: asyncio.Task[None]) -> None:
        stream: Stream = speaker.stream
        while node.stream is stream and not reader.done():
            node.wake.clear()
            for response in stream.poll():
                await context.write(speaker.response(response))
            self._note(node)
            await node.wake.wait()


@dataclass(frozen=True, slots=True)
class Speaker:
    """A stream with its protocol."""

    stream: Any
    request: Callable[[Any], Any]
    response: Callable[[Response], Any]


def _handler(serve: Any, request: str) -> Any:
    return grpc.stream_stream_rpc_method_handler(
        serve,
        request_deserializer=message_class(request).FromString,
        response_serializer=lambda message: message.SerializeToString(deterministic=True),
    )


def _metadata(context: Context) -> dict[str, str]:
    return {str(key): str(value) for key, value in context.invocation_metadata() or ()}


def _sent(node: _Node, only: str) -> Iterator[SentResource]:
    everything: dict[str, Named] = {**node.snapshot.resources} if node.snapshot else {}
    everything[SECRET] = node.secrets
    for type_url in PUSH_ORDER:
        if only not in ("", type_url):
            continue
        had = node.stream.acknowledged(type_url) if node.stream else {}
        for name, packed in sorted(everything.get(type_url, {}).items()):
            yield SentResource(
                type_url=type_url,
                name=name,
                version=packed.version,
                size=len(packed.content),
                content=b"" if type_url == SECRET else packed.content,
                acked=had.get(name) == packed.version,
            )
