"""Identities of another issuer, over the SPIFFE Workload API: of a small one here, and of SPIRE itself."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from mlmesh_local import workload_api
from mlmesh_local.bundles import spiffe_bundle
from mlmesh_local.certificates import Certificates
from mlmesh_local.pki import Authority
from mlmesh_local.svids import ForeignIssuer
from mlmesh_runtime.errors import InvalidInput, WrongState
from tests.support.envoy_mesh import EnvoyMesh
from tests.support.mesh_documents import STRICT, deployment, service
from tests.support.mesh_load import under_load
from tests.support.pki import spiffe
from tests.support.spire import Spire, WorkloadApi

WORKLOADS = (
    deployment("client", "client", "client")
    + service("client")
    + deployment("server", "server", "server")
    + service("server")
)
WANTED = [spiffe("client"), spiffe("server")]
ALLOW = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: server}
spec: {rules: [{from: [{source: {principals: [cluster.local/ns/mlmesh/sa/client]}}]}]}
---
"""


def now() -> datetime:
    return datetime.now(UTC)


def _certificates(pem: str) -> list[str]:
    """Certificates of a text, without line ends."""
    return ["".join(part.split("-----END")[0].split()) for part in pem.split("BEGIN CERTIFICATE-----")[1:]]


@contextlib.contextmanager
def short_folder() -> AsyncIterator[Path]:  # type: ignore[misc]  (a plain generator)
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="svid") as name:
        yield Path(name)


@contextlib.asynccontextmanager
async def mesh_of(issuer: ForeignIssuer, folder: Path) -> AsyncIterator[tuple[EnvoyMesh, Certificates]]:
    """A mesh whose sidecars have the identities of an issuer."""
    async with EnvoyMesh.start(folder, WORKLOADS, STRICT, ALLOW) as mesh:
        authority = Authority(folder / "ca", clock=now)
        certificates = Certificates(authority, mesh.ads, clock=now, changed=lambda: None, foreign=issuer)
        issuer.changed = certificates.renew
        for proxy in mesh.proxies:
            certificates.provide(proxy, ())
        for proxy in mesh.proxies:
            await mesh.ads.wait_connected(proxy.id, timeout_s=30)
        yield mesh, certificates


async def test_identities_come_from_the_workload_api_and_are_renewed(tmp_path: Path) -> None:
    elsewhere = Authority(tmp_path / "elsewhere", clock=now)
    api, issuer = WorkloadApi(), ForeignIssuer()
    api.give([elsewhere.issue("client"), elsewhere.issue("server"), elsewhere.issue("other")])
    with short_folder() as folder:
        async with api.serve(folder / "api.sock") as socket:
            await workload_api.obtain(socket, issuer, WANTED, timeout_s=30)
            async with mesh_of(issuer, tmp_path) as (mesh, certificates), asyncio.TaskGroup() as group:
                following = group.create_task(workload_api.follow(socket, issuer))
                before = certificates.leaf("client-0")
                assert (await mesh.call()).code is grpc.StatusCode.OK
                assert spiffe("client") in mesh.backends["server-0"].metadata[-1]["x-forwarded-client-cert"]
                async with under_load(mesh) as outcomes:
                    for _ in range(5):
                        api.give([elsewhere.issue("client"), elsewhere.issue("server")])
                        await outcomes.more(20)
                assert outcomes.codes() == {grpc.StatusCode.OK}
                assert certificates.leaf("client-0") != before
                following.cancel()
    assert ("workload.spiffe.io", "true") in api.asked[0].items()


async def test_an_identity_that_nobody_registered_is_told_with_what_to_do(tmp_path: Path) -> None:
    elsewhere = Authority(tmp_path / "elsewhere", clock=now)
    api, issuer = WorkloadApi(), ForeignIssuer()
    with short_folder() as folder:
        async with api.serve(folder / "api.sock") as socket:
            with pytest.raises(WrongState, match=r"spire-server entry create .* -spiffeID spiffe://cluster.local/ns/"):
                await workload_api.obtain(socket, issuer, WANTED, timeout_s=0.5)
            api.give([elsewhere.issue("client")])
            with pytest.raises(WrongState, match=r"no identity for spiffe://cluster.local/ns/mlmesh/sa/server;"):
                await workload_api.obtain(socket, issuer, WANTED, timeout_s=0.5)
    with pytest.raises(InvalidInput, match="unix:///run/spire"):
        await workload_api.obtain("/run/agent.sock", issuer, WANTED, timeout_s=0.5)


async def test_what_is_no_svid_is_not_taken(tmp_path: Path) -> None:
    elsewhere = Authority(tmp_path / "elsewhere", clock=now)
    api, issuer = WorkloadApi(), ForeignIssuer()
    good, other = elsewhere.issue("client"), elsewhere.issue("other")
    with short_folder() as folder:
        async with api.serve(folder / "api.sock") as socket:
            api.give([good])
            await workload_api.obtain(socket, issuer, [good.identity], timeout_s=30)
            # The certificate of one under the name of another.
            api.give([type(good)(**{**{f: getattr(other, f) for f in other.__slots__}, "identity": good.identity})])
            with pytest.raises(WrongState):
                await workload_api.obtain(socket, issuer, [other.identity], timeout_s=0.3)
    assert issuer.is_current(good)


async def test_spire_itself(tmp_path: Path, repository: Path) -> None:
    tools = repository / ".tools" / "bin"
    if not (tools / "spire-server").exists() or not (tools / "spire-agent").exists():
        pytest.skip("spire-server and spire-agent are not built: tools/build.sh spire")
    issuer = ForeignIssuer()
    with short_folder() as folder:
        async with Spire.start(tools, folder) as spire:
            await spire.register(WANTED)
            await workload_api.obtain(spire.socket, issuer, WANTED, timeout_s=30)
            async with mesh_of(issuer, tmp_path) as (mesh, _):
                assert (await mesh.call()).code is grpc.StatusCode.OK
                assert spiffe("client") in mesh.backends["server-0"].metadata[-1]["x-forwarded-client-cert"]
                ours = Authority(tmp_path / "ours", clock=now, trust_domain="laptop.example")
                ours.prepare_root()
                (folder / "bundle.json").write_text(spiffe_bundle(ours.roots, ours.sequence))
                assert sorted(_certificates(await spire.federate("laptop.example", folder / "bundle.json"))) == sorted(
                    _certificates(ours.bundle_pem)
                )
                stranger = mesh.authority.leaf(spiffe("client"))
                assert (await mesh.direct("server-0", stranger)).code is grpc.StatusCode.UNAVAILABLE
