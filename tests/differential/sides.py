"""Both sides of a comparison: what our translator makes for Envoys, and what Istio's control plane sends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlmesh_local.envoy_types import CLUSTER
from mlmesh_local.istiod.client import Resources, subscribed
from mlmesh_local.istiod.marker import cluster_name, marker, take
from mlmesh_local.istiod.objects import ENVOY_FILTERS, OWNED, ROOT_NAMESPACE, cluster
from mlmesh_local.istiod.process import Istiod
from mlmesh_local.translate import View, translate
from tests.differential.worlds import Member, our_world

WAIT_S = 30.0
CRASH_S = 2.0


def ours(
    texts: Sequence[str],
    found: Sequence[Member],
    names: Sequence[str],
    key_sets: Mapping[str, str] | None = None,
) -> dict[str, Resources]:
    """What our translator makes for proxies."""
    world = our_world(texts, found, key_sets)
    view = View(world)
    return {proxy.id: translate(view, proxy) for proxy in world.proxies if proxy.id in names}


class Theirs:
    """Istio's control plane, given one cluster after another."""

    def __init__(self, istiod: Istiod) -> None:
        self.istiod = istiod
        self._numbers = itertools.count(1)

    @classmethod
    async def start(
        cls,
        program: Path,
        folder: Path,
        documents: Sequence[dict[str, Any]] = (),
        found: Sequence[Member] = (),
    ) -> Theirs:
        """Start it; what it keeps in memory of its first look, such as trust domains, is of this cluster."""
        istiod = Istiod(program, folder, environ={"PILOT_DEBOUNCE_AFTER": "10ms"})
        theirs = cls(istiod)
        if documents:
            theirs.give(documents, found)
        await istiod.start()
        return theirs

    async def stop(self) -> None:
        """End it."""
        await self.istiod.stop()

    async def crash(self) -> str:
        """What Istio said when it fell over, after an answer that did not come; empty while it runs."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CRASH_S):
                await self.istiod.ended()
        return self.istiod.last_words()

    def give(self, documents: Sequence[dict[str, Any]], found: Sequence[Member]) -> int:
        """Make this the cluster; returns the number of the marker that the next push has."""
        objects = cluster(documents, [member.pod for member in found])
        number = next(self._numbers)
        objects[ENVOY_FILTERS].append(marker(number, root_namespace(documents)))
        self.istiod.store.replace(objects, OWNED)
        return number

    async def ask(
        self, documents: Sequence[dict[str, Any]], found: Sequence[Member], names: Sequence[str]
    ) -> dict[str, Resources]:
        """What Istio sends to proxies.

        Istio reads every kind on a stream of its own. What comes a little later than the marker, on another stream, is
        in the same push; whoever finds a difference asks again nevertheless.
        """
        number = self.give(documents, found)
        chosen = [member for member in found if member.name in names]
        answers = await asyncio.gather(*(self._one(member, number) for member in chosen))
        return dict(zip((member.name for member in chosen), answers, strict=True))

    async def _one(self, member: Member, number: int) -> Resources:
        async with subscribed(self.istiod.address, member.node()) as subscription:
            async with asyncio.timeout(WAIT_S):
                await subscription.wait(timeout_s=WAIT_S)
                while cluster_name(number) not in subscription.resources[CLUSTER]:
                    await subscription.wait(after=subscription.answers, timeout_s=WAIT_S)
        take(subscription.resources)
        return subscription.resources


def root_namespace(documents: Sequence[dict[str, Any]]) -> str:
    """The root namespace that MeshConfig names."""
    for document in documents:
        if document.get("kind") == "ConfigMap" and document["metadata"].get("namespace") == ROOT_NAMESPACE:
            settings = yaml.safe_load(document["data"].get("mesh", "")) or {}
            return str(settings.get("rootNamespace", ROOT_NAMESPACE))
    return ROOT_NAMESPACE
