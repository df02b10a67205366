"""Both sides of a comparison: Envoy's configuration as our translator makes it, and as Istio's control plane sends it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlmesh_local.envoy_types import build, typed  # noqa: F401  (typed is used by callers)
from mlmesh_local.istiod.client import Resources, subscribed
from mlmesh_local.istiod.objects import OWNED, SERVICES, cluster
from mlmesh_local.istiod.process import Istiod
from mlmesh_local.translate import View, translate
from tests.differential.worlds import Member, our_world

MARKER_NAMESPACE = "zz-marker"
MARKER_PORT = 65535
WAIT_S = 15.0


def ours(text: str, found: Sequence[Member], names: Sequence[str]) -> dict[str, Resources]:
    """What our translator makes for proxies."""
    world = our_world(text, found)
    view = View(world)
    return {proxy.id: translate(view, proxy) for proxy in world.proxies if proxy.id in names}


class Theirs:
    """Istio's control plane, given one cluster after another."""

    def __init__(self, istiod: Istiod) -> None:
        self.istiod = istiod
        self._numbers = itertools.count(1)

    @classmethod
    async def start(cls, program: Path, folder: Path) -> Theirs:
        """Start it."""
        istiod = Istiod(program, folder)
        await istiod.start()
        return cls(istiod)

    async def stop(self) -> None:
        """End it."""
        await self.istiod.stop()

    async def give(self, documents: Sequence[dict[str, Any]], found: Sequence[Member]) -> str:
        """Make this the cluster; returns the cluster name of a marker that the next push has."""
        objects = cluster(documents, [member.pod for member in found])
        number = next(self._numbers)
        marker = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": f"m{number}", "namespace": MARKER_NAMESPACE},
            "spec": {
                "type": "ClusterIP",
                "clusterIP": "10.255.255.254",
                "ports": [{"name": "grpc", "port": MARKER_PORT}],
            },
        }
        for metadata in (marker["metadata"],):
            metadata["creationTimestamp"] = "2026-01-01T00:00:00Z"  # type: ignore[index]
        objects[SERVICES].append(marker)
        self.istiod.store.replace(objects, OWNED)
        return f"outbound|{MARKER_PORT}||m{number}.{MARKER_NAMESPACE}.svc.cluster.local"

    async def ask(
        self, documents: Sequence[dict[str, Any]], found: Sequence[Member], names: Sequence[str]
    ) -> dict[str, Resources]:
        """What Istio sends to proxies."""
        marker = await self.give(documents, found)
        chosen = [member for member in found if member.name in names]
        answers = await asyncio.gather(*(self._one(member, marker) for member in chosen))
        return dict(zip((member.name for member in chosen), answers, strict=True))

    async def _one(self, member: Member, marker: str) -> Resources:
        async with subscribed(self.istiod.address, member.node()) as subscription:
            async with asyncio.timeout(WAIT_S):
                await subscription.wait(timeout_s=WAIT_S)
                while not any(marker in found for found in subscription.resources.values()):
                    await subscription.wait(after=subscription.answers, timeout_s=WAIT_S)
        for found in subscription.resources.values():
            for name in [
                name
                for name in found
                if MARKER_NAMESPACE in name or name in (str(MARKER_PORT), f"0.0.0.0_{MARKER_PORT}")
            ]:
                del found[name]
        return subscription.resources
