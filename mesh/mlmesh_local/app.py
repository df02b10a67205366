"""The supervisor process: builds the mesh from its parts, runs it, takes it down."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import grpc

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh_local import addresses, workload_api
from mlmesh_local.access_logs import AccessLogs
from mlmesh_local.certificates import Certificates
from mlmesh_local.changes import Changes
from mlmesh_local.chaos.faults import Faults
from mlmesh_local.configuration import Configuration
from mlmesh_local.control import LocalMeshServicer
from mlmesh_local.executors import Executors
from mlmesh_local.guardian import guard
from mlmesh_local.instance import SidecarSetup
from mlmesh_local.instances import Folders
from mlmesh_local.istiod.driver import Driver
from mlmesh_local.istiod.process import Istiod, find_program
from mlmesh_local.istiod.relay import Relay
from mlmesh_local.key_sets import KeySets, fetcher
from mlmesh_local.mesh import Mesh, SupervisorTraffic
from mlmesh_local.metering import Metering
from mlmesh_local.metrics import endpoint
from mlmesh_local.metrics.exposition import CONTENT_TYPE
from mlmesh_local.options import Options
from mlmesh_local.pki import TRUST_DOMAIN, Authority, spiffe_id
from mlmesh_local.poller import StatsPoller
from mlmesh_local.process import MARK
from mlmesh_local.receiving import receiving
from mlmesh_local.report import Report
from mlmesh_local.resources.gateway_api.derive import derive
from mlmesh_local.resources.model import Deployment, MeshConfig
from mlmesh_local.resources.parse import load_resources, read_documents
from mlmesh_local.resources.resource_set import ResourceSet
from mlmesh_local.rotation import RootRotation
from mlmesh_local.sidecar import TOKEN_HEADER, find_envoy
from mlmesh_local.state import StateDir
from mlmesh_local.supervisor import Supervisor
from mlmesh_local.svids import ForeignIssuer
from mlmesh_local.traces import TraceStore
from mlmesh_local.work import Work
from mlmesh_local.workloads import workload_of
from mlmesh_local.xds import AdsServer, ConfigurationRejectedError
from mlmesh_runtime.config import Settings
from mlmesh_runtime.errors import AlreadyExists
from mlmesh_runtime.server import Server, Service

logger = logging.getLogger(__name__)

Token = Callable[[str], str]
PEER_BYTES_MAX = 16 * 1024 * 1024
PEER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", PEER_BYTES_MAX),
    # Envoys ask every 10 s whether we are there; a quiet stream would be ended for that within a minute.
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
)
READY_CHECK_S = 0.1
TELL_S = 2.0
SVIDS_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What was found out before anything is started."""

    state: StateDir
    envoy: Path
    resources: ResourceSet
    gateway_address: str
    environ: Mapping[str, str]
    otlp_endpoint: str = ""
    spiffe_socket: str = ""
    istiod: Path | None = None
    """The program of Istio's control plane, where that is to configure the Envoys."""


def prepare(options: Options, state: StateDir, environ: Mapping[str, str]) -> Start:
    """Find everything that is needed, and refuse early what cannot work. Raises MeshError."""
    envoy = find_envoy(environ.get("PATH"))
    istiod = find_program(options.istiod, environ) if options.control_plane == "istiod" else None
    documents = read_documents([*options.manifests, *options.istio])
    applied = ResourceSet().apply(load_resources(documents))
    for warning in applied.warnings:
        logger.warning(warning)
    workloads = [workload_of(deployment) for deployment in derive(applied.resources).specs(Deployment)]
    has_gateway = any(workload.is_gateway and workload.replicas for workload in workloads)
    gateway_address = _gateway_address(options.gateway_address) if has_gateway else ""
    return Start(
        state=state,
        envoy=envoy,
        resources=applied.resources,
        gateway_address=gateway_address,
        environ=environ,
        spiffe_socket=options.spiffe_socket,
        otlp_endpoint=options.otlp_endpoint,
        istiod=istiod,
    )


async def run(start: Start, report: Report) -> None:
    """Run a mesh until SIGTERM, SIGINT or Shutdown, then drain it."""
    claim = addresses.claim(str(start.state.path))
    try:
        await _run(start, claim.block, report)
    finally:
        claim.close()


