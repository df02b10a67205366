"""How the command line reaches the mesh.

On a laptop: the supervisor's Unix socket tells where the sidecar of the `toolbox` workload listens, and services are
dialed through that sidecar with their own names as authority, as `toolbox` itself would. Where MLMESH_*_TARGET is set
(in the toolbox pod of a cluster) services are dialed directly and the network captures the traffic.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc
from google.protobuf.duration_pb2 import Duration

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh_cli.config import SERVICE_PORT, CliSettings, service_target
from mlmesh_cli.errors import CliError, not_running
from mlmesh_local.state import StateDir
from mlmesh_runtime.config import split_address

if TYPE_CHECKING:
    from mlmesh.registry.v1 import registry_pb2_grpc
    from mlmesh.training.v1 import training_pb2_grpc
    from mlmesh_client import AioClient
    from open_inference import grpc_service_pb2_grpc

CLIENT_WORKLOAD = "toolbox"
CONTROL_DEADLINE_S = 5.0
SERVICE_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """How one service is dialed: its target, and the host of the sidecar's outbound listener (empty: directly)."""

    target: str
    outbound_host: str


def find_instance(status: local_pb2.MeshStatus, workload: str) -> local_pb2.Instance:
    """The first replica of a workload. Raises CliError when there is none."""
    for instance in sorted(status.instances, key=lambda i: i.name):
        if instance.workload == workload:
            return instance
    raise CliError(
        f"the mesh has no workload {workload!r}, whose sidecar this command calls through",
        "keep the Deployment `toolbox` in manifests/base, or restore it with `mlmesh init --force`",
        reason="WORKLOAD_NOT_FOUND",
    )


def outbound_host(instance: local_pb2.Instance, port: int) -> str:
    """The host of the sidecar's outbound listener for a service port. Raises CliError when it has none."""
    for listener in instance.outbound_listeners:
        if listener.port == port:
            return listener.address.rpartition(":")[0]
    raise CliError(
        f"the sidecar of {instance.name} does not listen for service port {port} yet",
        "wait until `mlmesh status` says that the mesh is ready, then try again",
        reason="SIDECAR_NOT_READY",
    )


class Connection:
    """Stubs of the supervisor and of the services; channels are opened at first use and closed at the end.

    Args:
        state_dir: the state folder of the laptop mesh.
        settings: targets from the environment.
        workload: whose sidecar to call through, and so as whom.
    """

    def __init__(self, *, state_dir: Path, settings: CliSettings, workload: str = CLIENT_WORKLOAD) -> None:
        self._state_dir = state_dir
        self._settings = settings
        self._workload = workload
        self._stack = AsyncExitStack()
        self._control: local_pb2_grpc.LocalMeshServiceAsyncStub | None = None
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._status: local_pb2.MeshStatus | None = None

    @classmethod
    def from_environment(cls, state_dir: Path, environ: Mapping[str, str] | None = None) -> Connection:
        """A connection by the environment of this process."""
        return cls(
            state_dir=state_dir, settings=CliSettings.from_environment(os.environ if environ is None else environ)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def control(self) -> local_pb2_grpc.LocalMeshServiceAsyncStub:
        """The supervisor. Raises CliError (exit code 3) when none answers."""
        if self._control is None:
            state = StateDir(self._state_dir)
            where = str(self._state_dir / "control.sock")
            if not state.socket.exists():
                raise not_running(where)
            channel = grpc.aio.insecure_channel(
                state.target,
                options=[
                    ("grpc.default_authority", "localhost"),
                    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
                ],
            )
            await self._stack.enter_async_context(channel)
            stub = local_pb2_grpc.LocalMeshServiceStub(channel)
            try:
                await stub.GetStatus(local_pb2.GetStatusRequest(), timeout=CONTROL_DEADLINE_S)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                raise not_running(where) from error
            self._control = stub
        return self._control

    async def status(self, *, share_window_s: float | None = None) -> local_pb2.MeshStatus:
        """The status of the mesh now; shares are over the window, or over the supervisor's default."""
        request = local_pb2.GetStatusRequest()
        if share_window_s is not None:
            request.share_window.CopyFrom(duration(share_window_s))
        control = await self.control()
        return (await control.GetStatus(request, timeout=CONTROL_DEADLINE_S)).status

    async def route(self, service: str, *, workload: str = "") -> Route:
        """How a service is dialed, as `workload` or as this connection's own."""
        if service in self._settings.targets and not workload:
            return Route(target=self._settings.targets[service], outbound_host=self._settings.outbound_host)
        if self._status is None:
            self._status = await self.status()
        instance = find_instance(self._status, workload or self._workload)
        return Route(target=service_target(service), outbound_host=outbound_host(instance, SERVICE_PORT))

    async def channel(self, service: str, *, workload: str = "") -> grpc.aio.Channel:
        """A channel to a service through the mesh, as `workload` or as this connection's own."""
        from mlmesh_runtime.channel import open_channel  # noqa: PLC0415  half of the time that `mlmesh status` takes

        key = f"{workload}/{service}"
        if key not in self._channels:
            route = await self.route(service, workload=workload)
            channel = open_channel(
                route.target, outbound_host=route.outbound_host or None, default_deadline_s=SERVICE_DEADLINE_S
            )
            self._channels[key] = await self._stack.enter_async_context(channel)
        return self._channels[key]

    async def registry(self, *, workload: str = "") -> registry_pb2_grpc.ModelRegistryServiceAsyncStub:
        """The model registry."""
        from mlmesh.registry.v1 import registry_pb2_grpc  # noqa: PLC0415  each command needs one of the three

        return registry_pb2_grpc.ModelRegistryServiceStub(await self.channel("registry", workload=workload))

    async def training(self, *, workload: str = "") -> training_pb2_grpc.TrainingServiceAsyncStub:
        """The training service."""
        from mlmesh.training.v1 import training_pb2_grpc  # noqa: PLC0415

        return training_pb2_grpc.TrainingServiceStub(await self.channel("training", workload=workload))

    async def inference(self, *, workload: str = "") -> grpc_service_pb2_grpc.GRPCInferenceServiceAsyncStub:
        """Inference: the Open Inference Protocol."""
        from open_inference import grpc_service_pb2_grpc  # noqa: PLC0415

        return grpc_service_pb2_grpc.GRPCInferenceServiceStub(await self.channel("inference", workload=workload))

    async def inference_client(self, *, workload: str = "") -> AioClient:
        """Inference, by the client library; closed with this connection."""
        from mlmesh_client import AioClient  # noqa: PLC0415

        route = await self.route("inference", workload=workload)
        if route.outbound_host:
            _, port = split_address(route.target)
            client = AioClient(f"{route.outbound_host}:{port}", authority=route.target, timeout=SERVICE_DEADLINE_S)
        else:
            client = AioClient(route.target, timeout=SERVICE_DEADLINE_S)
        return await self._stack.enter_async_context(client)

    async def otlp_endpoint(self) -> str:
        """Where client spans go ("host:port"), empty when there is no collector."""
        if self._settings.otlp_endpoint:
            return self._settings.otlp_endpoint.split("://", 1)[-1]
        if self._settings.targets.get("inference"):
            return ""
        route = await self.route("inference")
        block = ".".join(route.outbound_host.split(".")[:2])
        return f"{block}.0.1:4317"


def duration(seconds: float) -> Duration:
    """Seconds as a protobuf Duration."""
    result = Duration()
    result.FromNanoseconds(round(seconds * 1e9))
    return result


def environment() -> Mapping[str, str]:
    """The environment of this process, for commands that are told the names of variables."""
    return os.environ
