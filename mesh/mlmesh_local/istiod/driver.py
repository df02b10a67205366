"""Istio's control plane in the place of ours: it is shown the world as a cluster, and every Envoy gets what it says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlmesh_local.backoff import Backoff
from mlmesh_local.changes import Changes
from mlmesh_local.istiod.adapt import adapt, detoured, listening, reported
from mlmesh_local.istiod.client import Subscription, channel_to, follow
from mlmesh_local.istiod.marker import marker, take
from mlmesh_local.istiod.nodes import Node, default_config, node_of, pod_labels
from mlmesh_local.istiod.objects import ENVOY_FILTERS, OWNED, Pod, cluster
from mlmesh_local.istiod.process import Istiod
from mlmesh_local.istiod.store import Object
from mlmesh_local.istiod.surroundings import with_surroundings
from mlmesh_local.model import ProxyNode, World
from mlmesh_local.resources.model import Deployment
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.snapshot import Snapshot, pack
from mlmesh_local.translate import View
from mlmesh_runtime.errors import MeshError, TimedOut

logger = logging.getLogger(__name__)

BORN_MAX = 86_399
WORLDS_MAX = 64
"""Versions of the world whose configuration may still be on its way."""

Deliver = Callable[[str, Snapshot], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """A state that Istio was shown; the last of a world's rounds surely has all of it."""

    world: World
    view: View
    is_last: bool


class Driver:
    """Runs subscriptions in a task group; `deliver` gets every proxy's snapshot, with the version of its world.

    driver = Driver(istiod, group, deliver=ads.update)
    driver.offer(world, resources)
    await driver.delivered(world.version, timeout_s=10.0)
    """

    def __init__(self, istiod: Istiod, group: asyncio.TaskGroup, *, deliver: Deliver) -> None:
        self._istiod = istiod
        self._group = group
        self._deliver = deliver
        self._number = 0
        self._worlds: OrderedDict[int, _Round] = OrderedDict()
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._proxies: dict[str, tuple[ProxyNode, Node]] = {}
        self._reached: dict[str, int] = {}
        self._changes = Changes()

    def offer(self, world: World, resources: ResourceSet) -> None:
        """Show a world to Istio. ``resources`` are those that were applied, without what was derived from them."""
        first = self._begin(_Round(world=world, view=View(world), is_last=False))
        objects = cluster(with_surroundings(_plain(resources), world), _pods(world))
        objects[ENVOY_FILTERS].append(first)
        self._istiod.store.replace(objects, OWNED)
        defaults = default_config(resources)
        wanted = {proxy.id: (proxy, node_of(proxy, _annotations(world, proxy), defaults)) for proxy in world.proxies}
        for name in [name for name, known in self._proxies.items() if wanted.get(name) != known]:
            # Istio knows a proxy by what it said when it connected.
            self._followers.pop(name).cancel()
            del self._proxies[name]
            self._reached.pop(name, None)
        for name in wanted.keys() - self._proxies.keys():
            self._proxies[name] = wanted[name]
            self._followers[name] = self._group.create_task(self._follow(*wanted[name]))

    async def delivered(self, version: str, *, timeout_s: float) -> None:
        """Wait until every proxy was given what Istio makes of this version, or of a later one. Raises TimedOut."""
        numbers = [number for number, one in self._worlds.items() if one.world.version == version]
        number = numbers[-1] if numbers else self._number
        try:
            async with asyncio.timeout(timeout_s):
                await self._changes.until(lambda: not self._late(number))
        except TimeoutError:
            late = ", ".join(self._late(number))
            text = f"Istio's control plane sent nothing new for {late} within {timeout_s:g} s; see {self._istiod.log}"
            raise TimedOut(text, reason="ISTIOD_SILENT") from None

    def close(self) -> None:
        """End every subscription."""
        for task in self._followers.values():
            task.cancel()
        self._followers.clear()

    def _begin(self, begun: _Round) -> Object:
        """Number a round; gives the marker that Istio's pushes then have."""
        self._number += 1
        self._worlds[self._number] = begun
        while len(self._worlds) > WORLDS_MAX:
            self._worlds.popitem(last=False)
        return marker(self._number, begun.world.root_namespace)

    def _confirm(self, number: int) -> None:
        """Mark once more when the first push has come.

        Istio reads every kind of resource on a stream of its own, so that the marker may overtake another change; it
        does not by the time that a whole push has been computed and sent.
        """
        found = self._worlds[number]
        if number == self._number and not found.is_last:
            again = self._begin(_Round(world=found.world, view=found.view, is_last=True))
            self._istiod.store.put(ENVOY_FILTERS, again)

    def _late(self, number: int) -> list[str]:
        return sorted(name for name in self._proxies if self._reached.get(name, 0) < number)

    async def _follow(self, proxy: ProxyNode, node: Node) -> None:
        backoff = Backoff(longest_s=2.0)
        while True:
            started = time.monotonic()
            subscription = Subscription(node)
            async with channel_to(self._istiod.address) as channel, asyncio.TaskGroup() as group:
                taker = group.create_task(self._take(proxy, subscription))
                await follow(channel, subscription)
                taker.cancel()
            await asyncio.sleep(backoff.next_delay_s(time.monotonic() - started))

    async def _take(self, proxy: ProxyNode, subscription: Subscription) -> None:
        seen = 0
        while True:
            try:
                await subscription.wait(after=seen, timeout_s=60.0)
            except TimedOut:
                continue
            seen = subscription.answers
            resources = {type_url: dict(found) for type_url, found in subscription.resources.items()}
            number = take(resources)
            if number not in self._worlds:
                continue
            found = self._worlds[number]
            self._confirm(number)
            # Only the last round counts as acknowledged.
            version = found.world.version if found.is_last else f"{found.world.version}-first"
            try:
                adapted = detoured(adapt(resources, listening(proxy, found.view)), found.world)
                configuration: Any = reported(adapted, found.view, proxy)
                self._deliver(proxy.id, pack(proxy.id, configuration, version))
            except MeshError as error:
                logger.warning("what Istio sent cannot be run here", extra={"node": proxy.id, "problem": error.message})
                continue
            if found.is_last:
                self._reached[proxy.id] = number
                self._changes.notify()