async def _run(start: Start, block: addresses.Block, report: Report) -> None:
    changes = Changes()
    state = start.state
    token = _tokens(secrets.token_bytes(32))
    traces = TraceStore(state.traces, clock_ns=time.time_ns)
    executors = Executors()
    metering = Metering()
    foreign = await _foreign_issuer(start)
    try:
        async with (
            _control_plane(block, token) as ads,
            receiving(block, traces, executors.traces, otlp_endpoint=start.otlp_endpoint),
            _plain_server(block.als, AccessLogs(metering.metrics, metering.rules).attach),
            endpoint.serve(block.metrics, metering.page, content_type=CONTENT_TYPE),
            _istiod(start, block) as istiod,
            asyncio.TaskGroup() as instances_group,
        ):
            guardian = instances_group.create_task(guard(state.path))
            driver = Driver(istiod, instances_group, deliver=ads.update) if istiod else None
            ads.relay = Relay(istiod.address) if istiod else None
            mesh = _build(
                start,
                block=block,
                ads=ads,
                traces=traces,
                executors=executors,
                metering=metering,
                changes=changes,
                group=instances_group,
                token=token,
                driver=driver,
                foreign=foreign,
            )
            async with _control(mesh, state) as control, asyncio.TaskGroup() as group:
                beside = [
                    group.create_task(job)
                    for job in (
                        mesh.follow(),
                        mesh.rotate_logs(),
                        mesh.certificates.run(),
                        mesh.rotation.run(),
                        mesh.key_sets.run(),
                        mesh.stats.run(),
                        mesh.metering.run(),
                        mesh.faults.run(),
                    )
                ]
                if foreign is not None:
                    beside.append(group.create_task(workload_api.follow(start.spiffe_socket, foreign)))
                beside.append(group.create_task(_tell_start(mesh, report)))
                _on_signals(mesh)
                report.step(f"mesh {block.control.rsplit('.', 2)[0]}.0.0/16, state in {state.path}")
                await mesh.supervisor.reconcile(mesh.supervisor.plan_all(mesh.configuration.workloads))
                mesh.save()
                await mesh.wait_ending()
                await mesh.shut_down()
                for task in beside:
                    task.cancel()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TELL_S):
                        await mesh.all_told()
                await control.stop(drain_s=0, grace_s=1)
            if driver is not None:
                driver.close()
            guardian.cancel()
    finally:
        executors.shutdown()
        traces.close()


def _build(
    start: Start,
    *,
    block: addresses.Block,
    ads: AdsServer,
    traces: TraceStore,
    executors: Executors,
    metering: Metering,
    changes: Changes,
    group: asyncio.TaskGroup,
    token: Token,
    driver: Driver | None,
    foreign: ForeignIssuer | None,
) -> Mesh:
    state = start.state
    folders = Folders(state=state.path, working=Path.cwd())
    authority = Authority(state.authority, clock=_now)
    certificates = Certificates(authority, ads, clock=_now, changed=changes.notify, foreign=foreign)
    if foreign is not None:
        foreign.changed = certificates.renew
    key_sets = KeySets(
        fetch=fetcher(lambda host, port: configuration.address_of(host, port)),  # noqa: PLW0108  (it is made below)
        executor=executors.key_sets,
        clock=time.monotonic,
        changed=changes.notify,
    )
    setup = _sidecar_setup(start, block, folders, token)
    supervisor = Supervisor(group, setup, block=block, folders=folders, changes=changes, environ=start.environ)
    faults = Faults(lambda: supervisor.instances, changed=changes.notify, random=Random())  # noqa: S311  (no secret)
    configuration = Configuration(
        ads,
        certificates,
        key_sets,
        resources=start.resources,
        block=block,
        logs=state.logs,
        gateway_address=start.gateway_address,
        instances=lambda: supervisor.instances,
        detour=faults.detour,
        describe=metering.describe,
        other=driver,
        token=token,
    )
    stats = StatsPoller(
        lambda: list(supervisor.instances.values()), changed=changes.notify, dropped=metering.metrics.lost
    )
    supervisor.traffic = SupervisorTraffic(configuration, stats)
    return Mesh(
        supervisor=supervisor,
        configuration=configuration,
        certificates=certificates,
        rotation=RootRotation(authority, certificates, ads, clock=_now),
        key_sets=key_sets,
        stats=stats,
        metering=metering,
        traces=traces,
        trace_executor=executors.traces,
        log_executor=executors.logs,
        changes=changes,
        faults=faults,
        work=Work(group),
        clock=_now,
        config_folder=state.config,
        logs=state.logs,
    )


