"""A small mesh with real Envoys: backends in this process, a sidecar process each, fed by the real control plane.

async with EnvoyMesh.start(WORKLOADS, POLICY) as mesh:
    await mesh.apply(SPLIT)
    assert (await mesh.call()).text == "server-v1-0"
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import grpc

from mlmesh_local.access_logs import AccessLogs
from mlmesh_local.addresses import ADMIN_PORT, claim
from mlmesh_local.backend_credentials import backend_credentials
from mlmesh_local.certificates import Bundle, KeyPair
from mlmesh_local.envoy_types import CLUSTER, build
from mlmesh_local.metrics.directory import Directory
from mlmesh_local.metrics.registry import MeshMetrics
from mlmesh_local.model import CertificateSecret, ProxyNode, Secret, TrustSecret, World
from mlmesh_local.proxyless.build import Client, client_of
from mlmesh_local.proxyless.node import ProxylessNode
from mlmesh_local.resources import Deployment, Document, ResourceSet, load_resources
from mlmesh_local.resources.gateway_api.derive import derive
from mlmesh_local.resources.gateway_api.serving import gateways_serving
from mlmesh_local.root_bundles import backend_bundles, client_bundles
from mlmesh_local.sidecar import TOKEN_HEADER, SidecarPlan, bootstrap, command, find_envoy
from mlmesh_local.snapshot import Snapshot, SnapshotBuilder
from mlmesh_local.translate import View, credential_secret, service_endpoints
from mlmesh_local.translate.metric_plans import plans_of
from mlmesh_local.xds import AdsServer
from tests.support.pki import Authority, Leaf, spiffe

HOST = "server.mlmesh.svc.cluster.local"
UNARY = "/test.Echo/Unary"
CHAT = "/test.Echo/Chat"
ENVOY_STOP_S = 5.0
# Secrets that a gateway has from the beginning.
_ALWAYS = {"default", "kubernetes://ingress-cert"}
READY_S = 60.0


@dataclass
class Backend:
    """The application of one instance: answers its name, and records what it got."""

    name: str
    calls: int = 0
    fail: grpc.StatusCode | None = None
    fail_times: int = 1 << 30
    delay_s: float = 0.0
    metadata: list[dict[str, str]] = field(default_factory=list)
    _called: asyncio.Event = field(default_factory=asyncio.Event)

    async def called(self, times: int) -> None:
        """Wait until so many handlers have begun."""
        while self.calls < times:
            self._called.clear()
            await self._called.wait()

    async def unary(self, request: bytes, context: Any) -> bytes:
        self._record(context)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.fail is not None and self.fail_times > 0:
            self.fail_times -= 1
            await context.abort(self.fail, f"{self.name} was told to fail")
        return self.name.encode() + (b":" + request if request else b"")

    async def chat(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        self._record(context)
        async for request in requests:
            yield self.name.encode() + b":" + request

    def _record(self, context: Any) -> None:
        self.calls += 1
        self._called.set()
        received: dict[str, str] = {}
        for key, value in context.invocation_metadata() or ():
            received[key] = f"{received[key]},{value}" if key in received else str(value)
        self.metadata.append(received)

    async def serve(self, address: str) -> grpc.aio.Server:
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        handlers = {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary),
            "Chat": grpc.stream_stream_rpc_method_handler(self.chat),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", handlers),))
        server.add_insecure_port(address)
        await server.start()
        return server


@dataclass(frozen=True)
class Answer:
    """Outcome of one call. ``text`` is the backend's name, or the error's details."""

    code: grpc.StatusCode
    text: str
    seconds: float
    metadata: Mapping[str, str]


class EnvoyMesh:
    """A running mesh; see the module."""

    def __init__(self, resources: ResourceSet, folder: Path) -> None:
        self.resources = resources
        self.authority = Authority("mesh root")
        self.ads = AdsServer()
        self.builder = SnapshotBuilder()
        self.clients: dict[str, Client] = {}
        self.backends: dict[str, Backend] = {}
        self.not_ready: set[str] = set()
        self.otlp_address = ""
        self.key_sets: Mapping[str, str] = {}
        self.metrics: MeshMetrics | None = None
        self._folder = folder
        self._claim = claim(str(folder))
        self._channels: dict[tuple[str, int], grpc.aio.Channel] = {}
        self._asked: dict[str, tuple[set[str], dict[str, Bundle]]] = {}
        self._envoys: dict[str, asyncio.subprocess.Process] = {}
        self.proxies = tuple(self._plan())

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls, folder: Path, *texts: str, otlp_address: str = "", metrics: bool = False
    ) -> AsyncIterator[EnvoyMesh]:
        """A mesh of the Deployments in these documents, every Envoy configured."""
        resources = ResourceSet().apply(load(*texts)).resources
        mesh = cls(resources, folder)
        mesh.otlp_address = otlp_address
        mesh.metrics = MeshMetrics(clock=time.monotonic) if metrics else None
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(mesh._claim.close)
            await mesh._serve(stack)
            async with asyncio.TaskGroup() as group:
                for proxy in mesh.proxies:
                    group.create_task(mesh.ads.wait_connected(proxy.id, timeout_s=READY_S))
            yield mesh

    # Configuration

    @property
    def world(self) -> World:
        ready = [proxy.id for proxy in self.proxies if proxy.id not in self.not_ready]
        return World(
            resources=self.resources,
            proxies=self.proxies,
            endpoints=service_endpoints(derive(self.resources), self.proxies, ready=ready),
            otlp_address=self.otlp_address,
            key_sets=self.key_sets,
            als_address=self._claim.block.ads if self.metrics else "",
        )

    def push(self) -> str:
        """Give every sidecar the configuration of the world as it is."""
        asked = {proxy.id: (self._certificates(proxy), self._bundles(proxy)) for proxy in self.proxies}
        for proxy in self.proxies:
            if asked[proxy.id] != self._asked.get(proxy.id, (set(), {})):
                self.ads.set_secrets(proxy.id, self._secrets(proxy))
        self._asked = asked
        for node_id, snapshot in self.builder.build(self.world).items():
            self.ads.update(node_id, snapshot)
        self.ads.update_guests(self.snapshot_of)
        if self.metrics:
            view = View(self.world)
            self.metrics.describe(Directory.of(view), plans_of(view))
        return self.world.version

    def snapshot_of(self, node: ProxylessNode) -> Snapshot:
        """What a client without a sidecar is told now."""
        client = self.clients[node.id] = client_of(self.builder, node, before=self.clients.get(node.id))
        return client.snapshot(self.world.version)

    async def apply(self, *texts: str, timeout_s: float = 20.0) -> float:
        """Apply documents; returns the seconds until every sidecar had acknowledged. A refusal changes nothing."""
        good = self.resources
        self.resources = good.apply(load(*texts)).resources
        begin = time.perf_counter()
        try:
            version = self.push()
            await self.ads.wait_acked(version, timeout_s=timeout_s)
        except Exception:
            self.resources = good
            self.push()
            raise
        return time.perf_counter() - begin

    async def reset(self, *texts: str) -> None:
        """Back to these documents alone (Istio's part); backends behave and count from zero."""
        self.resources = self.resources.apply(load(*texts), prune=True).resources
        self.not_ready.clear()
        await self.ads.wait_acked(self.push(), timeout_s=30.0)
        for backend in self.backends.values():
            backend.calls, backend.fail, backend.fail_times, backend.delay_s = 0, None, 1 << 30, 0.0
            backend.metadata.clear()

    def rotate(self) -> None:
        """New certificates for every sidecar."""
        for proxy in self.proxies:
            self.ads.set_secrets(proxy.id, self._secrets(proxy))

    # Calls

    def channel(self, client: str = "client-0", port: int = 9000, host: str = HOST) -> grpc.aio.Channel:
        """A channel to a client's sidecar, as an application opens it."""
        return grpc.aio.insecure_channel(
            f"{self.proxy(client).outbound_address}:{port}",
            options=(("grpc.default_authority", f"{host}:{port}"), ("grpc.enable_retries", 0)),
        )

    async def call(
        self,
        client: str = "client-0",
        *,
        host: str = HOST,
        port: int = 9000,
        request: bytes = b"",
        metadata: Mapping[str, str] | None = None,
        timeout_s: float = 20.0,
        channel: grpc.aio.Channel | None = None,
    ) -> Answer:
        """One unary call through a client's sidecar, over a connection that stays open."""
        if channel is None:
            key = (client + host, port)
            channel = self._channels.get(key) or self.channel(client, port, host)
            self._channels[key] = channel
        return await unary(channel, request, metadata, timeout_s)

    async def spread(self, calls: int, client: str = "client-0", **arguments: Any) -> Counter[str]:
        """How often each backend answered; failures count under their code's name."""
        found: Counter[str] = Counter()
        for begin in range(0, calls, 50):
            batch = (self.call(client, **arguments) for _ in range(min(50, calls - begin)))
            for answer in await asyncio.gather(*batch):
                found[answer.text if answer.code is grpc.StatusCode.OK else answer.code.name] += 1
        return found

    async def direct(
        self,
        instance: str,
        leaf: Leaf | None,
        *,
        port: int = 9000,
        host: str = "",
        server_name: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> Answer:
        """A call past all client sidecars, to a proxy's listener in the mesh; plaintext without a leaf."""
        target = f"{self.proxy(instance).pod_address}:{port}"
        options = [("grpc.default_authority", host)] if host else []
        if leaf is None:
            channel = grpc.aio.insecure_channel(target, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(self.authority.pem, leaf.key, leaf.cert)
            # Gateways choose by the server name; sidecars look at none.
            options.append(("grpc.ssl_target_name_override", server_name or host or "server.test"))
            channel = grpc.aio.secure_channel(target, credentials, options=options)
        async with channel:
            return await unary(channel, b"", metadata, 3.0)

    def proxy(self, instance: str) -> ProxyNode:
        return next(proxy for proxy in self.proxies if proxy.id == instance)

    def calls(self, prefix: str = "server") -> int:
        """Handlers begun by backends whose name begins so."""
        return sum(backend.calls for name, backend in self.backends.items() if name.startswith(prefix))

    async def stats(self, instance: str, pattern: str) -> dict[str, int]:
        """Counters and gauges of an Envoy whose name matches."""
        body = await self._ask(instance, f"/stats?format=json&filter={quote(pattern)}")
        return {item["name"]: item["value"] for item in json.loads(body)["stats"] if "value" in item}

    async def configuration(self, instance: str, types: str = "") -> Any:
        """Envoy's own view of its configuration."""
        return json.loads(await self._ask(instance, f"/config_dump{types}"))

    @property
    def control_plane(self) -> str:
        """ "host:port" of the control plane."""
        return self._claim.block.ads

    def envoy_pids(self) -> list[int]:
        """Process ids of the Envoys."""
        return [process.pid for process in self._envoys.values()]

    def free_address(self) -> str:
        """A loopback address of this mesh that no instance uses."""
        return self._claim.block.instance(250).application

    def first_request(self, node_id: str) -> bytes:
        """What an Envoy of that name would ask first."""
        request = {"node": {"id": node_id}, "type_url": CLUSTER}
        return build("envoy.service.discovery.v3.DeltaDiscoveryRequest", request).SerializeToString()

    def secrets_of(self, account: str) -> dict[str, Secret]:
        """Secrets as a workload of this ServiceAccount has them."""
        leaf = self.authority.leaf(spiffe(account))
        own = CertificateSecret(certificate_chain=leaf.cert, private_key=leaf.key)
        return {"default": own, "ROOTCA": TrustSecret(roots=self.authority.pem)}

    async def secrets_taken(self, instance: str) -> None:
        """Wait until an Envoy has acknowledged its secrets."""
        await self.ads.wait_connected(instance, timeout_s=30)

    async def start_control_plane(self) -> None:
        """Serve ADS, with a state as new, at the address that Envoys know."""
        self.ads = AdsServer(authorize=lambda node, metadata: metadata.get(TOKEN_HEADER) == f"token of {node}")
        self.ads.hosts = self
        for proxy in self.proxies:
            self.ads.set_secrets(proxy.id, self._secrets(proxy))
        self.push()
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self.ads.attach(self._server)
        if self.metrics:
            AccessLogs(self.metrics).attach(self._server)
        self._server.add_insecure_port(self._claim.block.ads)
        await self._server.start()

    async def stop_control_plane(self) -> None:
        """End it at once; Envoys go on with what they have."""
        await self._server.stop(None)

    async def restart_envoy(self, instance: str) -> None:
        """Kill an Envoy and start another in its place; wait until it takes calls."""
        await _stop(self._envoys[instance])
        async with asyncio.timeout(READY_S):
            while self.ads.status(instance).connected:  # noqa: ASYNC110  another process ends when it likes
                await asyncio.sleep(0.01)
        for key in [key for key in self._channels if key[0].startswith(instance)]:
            await self._channels.pop(key).close()
        await self._start_envoy(self.proxy(instance), self._stack)
        await self.ads.wait_connected(instance, timeout_s=READY_S)

    # Inside

    def _plan(self) -> Iterable[ProxyNode]:
        number = 0
        for deployment in derive(self.resources).specs(Deployment):
            for ordinal in range(deployment.replicas):
                number += 1
                addresses = self._claim.block.instance(number)
                gateway = deployment.is_gateway
                yield ProxyNode(
                    id=f"{deployment.meta.name}-{ordinal}",
                    kind="gateway" if gateway else "sidecar",
                    namespace=deployment.meta.namespace,
                    service_account=deployment.service_account,
                    labels=deployment.labels,
                    pod_address=addresses.pod,
                    application_address="" if gateway else addresses.application,
                    outbound_address="" if gateway else addresses.outbound,
                    container_ports=deployment.container_ports(),
                    access_log_path="/dev/null",
                )

    def _admin(self, instance: str) -> str:
        return self.proxy(instance).pod_address.replace(".1.", ".4.", 1)

    async def _ask(self, instance: str, request: str) -> bytes:
        def get() -> bytes:
            with urlopen(f"http://{self._admin(instance)}:{ADMIN_PORT}{request}", timeout=30) as answer:
                return bytes(answer.read())

        return await asyncio.to_thread(get)

    def _secrets(self, proxy: ProxyNode) -> dict[str, Secret]:
        secrets = self.secrets_of(proxy.service_account)
        if proxy.kind == "gateway":
            leaf = self.authority.leaf(
                spiffe(proxy.service_account), dns=(HOST, "*.mlmesh.svc.cluster.local", "api.example.com")
            )
            shown = CertificateSecret(certificate_chain=leaf.cert, private_key=leaf.key)
            secrets["kubernetes://ingress-cert"] = shown
            secrets["kubernetes://ingress-cert-cacert"] = secrets["ROOTCA"]
            secrets |= dict.fromkeys(self._certificates(proxy), shown)
        return secrets | {name: self._given(bundle) for name, bundle in self._bundles(proxy).items()}

    def _given(self, bundle: Bundle) -> Secret:
        if isinstance(bundle, KeyPair):
            return CertificateSecret(certificate_chain=bundle.certificate.encode(), private_key=bundle.key.encode())
        return TrustSecret(roots=bundle.roots.encode() or self.authority.pem)

    def _certificates(self, proxy: ProxyNode) -> set[str]:
        """Names of the secrets whose certificates a gateway's servers show."""
        if proxy.kind != "gateway":
            return set()
        served = gateways_serving(derive(self.resources), proxy.namespace, proxy.labels)
        shown = [server.tls for gateway in served for server in gateway.servers if server.tls]
        return {credential_secret(name) for tls in shown for name in tls.credentials} - _ALWAYS

    def _bundles(self, proxy: ProxyNode) -> dict[str, Bundle]:
        """Roots and certificates that a proxy needs beside those of the mesh, by the names of their secrets."""
        derived = derive(self.resources)
        served = gateways_serving(derived, proxy.namespace, proxy.labels) if proxy.kind == "gateway" else ()
        roots = backend_bundles(derived) + client_bundles(derived, served)
        return {one.name: one for one in (*roots, *backend_credentials(derived, proxy))}

    async def _serve(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack
        await self.start_control_plane()
        stack.push_async_callback(self.stop_control_plane)
        stack.push_async_callback(self._close_channels)
        for proxy in self.proxies:
            if proxy.kind == "sidecar":
                backend = self.backends[proxy.id] = Backend(proxy.id)
                stack.push_async_callback((await backend.serve(f"{proxy.application_address}:9000")).stop, None)
            await self._start_envoy(proxy, stack)

    async def _start_envoy(self, proxy: ProxyNode, stack: contextlib.AsyncExitStack) -> None:
        host, port = self._claim.block.ads.rsplit(":", 1)
        plan = SidecarPlan(
            node_id=proxy.id,
            cluster="test",
            metadata={},
            admin_host=self._admin(proxy.id),
            ads_host=host,
            ads_port=int(port),
            token=f"token of {proxy.id}",
        )
        file = self._folder / f"{proxy.id}.json"
        file.write_text(json.dumps(bootstrap(plan)))
        with (self._folder / f"{proxy.id}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command(find_envoy(os.environ.get("PATH")), file), stdout=log, stderr=log
            )
        self._envoys[proxy.id] = process
        stack.push_async_callback(_stop, process)

    async def _close_channels(self) -> None:
        for channel in self._channels.values():
            await channel.close()


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    async with asyncio.timeout(ENVOY_STOP_S):
        await process.wait()


async def unary(
    channel: grpc.aio.Channel, request: bytes, metadata: Mapping[str, str] | None, timeout_s: float
) -> Answer:
    """One call of the echo service, whatever comes of it."""
    begin = time.perf_counter()
    call = channel.unary_unary(UNARY)(request, timeout=timeout_s, metadata=tuple((metadata or {}).items()))
    try:
        text = (await call).decode()
    except grpc.aio.AioRpcError as error:
        return Answer(error.code(), error.details() or "", time.perf_counter() - begin, {})
    received = {str(key): str(value) for key, value in await call.initial_metadata() or ()}
    return Answer(grpc.StatusCode.OK, text, time.perf_counter() - begin, received)


def load(*texts: str) -> ResourceSet:
    """Resources of YAML texts, named by their position."""
    return load_resources(Document(source=f"test-{index}.yaml", text=text) for index, text in enumerate(texts))