def _pods(world: World) -> list[Pod]:
    """Pods of the world's proxies; one is ready when any of its endpoints is, or when no Service selects it."""
    known = {endpoint.instance for endpoint in world.endpoints}
    ready = {endpoint.instance for endpoint in world.endpoints if endpoint.ready}
    return [
        Pod(
            name=proxy.id,
            namespace=proxy.namespace,
            address=proxy.pod_address,
            labels=pod_labels(proxy),
            annotations=_annotations(world, proxy),
            service_account=proxy.service_account,
            ports=proxy.container_ports,
            ready=proxy.id in ready or proxy.id not in known,
        )
        for proxy in world.proxies
    ]


def _annotations(world: World, proxy: ProxyNode) -> dict[str, str]:
    found = (one for one in world.resources.specs(Deployment) if one.meta.namespace == proxy.namespace)
    annotations = next((dict(one.annotations) for one in found if one.labels == proxy.labels), {})
    return {**annotations, "sidecar.istio.io/status": "{}"}


def _plain(resources: ResourceSet) -> list[Object]:
    """Resources as they were written, dated so that Istio knows their order: one second for each apply."""
    documents = []
    for resource in resources:
        if resource.kind == "Secret":
            # Certificates come from the laptop's control plane: nobody else has keys.
            continue
        metadata = dict(resource.plain.get("metadata") or {})
        metadata.setdefault("namespace", resource.spec.meta.namespace)
        born = min(resource.born, BORN_MAX)
        metadata.setdefault("creationTimestamp", f"2026-01-01T{born // 3600:02}:{born // 60 % 60:02}:{born % 60:02}Z")
        documents.append({**resource.plain, "metadata": metadata})
    return documents
