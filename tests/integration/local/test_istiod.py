"""A mesh whose Envoys Istio's own control plane configures: calls, changes, and that control plane's end."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlmesh.local.v1 import local_pb2
from mlmesh_local import process
from mlmesh_local.options import Options
from mlmesh_local.proxyless import bootstrap
from mlmesh_runtime.channel import ClientTls, open_channel
from tests.integration.local.conftest import ECHO, HERE, RunningMesh, answer, start, stop
from tests.support import tools
from tests.support.echo import PROTOS, Text

ROUTES = """
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo, namespace: mlmesh}
spec:
  hosts: [echo.mlmesh.svc.cluster.local]
  gateways: [mesh, mlmesh]
  http:
    - name: split
      headers: {response: {set: {x-by: istio}}}
      route:
        - {destination: {host: echo.mlmesh.svc.cluster.local, subset: v2, port: {number: 9000}}}
"""


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """A mesh with echo v1 and v2, a toolbox and a gateway."""
    options = Options(
        state_dir=tmp_path_factory.mktemp("driven") / "state",
        manifests=(HERE / "manifests.yaml",),
        istio=(HERE / "istio.yaml",),
        gateway_address="127.0.0.1:0",
        control_plane="istiod",
        istiod=str(tools.require("pilot-discovery")),
    )
    running = RunningMesh(options, start(options))
    try:
        yield running
    finally:
        stop(options)
        assert process.leftovers(running.state.path) == []


def istiod(mesh: RunningMesh) -> psutil.Process:
    """The control plane's process."""
    (found,) = [item for item in process.leftovers(mesh.state.path) if "pilot-discovery" in item.name()]
    return found


async def test_calls_go_where_the_resources_say(driven: RunningMesh) -> None:
    async with driven.echo() as stub:
        versions = {(await answer(stub))["pod"].rsplit("-", 1)[0] for _ in range(10)}
    assert versions == {"echo-v1"}


async def test_the_gateway_s_own_settings_and_its_address_outside(driven: RunningMesh, tmp_path: Path) -> None:
    """Its Service's 9443 stands for 8443, where Istio's listener is; its pod says what it calls itself."""
    async with driven.control() as stub:
        issued = await stub.IssueCertificate(local_pb2.IssueCertificateRequest(service_account="operator"))
    files = {"cert": issued.certificate_chain_pem, "key": issued.private_key_pem, "ca": issued.trust_bundle_pem}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    tls = ClientTls(ca=tmp_path / "ca", cert=tmp_path / "cert", key=tmp_path / "key", server_name=ECHO)
    async with open_channel(driven.gateway, tls=tls) as channel:
        call = PROTOS.stub(channel).Unary(Text(), timeout=20)
        headers = dict(await call.initial_metadata())
        assert json.loads((await call).text)["identity"].endswith("/sa/ingressgateway")
    assert headers["server"] == "way-in"


CLIENT = """
import json
import grpc
from grpc import experimental
from tests.support.echo import PROTOS, Text
credentials = grpc.xds_channel_credentials(experimental.insecure_channel_credentials())
with grpc.secure_channel("xds:///echo.mlmesh.svc.cluster.local:9000", credentials) as channel:
    for _ in range(5):
        print(PROTOS.stub(channel).Unary(Text(), timeout=20).text)
"""


async def test_clients_without_a_sidecar_are_served_by_istio(driven: RunningMesh, tmp_path: Path) -> None:
    async with driven.control() as stub:
        request = local_pb2.IssueXdsBootstrapRequest(service_account="toolbox", folder=str(tmp_path))
        issued = await stub.IssueXdsBootstrap(request)
    for name, text in (
        (bootstrap.BOOTSTRAP_FILE, issued.bootstrap_json),
        (bootstrap.CHAIN_FILE, issued.certificate.certificate_chain_pem),
        (bootstrap.KEY_FILE, issued.certificate.private_key_pem),
        (bootstrap.ROOTS_FILE, issued.certificate.trust_bundle_pem),
    ):
        (tmp_path / name).write_text(text)
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLIENT),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "GRPC_XDS_BOOTSTRAP": str(tmp_path / bootstrap.BOOTSTRAP_FILE)},
    )
    found = [json.loads(line) for line in (await client.communicate())[0].splitlines()]
    assert len(found) == 5
    assert {(one["pod"].rsplit("-", 1)[0], one["identity"]) for one in found} == {
        ("echo-v1", "spiffe://cluster.local/ns/mlmesh/sa/toolbox")
    }


async def test_a_change_is_active_when_it_is_acknowledged_also_after_the_control_plane_died(
    driven: RunningMesh,
) -> None:
    before = istiod(driven)
    before.kill()
    async with driven.echo() as stub:
        await answer(stub)
    applied = await driven.apply(ROUTES)
    assert applied.acked_sidecars == applied.connected_sidecars == 5
    async with driven.echo() as stub, asyncio.timeout(10):
        assert {(await answer(stub))["pod"].rsplit("-", 1)[0] for _ in range(5)} == {"echo-v2"}
    assert istiod(driven).pid != before.pid
