"""Meshes of real Envoys for random calls: one that our control plane configures, one that Istio's does."""

from __future__ import annotations

import contextlib
from typing import Any

from mlmesh_local.envoy_types import Json, plain_bytes
from mlmesh_local.inspection import TYPES
from mlmesh_local.model import CertificateSecret, ProxyNode, Secret, TrustSecret
from mlmesh_local.resources import ResourceSet
from mlmesh_local.translate import Configuration
from tests.differential.calling.echo import Echo, Journal
from tests.differential.driven import DrivenMesh
from tests.support.envoy_mesh import EnvoyMesh, load
from tests.support.pki import spiffe

ACKNOWLEDGED_S = 15.0
OUTSIDE_PORT = 8000
_URLS = frozenset(TYPES.values())


class CallMesh(EnvoyMesh):
    """A mesh whose applications echo, whatever protocol they are called by."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.journal = Journal()
        self.fixed = self.resources

    @property
    def outside(self) -> str:
        """The address of an application outside of the mesh."""
        return self.free_address()

    async def give(self, text: str) -> None:
        """Make these documents, besides the fixed ones, the whole configuration."""
        self.resources = ResourceSet.of([*self.fixed, *load(text)])
        await self.ads.wait_acked(self.push(), timeout_s=ACKNOWLEDGED_S)

    def sent(self) -> dict[str, Configuration]:
        """What every proxy was really told."""
        found: dict[str, Configuration] = {}
        for proxy in self.proxies:
            for one in self.ads.sent(proxy.id):
                if one.type_url in _URLS:
                    content: Json = plain_bytes(one.type_url, one.content)
                    found.setdefault(proxy.id, {}).setdefault(one.type_url, {})[one.name] = content
        return found

    def _secrets(self, proxy: ProxyNode) -> dict[str, Secret]:
        leaf = self.authority.leaf(spiffe(proxy.service_account, proxy.namespace), dns=("*.example.com",))
        shown = CertificateSecret(certificate_chain=leaf.cert, private_key=leaf.key)
        secrets: dict[str, Secret] = {"default": shown, "ROOTCA": TrustSecret(roots=self.authority.pem)}
        if proxy.kind == "gateway":
            for name in ("cert", "other-cert"):
                secrets[f"kubernetes://{name}"] = shown
                secrets[f"kubernetes://{name}-cacert"] = secrets["ROOTCA"]
        return secrets

    async def _serve(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack
        await self.start_control_plane()
        stack.push_async_callback(self.stop_control_plane)
        for proxy in self.proxies:
            if proxy.kind == "sidecar":
                echo = Echo(proxy.id, self.journal)
                for port in proxy.container_ports.values():
                    stack.callback((await echo.serve(proxy.application_address, port)).close)
            await self._start_envoy(proxy, stack)
        stack.callback((await Echo("outside", self.journal).serve(self.outside, OUTSIDE_PORT)).close)


class DrivenCallMesh(CallMesh, DrivenMesh):
    """The same, configured by Istio."""

    async def give(self, text: str) -> None:
        """Make these documents, besides the fixed ones, the whole configuration."""
        self.resources = ResourceSet.of([*self.fixed, *load(text)])
        await self._acknowledged(self.push(), ACKNOWLEDGED_S)
