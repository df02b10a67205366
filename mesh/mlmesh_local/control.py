# ruff: noqa: ARG002  gRPC hands every method a context; few need it
"""The control service of a running laptop mesh."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh_local import looking, messages
from mlmesh_local.chaos.faults import DURATION_MAX_S, Part
from mlmesh_local.mesh import Mesh
from mlmesh_local.metrics.queries import HISTORY_S, unknown_labels
from mlmesh_local.pki import LEAF_TTL
from mlmesh_local.proxyless.node import ProxylessNode, node_id, tolerated_fields
from mlmesh_local.resources.gateway_api.derive import derive
from mlmesh_local.resources.gateway_api.status import text_with_status
from mlmesh_local.resources.parse import DEFAULT_NAMESPACE, Document
from mlmesh_local.routes import list_routes
from mlmesh_runtime.errors import InvalidInput
from mlmesh_runtime.executors import run_blocking

Context = grpc.aio.ServicerContext[Any, Any]

ACK_S = 10.0
SHARE_WINDOW_S = 60.0
WATCH_INTERVAL_S = 1.0
# A burst of changes is one message: nobody reads faster.
WATCH_PAUSE_S = 0.1
TRACES_PAGE = 20
METRICS_BY = ("source_workload", "destination_service_name", "destination_workload")
GROUPS_MAX = 1000
FAULT_S = 30.0


class LocalMeshServicer(local_pb2_grpc.LocalMeshServiceServicer):
    """Implements LocalMeshService."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def GetStatus(self, request: local_pb2.GetStatusRequest, context: Context) -> local_pb2.GetStatusResponse:
        """The status now."""
        window_s = _seconds(request, "share_window", SHARE_WINDOW_S)
        return local_pb2.GetStatusResponse(
            status=messages.mesh_status(self._mesh, await self._mesh.stats.observed(window_s))
        )

    async def WatchStatus(
        self, request: local_pb2.WatchStatusRequest, context: Context
    ) -> AsyncIterator[local_pb2.WatchStatusResponse]:
        """The status as it changes."""
        interval_s = max(WATCH_PAUSE_S, _seconds(request, "interval", WATCH_INTERVAL_S))
        while True:
            seen = self._mesh.changes.count
            observed = await self._mesh.stats.observed(SHARE_WINDOW_S)
            yield local_pb2.WatchStatusResponse(status=messages.mesh_status(self._mesh, observed))
            await asyncio.sleep(WATCH_PAUSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s - WATCH_PAUSE_S):
                    await self._mesh.changes.beyond(seen)

    async def Apply(self, request: local_pb2.ApplyRequest, context: Context) -> local_pb2.ApplyResponse:
        """Make resources active, everywhere or nowhere."""
        documents = [
            Document(source=document.source or "request", text=document.yaml) for document in request.documents
        ]
        outcome = await self._mesh.apply(
            documents, prune=request.prune, dry_run=request.dry_run, timeout_s=_ack_timeout_s(context)
        )
        return messages.apply_response(outcome)

    async def DeleteResources(
        self, request: local_pb2.DeleteResourcesRequest, context: Context
    ) -> local_pb2.DeleteResourcesResponse:
        """Remove resources, everywhere or nowhere."""
        names = [
            (item.kind, item.name if "/" in item.name else f"{DEFAULT_NAMESPACE}/{item.name}")
            for item in request.resources
        ]
        outcome = await self._mesh.delete(
            names, allow_missing=request.allow_missing, dry_run=request.dry_run, timeout_s=_ack_timeout_s(context)
        )
        return messages.delete_response(outcome)

    async def ListResources(
        self, request: local_pb2.ListResourcesRequest, context: Context
    ) -> local_pb2.ListResourcesResponse:
        """Active resources, those of the Gateway API with their statuses."""
        statuses = self._mesh.statuses()
        return local_pb2.ListResourcesResponse(
            resources=[
                local_pb2.Resource(
                    kind=item.kind,
                    name=item.name,
                    source=item.source,
                    yaml=text_with_status(item, statuses.get(item.key)),
                )
                for item in self._mesh.resources.listed(request.kind)
            ]
        )

    async def GetWorld(self, request: local_pb2.GetWorldRequest, context: Context) -> local_pb2.GetWorldResponse:
        """What configuration is made from."""
        return looking.world(self._mesh.configuration)

    async def GetConfigDump(
        self, request: local_pb2.GetConfigDumpRequest, context: Context
    ) -> local_pb2.GetConfigDumpResponse:
        """What sidecars were told."""
        return looking.config_dump(self._mesh, request)

    async def ListRoutes(self, request: local_pb2.ListRoutesRequest, context: Context) -> local_pb2.ListRoutesResponse:
        """Routes with their shares."""
        observed = self._mesh.metering.rules.observed(_seconds(request, "share_window", SHARE_WINDOW_S))
        routes = list_routes(derive(self._mesh.resources), request.host)
        return local_pb2.ListRoutesResponse(routes=[messages.route(item, observed) for item in routes])

    async def GetMetrics(self, request: local_pb2.GetMetricsRequest, context: Context) -> local_pb2.GetMetricsResponse:
        """Rates, errors and latencies by labels."""
        window_s = _seconds(request, "window", SHARE_WINDOW_S, most=HISTORY_S)
        by = tuple(request.by) or METRICS_BY
        unknown = unknown_labels([*by, *request.where])
        if unknown:
            raise InvalidInput(f"{unknown[0]} is not a label of istio_requests_total", field="by")
        where = {"reporter": "destination", **request.where}
        covered_s, rows = self._mesh.metering.history.query(window_s, by=by, where=where)
        return local_pb2.GetMetricsResponse(
            groups=[messages.call_group(row, covered_s) for row in rows[:GROUPS_MAX]],
            window=messages.duration(round(covered_s * 1e9)),
        )

    async def ListTraces(self, request: local_pb2.ListTracesRequest, context: Context) -> local_pb2.ListTracesResponse:
        """Traces, newest first."""
        found = await run_blocking(
            self._mesh.trace_executor,
            self._mesh.traces.list_traces,
            request.page_size or TRACES_PAGE,
            messages.trace_filter(request),
        )
        return local_pb2.ListTracesResponse(traces=[messages.trace_summary(trace) for trace in found])

    async def GetTrace(self, request: local_pb2.GetTraceRequest, context: Context) -> local_pb2.GetTraceResponse:
        """One trace."""
        spans = await run_blocking(self._mesh.trace_executor, self._mesh.traces.get_trace, request.trace_id)
        return local_pb2.GetTraceResponse(trace_id=spans[0].trace_id, spans=[messages.span(item) for item in spans])

    async def IssueCertificate(
        self, request: local_pb2.IssueCertificateRequest, context: Context
    ) -> local_pb2.IssueCertificateResponse:
        """A certificate for a tool."""
        ttl_s = _seconds(request, "ttl", 3600.0, most=LEAF_TTL.total_seconds())
        issued = self._mesh.issue(request.service_account, request.namespace or "mlmesh", timedelta(seconds=ttl_s))
        return messages.issued(issued)

    async def IssueXdsBootstrap(
        self, request: local_pb2.IssueXdsBootstrapRequest, context: Context
    ) -> local_pb2.IssueXdsBootstrapResponse:
        """What a gRPC client without a sidecar starts with."""
        ttl_s = _seconds(request, "ttl", 3600.0, most=LEAF_TTL.total_seconds())
        namespace = request.namespace or "mlmesh"
        node = ProxylessNode(
            id=node_id(namespace, request.service_account, secrets.token_hex(4)),
            namespace=namespace,
            service_account=request.service_account,
            labels=dict(request.labels),
            tolerated=tolerated_fields(request.tolerated),
        )
        content = self._mesh.configuration.client_bootstrap(node, request.folder)
        issued = self._mesh.issue(request.service_account, namespace, timedelta(seconds=ttl_s))
        return local_pb2.IssueXdsBootstrapResponse(
            bootstrap_json=json.dumps(content, indent=2), certificate=messages.issued(issued)
        )

    async def RotateCertificates(
        self, request: local_pb2.RotateCertificatesRequest, context: Context
    ) -> local_pb2.RotateCertificatesResponse:
        """New certificates for every sidecar."""
        return local_pb2.RotateCertificatesResponse(rotated=self._mesh.certificates.rotate())

    async def RotateRoot(
        self, request: local_pb2.RotateRootRequest, context: Context
    ) -> AsyncIterator[local_pb2.RotateRootResponse]:
        """A new root, step by step."""
        async for step in self._mesh.rotation.rotate(now=request.now):
            yield local_pb2.RotateRootResponse(message=step)

    async def GetTrustBundle(
        self, request: local_pb2.GetTrustBundleRequest, context: Context
    ) -> local_pb2.GetTrustBundleResponse:
        """The roots that are trusted."""
        return messages.trust_bundle(self._mesh)

    async def RestartWorkload(
        self, request: local_pb2.RestartWorkloadRequest, context: Context
    ) -> local_pb2.RestartWorkloadResponse:
        """Restart replicas, one at a time."""
        return local_pb2.RestartWorkloadResponse(instances=await self._mesh.restart(request.name))

    async def InjectFault(
        self, request: local_pb2.InjectFaultRequest, context: Context
    ) -> local_pb2.InjectFaultResponse:
        """Disturb instances on purpose."""
        faults, duration_s = self._mesh.faults, _seconds(request, "duration", FAULT_S, most=DURATION_MAX_S)
        if request.HasField("network"):
            names = await faults.disturb(request.target, messages.disturbance(request.network), duration_s)
        else:
            sidecar = request.process.part == local_pb2.PROCESS_PART_SIDECAR
            part: Part = "sidecar" if sidecar else "application"
            stop = request.process.stop
            names = faults.stop(request.target, part, duration_s) if stop else faults.kill(request.target, part)
        active = [fault for fault in self._faults() if fault.instance in names]
        return local_pb2.InjectFaultResponse(faults=active, instances=names)

    async def ListFaults(self, request: local_pb2.ListFaultsRequest, context: Context) -> local_pb2.ListFaultsResponse:
        """Faults that are active."""
        return local_pb2.ListFaultsResponse(faults=self._faults())

    async def RemoveFaults(
        self, request: local_pb2.RemoveFaultsRequest, context: Context
    ) -> local_pb2.RemoveFaultsResponse:
        """End faults before their time."""
        return local_pb2.RemoveFaultsResponse(removed=await self._mesh.faults.remove(request.target))

    def _faults(self) -> list[local_pb2.Fault]:
        now, now_loop = datetime.now(UTC), asyncio.get_running_loop().time()
        return [messages.fault(item, now=now, now_loop=now_loop) for item in self._mesh.faults.active()]

    async def Shutdown(
        self, request: local_pb2.ShutdownRequest, context: Context
    ) -> AsyncIterator[local_pb2.ShutdownResponse]:
        """End the mesh and tell each step."""
        async for step in self._mesh.end_and_tell():
            yield local_pb2.ShutdownResponse(message=step)


def _seconds(request: Any, field: str, default: float, *, most: float = 86400.0) -> float:
    if not request.HasField(field):
        return default
    value: Duration = getattr(request, field)
    seconds = value.seconds + value.nanos / 1e9
    if not 0 < seconds <= most:
        raise InvalidInput(f"{field} must be more than 0 s and at most {most:g} s, not {seconds:g} s", field=field)
    return seconds


def _ack_timeout_s(context: Context) -> float:
    # Some time is left to answer in.
    remaining = context.time_remaining()
    return ACK_S if remaining is None else max(0.1, min(ACK_S, remaining - 0.5))
