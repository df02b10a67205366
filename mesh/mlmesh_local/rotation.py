"""A new root for the mesh while it works: made known to all, then used by all, and only then is the old one forgotten.

    IDLE --prepare--> DISTRIBUTING --all know it, new leaves for all--> RETIRING --all use them--> IDLE

No call fails on the way: at every moment each side trusts what the other one may show. The state is in the authority's
folder, so what a restart interrupts goes on after it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Protocol

from mlmesh_local.certificates import Certificates
from mlmesh_local.pki import Authority, Clock
from mlmesh_runtime.errors import TimedOut, WrongState

logger = logging.getLogger(__name__)

CHECK_S = 30.0
ACK_S = 30.0
ASK_S = 1.0
SETTLE_S = 1.0
"""Handshakes that began with an old certificate are over by then."""


class Nodes(Protocol):
    """Who takes certificates: the ADS server."""

    async def wait_connected(self, node_id: str, *, timeout_s: float) -> None:
        """Return when a node runs all that it was given, secrets too. Raises TimedOut."""

    def forget(self, node_id: str) -> None:
        """Drop a node that is gone."""


class RootRotation:
    """Replaces the root of an authority in a running mesh. Use it from one event loop."""

    def __init__(self, authority: Authority, certificates: Certificates, nodes: Nodes, *, clock: Clock) -> None:
        self._authority = authority
        self._certificates = certificates
        self._nodes = nodes
        self._clock = clock
        self._turn = asyncio.Lock()
        self._told = ""

    async def rotate(self, *, now: bool = False) -> AsyncIterator[str]:
        """Replace the root and tell each step.

        The old root stays trusted while certificates that it signed for tools are valid, and is retired later by `run`;
        with ``now`` those certificates stop working. Raises WrongState while another replacement is under way, TimedOut
        that names who has not taken what it was given: then the step that was reached stays, and `run` goes on.
        """
        if self._certificates.foreign is not None:
            raise WrongState(
                "identities are of another issuer (SPIFFE Workload API): replace its root there",
                reason="ROTATION_UNDER_WAY",
            )
        if self._turn.locked():
            raise WrongState("the root is being replaced already", reason="ROTATION_UNDER_WAY")
        async with self._turn:
            if self._authority.phase == "RETIRING" and not now:
                yield self._wait_text()
                raise WrongState(
                    "the root before is still trusted; wait for it, or retire it with --now",
                    reason="ROTATION_UNDER_WAY",
                )
            async for step in self._steps(now=now, begin=True):
                yield step

    async def run(self) -> None:
        """Go on with what was begun, for ever: after a restart, or when certificates of tools have expired."""
        while True:
            await self.resume()
            await asyncio.sleep(CHECK_S)

    async def resume(self) -> None:
        """Go on as far as possible now."""
        if self._authority.phase == "IDLE" or self._turn.locked():
            return
        async with self._turn:
            try:
                async for step in self._steps(now=False, begin=False):
                    if step != self._told:
                        logger.info("root rotation", extra={"step": step})
                    self._told = step
            except TimedOut as error:
                logger.warning("root rotation waits", extra={"problem": error.message})

    async def _steps(self, *, now: bool, begin: bool) -> AsyncIterator[str]:
        authority = self._authority
        if authority.phase == "IDLE" and begin:
            authority.prepare_root()
            yield "a new root is made"
        if authority.phase == "DISTRIBUTING":
            self._certificates.redistribute()
            await self._taken()
            yield f"every sidecar trusts it ({len(self._certificates.nodes)})"
            authority.promote_root()
        if authority.phase == "RETIRING":
            waits = not now and self._clock() < self._retire_at()
            count = self._certificates.rotate_foreign(servers=not waits)
            await self._taken()
            await asyncio.sleep(SETTLE_S)
            if count:
                yield f"it signs: {count} sidecars have new certificates"
            if waits:
                yield self._wait_text()
                return
            authority.retire_roots()
            self._certificates.redistribute()
            await self._taken()
            yield "the old root is trusted no more"

    def _retire_at(self) -> datetime:
        return self._authority.lent_until or self._clock() - timedelta(seconds=1)

    def _wait_text(self) -> str:
        until = self._retire_at().isoformat(timespec="seconds")
        return f"the old root stays trusted until {until}: tools hold certificates that it signed"

    async def _taken(self) -> None:
        """Wait until every node that holds certificates has taken the newest ones."""
        waiting = set(self._certificates.nodes)
        deadline = asyncio.get_running_loop().time() + ACK_S
        while waiting:
            for node_id in sorted(waiting):
                if node_id in self._certificates.nodes and not await self._has_taken(node_id):
                    continue
                waiting.discard(node_id)
            waiting &= set(self._certificates.nodes)
            if waiting and asyncio.get_running_loop().time() > deadline:
                late = ", ".join(sorted(waiting))
                raise TimedOut(
                    f"not taken within {ACK_S:g} s by {late}; it goes on by itself", reason="NOT_ACKNOWLEDGED"
                )

    async def _has_taken(self, node_id: str) -> bool:
        try:
            await self._nodes.wait_connected(node_id, timeout_s=ASK_S)
        except TimedOut:
            if node_id not in self._certificates.nodes:
                self._nodes.forget(node_id)
            return False
        return True