def _sidecar_setup(start: Start, block: addresses.Block, folders: Folders, token: Token) -> SidecarSetup:
    return SidecarSetup(
        envoy=start.envoy,
        ads_host=block.control,
        ads_port=addresses.ADS_PORT,
        run_folder=start.state.run,
        state_folder=start.state.path,
        working_folder=folders.working,
        environ=start.environ,
        token=token,
    )


async def _foreign_issuer(start: Start) -> ForeignIssuer | None:
    """Identities from a SPIFFE Workload API, once it has those that are needed. Raises WrongState, InvalidInput."""
    if not start.spiffe_socket:
        return None
    issuer = ForeignIssuer()
    domain = next((config.trust_domain for config in start.resources.specs(MeshConfig)), "") or TRUST_DOMAIN
    workloads = [workload_of(deployment) for deployment in derive(start.resources).specs(Deployment)]
    wanted = [spiffe_id(each.service_account, each.namespace, trust_domain=domain) for each in workloads]
    await workload_api.obtain(start.spiffe_socket, issuer, wanted, timeout_s=SVIDS_S)
    return issuer


def _tokens(key: bytes) -> Token:
    # Loopback is open to every user of the machine; keys must go to this mesh's own sidecars only.
    return lambda node_id: hmac.new(key, node_id.encode(), "sha256").hexdigest()


@contextlib.asynccontextmanager
async def _istiod(start: Start, block: addresses.Block) -> AsyncIterator[Istiod | None]:
    if start.istiod is None:
        yield None
        return
    folder = start.state.path / "istiod"
    mark = {MARK: str(start.state.path)}
    istiod = Istiod(start.istiod, folder, host=block.control, log=start.state.logs / "istiod.log", environ=mark)
    try:
        await istiod.start()
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(istiod.keep_running())
            yield istiod
            keeper.cancel()
    finally:
        await istiod.stop()


@contextlib.asynccontextmanager
async def _control_plane(block: addresses.Block, token: Token) -> AsyncIterator[AdsServer]:
    def authorize(node_id: str, metadata: Mapping[str, str]) -> bool:
        return hmac.compare_digest(metadata.get(TOKEN_HEADER, "").encode(), token(node_id).encode())

    ads = AdsServer(authorize=authorize)
    async with _plain_server(block.ads, ads.attach):
        yield ads


@contextlib.asynccontextmanager
async def _plain_server(address: str, attach: Callable[[grpc.aio.Server], None]) -> AsyncIterator[None]:
    """A server for Envoy's own protocols: no deadlines, no health, no reflection."""
    server = grpc.aio.server(options=PEER_OPTIONS)
    attach(server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(0)


def _control(mesh: Mesh, state: StateDir) -> Server:
    service = Service(
        add=local_pb2_grpc.add_LocalMeshServiceServicer_to_server,
        servicer=LocalMeshServicer(mesh),
        descriptor=local_pb2.DESCRIPTOR.services_by_name["LocalMeshService"],
        deadline_exempt={"WatchStatus", "Shutdown"},
    )
    return Server(Settings(service="mlmesh", listen=state.target, grace_s=1.0), [service])


async def _tell_start(mesh: Mesh, report: Report) -> None:
    while not (mesh.instances and mesh.ready):
        for instance in mesh.instances:
            report.instance(instance)
        refused = {name: node.rejection for name, node in mesh.configuration.node_status().items() if node.rejection}
        if refused:
            # There is no last good configuration to go on with.
            raise ConfigurationRejectedError(refused)
        # Acknowledgements of sidecars change readiness, too, and are not counted as changes.
        await asyncio.sleep(READY_CHECK_S)
    await mesh.begin_counting()
    for instance in mesh.instances:
        report.instance(instance)
    outside = next((item.address for item in mesh.gateways()), "")
    logger.info("ready", extra={"gateway": outside, "instances": len(mesh.instances)})
    report.ready(outside)


def _on_signals(mesh: Mesh) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, mesh.end)


def _gateway_address(text: str) -> str:
    if text == "none":
        return ""
    host, port = addresses.split_address(text, field="--gateway-address")
    if not port:
        with socket.create_server((host, 0)) as probe:
            return f"{host}:{probe.getsockname()[1]}"
    if not addresses.is_free(host, port):
        user = addresses.user_of(port)
        raise AlreadyExists(
            f"port {port} of the gateway is already in use{f' by {user}' if user else ''}; "
            "choose another with --gateway-address HOST:PORT, or none",
            reason="PORT_IN_USE",
            metadata={"port": str(port)},
        )
    return text


def _now() -> datetime:
    return datetime.now(UTC)
