"""Certificates and roots are replaced while calls go on without pause: none of them fails."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from mlmesh_local.certificates import Certificates
from mlmesh_local.pki import Authority, Certificate
from mlmesh_local.rotation import RootRotation
from mlmesh_runtime.errors import WrongState
from tests.support.envoy_mesh import EnvoyMesh
from tests.support.mesh_documents import STRICT, deployment, service
from tests.support.mesh_load import under_load

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROTATIONS = 50
ROOTS = 3
CALLS_A_CONNECTION = 3
WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server", "server", "server", replicas=2)
    + service("server")
)
# Connections are made anew all the time: those that are open would never show a certificate again.
SHORT = f"""
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: server}}
spec:
  host: server
  trafficPolicy: {{connectionPool: {{http: {{maxRequestsPerConnection: {CALLS_A_CONNECTION}}}}}}}
---
"""


def now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Issued:
    """A mesh whose certificates are of the laptop mesh's own authority."""

    mesh: EnvoyMesh
    folder: Path
    authority: Authority
    certificates: Certificates

    def rotation(self) -> RootRotation:
        return RootRotation(self.authority, self.certificates, self.mesh.ads, clock=now)

    def restart(self) -> None:
        """The control plane starts again: only what is in the folder is known."""
        held = self.certificates
        self.authority = Authority(self.folder, clock=now)
        self.certificates = Certificates(self.authority, self.mesh.ads, clock=now, changed=lambda: None)
        for proxy in self.mesh.proxies:
            assert proxy.id in held.nodes
            self.certificates.provide(proxy, ())

    async def is_let_in(self, certificate: Certificate) -> bool:
        """Whether a server's sidecar takes a peer with this certificate, and shows one that the bundle knows."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        # Before TLS 1.3 a client learns in the handshake that its certificate was refused.
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=self.authority.bundle_pem)
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(certificate.chain_pem + certificate.key_pem)
            file.flush()
            context.load_cert_chain(file.name)
        try:
            _, writer = await asyncio.open_connection(self.mesh.proxy("server-0").pod_address, 9000, ssl=context)
        except (ssl.SSLError, ConnectionError):
            return False
        writer.transport.abort()
        return True

    async def handshakes(self) -> int:
        found = await self.mesh.stats("client-0", "cluster.outbound.*server.*ssl.handshake")
        return sum(found.values())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def issued(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Issued]:
    folder = tmp_path_factory.mktemp("ca")
    authority = Authority(folder, clock=now)
    async with EnvoyMesh.start(tmp_path_factory.mktemp("mesh"), WORKLOADS, STRICT, SHORT) as mesh:
        certificates = Certificates(authority, mesh.ads, clock=now, changed=lambda: None)
        for proxy in mesh.proxies:
            certificates.provide(proxy, ())
        for proxy in mesh.proxies:
            await mesh.ads.wait_connected(proxy.id, timeout_s=30)
        yield Issued(mesh, folder, authority, certificates)


async def test_no_call_fails_while_every_certificate_is_replaced_again_and_again(issued: Issued) -> None:
    first = await issued.handshakes()
    async with under_load(issued.mesh) as outcomes:
        for _ in range(ROTATIONS):
            assert issued.certificates.rotate() == len(issued.mesh.proxies)
            for proxy in issued.mesh.proxies:
                await issued.mesh.ads.wait_connected(proxy.id, timeout_s=30)
            await outcomes.more(2 * CALLS_A_CONNECTION)
    assert outcomes.codes() == {grpc.StatusCode.OK}
    assert await issued.handshakes() - first > ROTATIONS


async def test_no_call_fails_while_the_root_is_replaced(issued: Issued) -> None:
    first = await issued.handshakes()
    async with under_load(issued.mesh) as outcomes:
        for _ in range(ROOTS):
            before = issued.certificates.leaf("client-0")
            assert before is not None
            assert issued.authority.is_signer(before)
            steps = [step async for step in issued.rotation().rotate()]
            assert len(steps) == 4, steps
            await outcomes.more(8 * CALLS_A_CONNECTION)
            # Who still has a certificate of the old root is a stranger.
            assert not issued.authority.is_signer(before)
    assert outcomes.codes() == {grpc.StatusCode.OK}
    assert await issued.handshakes() - first > ROOTS
    assert not await issued.is_let_in(before)
    assert await issued.is_let_in(issued.authority.issue("client"))


async def test_what_a_restart_interrupts_goes_on_after_it(issued: Issued) -> None:
    async with under_load(issued.mesh) as outcomes:
        steps = issued.rotation().rotate()
        assert await anext(steps) == "a new root is made"
        await steps.aclose()
        issued.restart()
        assert issued.authority.phase == "DISTRIBUTING"
        steps = issued.rotation().rotate()
        await anext(steps)
        issued.authority.promote_root()
        await steps.aclose()
        issued.restart()
        assert issued.authority.phase == "RETIRING"
        await issued.rotation().resume()
        assert issued.authority.phase == "IDLE"
        await outcomes.more(8 * CALLS_A_CONNECTION)
    assert outcomes.codes() == {grpc.StatusCode.OK}


async def test_tools_are_not_locked_out_by_a_new_root(issued: Issued) -> None:
    lent = issued.authority.lend("client", "mlmesh", timedelta(hours=1))
    steps = [step async for step in issued.rotation().rotate()]
    assert "stays trusted until" in steps[-1]
    assert await issued.is_let_in(lent)
    with pytest.raises(WrongState):
        _ = [step async for step in issued.rotation().rotate()]
    await issued.rotation().resume()
    assert issued.authority.phase == "RETIRING"
    assert [step async for step in issued.rotation().rotate(now=True)] == ["the old root is trusted no more"]
    assert not await issued.is_let_in(lent)
