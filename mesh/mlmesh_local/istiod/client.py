"""A subscriber to Istio's control plane in the name of a proxy: everything that Envoy would ask for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from mlmesh_local.envoy_types import CLUSTER, ENDPOINTS, LISTENER, ROUTES, TYPE_PREFIX, Json, build, message_class
from mlmesh_local.istiod.marker import mark
from mlmesh_local.istiod.nodes import Node
from mlmesh_local.istiod.wire import decode_shared
from mlmesh_runtime.errors import TimedOut

logger = logging.getLogger(__name__)

_METHOD = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
_REQUEST = "envoy.service.discovery.v3.DiscoveryRequest"
_RESPONSE = "envoy.service.discovery.v3.DiscoveryResponse"
EXTENSION = TYPE_PREFIX + "envoy.config.core.v3.TypedExtensionConfig"
MESSAGE_BYTES_MAX = 256 * 1024 * 1024
REQUESTS_MAX = 1000
_OPTIONS = (("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.primary_user_agent", "mlmesh"))

Resources = dict[str, dict[str, Json]]
"""Resources by type URL and name."""


class Subscription:
    """What Istio says to one proxy, kept current. State of the world: every answer has all of its type."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.resources: Resources = {type_url: {} for type_url in (CLUSTER, ENDPOINTS, LISTENER, ROUTES, EXTENSION)}
        self.answers = 0
        self._wanted: dict[str, tuple[str, ...]] = {}
        self._answered: set[str] = set()
        self._floor = 0
        self._versions: dict[str, tuple[str, str]] = {}
        self._changed = asyncio.Event()
        self._requests: asyncio.Queue[Any] = asyncio.Queue(maxsize=REQUESTS_MAX)

    @property
    def is_complete(self) -> bool:
        """Whether everything that is referenced has been answered."""
        if not {CLUSTER, LISTENER} <= self._answered:
            return False
        wanted = [LISTENER, *(type_url for type_url in (ROUTES, EXTENSION) if self._wanted.get(type_url))]
        if any(self._push_of(type_url) < self._floor for type_url in wanted):
            # Istio sends a push type by type, and leaves out types that it cannot have changed: not after a new marker.
            return False
        return all(
            type_url in self._answered and set(names) <= self.resources[type_url].keys()
            for type_url, names in self._wanted.items()
            if names and type_url in (ENDPOINTS, ROUTES, EXTENSION)
        )

    def _push_of(self, type_url: str) -> int:
        """Number of the push that a type was last sent with: versions end in it."""
        number = self._versions.get(type_url, ("", ""))[0].rpartition("/")[2]
        return int(number) if number.isdigit() else 0

    async def wait(self, *, after: int = 0, timeout_s: float = 10.0) -> None:
        """Wait until more than `after` answers came and the configuration is complete. Raises TimedOut."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.answers <= after or not self.is_complete:
                    changed = self._changed
                    await changed.wait()
        except TimeoutError:
            missing = {t.rpartition(".")[2]: sorted(set(n) - self.resources[t].keys()) for t, n in self._wanted.items()}
            text = f"Istio did not configure {self.node.id} within {timeout_s:g} s; missing: {missing}"
            raise TimedOut(text, reason="ISTIOD_SILENT") from None

    async def run(self, channel: grpc.aio.Channel) -> None:
        """Follow until cancelled, or until the stream breaks: grpc.aio.AioRpcError."""
        call = channel.stream_stream(
            _METHOD,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_class(_RESPONSE).FromString,
        )(self._outgoing())
        self._ask(CLUSTER, ())
        self._ask(LISTENER, ())
        async for response in call:
            self._take(response)

    async def _outgoing(self) -> AsyncIterator[Any]:
        first = True
        while True:
            request = await self._requests.get()
            if first:
                request.node.CopyFrom(build("envoy.config.core.v3.Node", self.node.plain()))
            first = False
            yield request

    def _ask(self, type_url: str, names: Iterable[str]) -> None:
        version, nonce = self._versions.get(type_url, ("", ""))
        request: Any = message_class(_REQUEST)(
            type_url=type_url, resource_names=list(names), version_info=version, response_nonce=nonce
        )
        self._requests.put_nowait(request)

    def _take(self, response: Any) -> None:
        type_url = response.type_url
        if type_url not in self.resources:
            return
        self._versions[type_url] = (response.version_info, response.nonce)
        self._answered.add(type_url)
        self.answers += 1
        found = (decode_shared(type_url, item.value) for item in response.resources)
        named = {str(item.get("name") or item.get("cluster_name")): item for item in found}
        if type_url == CLUSTER and mark(named) != mark(self.resources[CLUSTER]):
            self._floor = self._push_of(CLUSTER)
        if type_url in (CLUSTER, LISTENER):
            self.resources[type_url] = named
        else:
            wanted = self._wanted.get(type_url, ())
            kept = {name: item for name, item in self.resources[type_url].items() if name in wanted}
            self.resources[type_url] = {**kept, **named}
        self._ask(type_url, self._wanted.get(type_url, ()))
        if type_url == CLUSTER:
            self._want(ENDPOINTS, endpoint_names(named.values()), again=True)
        elif type_url == LISTENER:
            self._want(ROUTES, route_names(named.values()), again=False)
            self._want(EXTENSION, extension_names(named.values()), again=False)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _want(self, type_url: str, names: Iterable[str], *, again: bool) -> None:
        wanted = tuple(sorted(set(names)))
        if wanted == self._wanted.get(type_url, ()) and not again:
            return
        self._wanted[type_url] = wanted
        if type_url in self._answered:
            self._answered.discard(type_url)
        for gone in self.resources[type_url].keys() - set(wanted):
            del self.resources[type_url][gone]
        if wanted:
            self._ask(type_url, wanted)
        else:
            self._answered.add(type_url)


def endpoint_names(clusters: Iterable[Json]) -> Iterator[str]:
    """Names under which clusters ask for endpoints."""
    for cluster in clusters:
        if cluster.get("type") == "EDS":
            yield cluster.get("eds_cluster_config", {}).get("service_name") or cluster["name"]


def route_names(listeners: Iterable[Json]) -> Iterator[str]:
    """Names of route configurations that connection managers ask for."""
    for value in _walk(list(listeners)):
        name = value.get("rds", {}).get("route_config_name") if isinstance(value.get("rds"), dict) else None
        if name:
            yield name


def extension_names(listeners: Iterable[Json]) -> Iterator[str]:
    """Names of filters whose configuration is discovered."""
    for value in _walk(list(listeners)):
        if isinstance(value.get("config_discovery"), dict) and "name" in value:
            yield value["name"]


def _walk(value: Any) -> Iterator[Json]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)


def channel_to(address: str) -> grpc.aio.Channel:
    """A connection to a control plane on this machine."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


@asynccontextmanager
async def subscribed(address: str, node: Node) -> AsyncIterator[Subscription]:
    """A subscription that is followed while the block runs."""
    subscription = Subscription(node)
    async with channel_to(address) as channel, asyncio.TaskGroup() as group:
        follower = group.create_task(subscription.run(channel))
        try:
            yield subscription
        finally:
            follower.cancel()


async def follow(channel: grpc.aio.Channel, subscription: Subscription) -> None:
    """Follow until the stream ends, however it does; for callers that begin again."""
    try:
        await subscription.run(channel)
    except grpc.aio.AioRpcError as error:
        logger.info("the stream of Istio's control plane ended", extra={"problem": error.details()})
