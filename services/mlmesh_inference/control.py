"""mlmesh.inference.v1.InferenceControlService: what is loaded, how loading goes, which engines there are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from google.longrunning.operations_pb2 import Operation
from google.protobuf.timestamp_pb2 import Timestamp

from mlmesh.inference.v1 import control_pb2 as pb
from mlmesh.inference.v1 import control_pb2_grpc as stubs
from mlmesh_inference.builds import Builds
from mlmesh_inference.catalog import Catalog, Status
from mlmesh_inference.engines.base import EngineKind
from mlmesh_inference.engines.selection import Trial
from mlmesh_inference.moving import OpenStreams
from mlmesh_inference.operations import operation, operation_name
from mlmesh_runtime.errors import NotFound, Unsupported

WATCH_METHODS: Final = frozenset({"WatchServedVersions"})
"""RPCs that need no deadline."""


class InferenceControlServicer(stubs.InferenceControlServiceServicer):
    """Implements InferenceControlService over a catalog, the engines that were tried in their order, open streams."""

    def __init__(
        self, catalog: Catalog, kinds: Sequence[EngineKind], streams: OpenStreams, builds: Builds | None = None
    ) -> None:
        self._catalog = catalog
        self._kinds = kinds
        self._streams = streams
        self._builds = builds

    async def ListServedVersions(
        self,
        request: pb.ListServedVersionsRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.ListServedVersionsResponse:
        """Versions by name and number."""
        statuses = self._catalog.statuses(request.parent.removeprefix("models/"))
        return pb.ListServedVersionsResponse(served_versions=[self._served(status) for status in statuses])

    async def WatchServedVersions(
        self,
        request: pb.WatchServedVersionsRequest,
        context: Any,  # noqa: ARG002
    ) -> AsyncIterator[pb.WatchServedVersionsResponse]:
        """The present state, then every change."""
        model = request.parent.removeprefix("models/")
        async with self._catalog.watch(model) as changes:
            for status in self._catalog.statuses(model):
                yield pb.WatchServedVersionsResponse(served_version=self._served(status))
            async for status in changes:
                yield pb.WatchServedVersionsResponse(served_version=self._served(status))

    async def GetServedVersion(
        self,
        request: pb.GetServedVersionRequest,
        context: Any,  # noqa: ARG002
    ) -> pb.GetServedVersionResponse:
        """One version."""
        _, model, _, number = request.name.split("/")
        status = self._catalog.status(model, int(number))
        if status is None:
            raise NotFound(f"'{request.name}' is not known to this process", reason="MODEL_NOT_FOUND")
        return pb.GetServedVersionResponse(served_version=self._served(status))

    async def BuildEngine(self, request: pb.BuildEngineRequest, context: Any) -> Operation:  # noqa: ARG002
        """An operation, begun or joined."""
        if self._builds is None:
            raise Unsupported("this process builds no engines", reason="METHOD_NOT_IMPLEMENTED")
        _, model, _, number = request.name.split("/")
        build = await self._builds.start(
            model, int(number), request.engine, request_id=request.request_id, build_only=request.build_only
        )
        return operation(build)

    async def MoveStreams(self, request: pb.MoveStreamsRequest, context: Any) -> pb.MoveStreamsResponse:  # noqa: ARG002
        """Ask streams to open again."""
        _, _, parent = request.parent.partition("/")
        model, _, version = parent.partition("/versions/")
        spread_s = request.spread.ToNanoseconds() / 1e9
        asked = self._streams.move(model=model, version=int(version or 0), share=request.share, spread_s=spread_s)
        return pb.MoveStreamsResponse(
            stream_count=asked.stream_count, asked_count=asked.asked_count, pinned_count=asked.pinned_count
        )

    async def ListEngines(self, request: pb.ListEnginesRequest, context: Any) -> pb.ListEnginesResponse:  # noqa: ARG002
        """Engines in the order of preference."""
        response = pb.ListEnginesResponse()
        for kind in self._kinds:
            found = kind.probe()
            response.engines.add(name=kind.name, available=found.available, reason=found.reason, version=found.version)
        return response

    def _served(self, status: Status) -> pb.ServedVersion:
        served = pb.ServedVersion(
            name=f"models/{status.model}/versions/{status.version}",
            state=pb.ServedState.Value(f"SERVED_STATE_{status.state.name}"),
            engine=status.engine,
            engine_reason=status.engine_reason,
            error=status.error,
            update_time=_timestamp(status.updated_s),
            fetched_bytes=status.fetched_bytes,
            total_bytes=status.total_bytes,
            default_version=status.default,
            model_sha256=status.sha256,
        )
        build = self._builds.under_way(status.model, status.version) if self._builds else None
        if build is not None:
            served.build_operation = operation_name(build)
        ready = self._catalog.ready(status.model, status.version)
        if ready is not None:
            served.batch_size_max = ready.policy.rows_max if ready.policy.batches else 1
            served.batch_size_preferred = ready.policy.rows_preferred if ready.policy.batches else 1
            served.precision = ready.facts.precision
            served.memory_bytes = ready.facts.memory_bytes
            served.trials.extend(map(_trial, ready.trials))
            served.inference_count = ready.statistics.inference_count
            served.execution_count = ready.statistics.execution_count
            served.queue_depth = ready.runner.depth
            served.concurrency_limit = ready.statistics.concurrency_limit
            served.stream_count = self._streams.open_at(status.model, status.version)
        return served


def _trial(trial: Trial) -> pb.EngineTrial:
    message = pb.EngineTrial(
        engine=trial.engine,
        precision=trial.precision,
        chosen=trial.chosen,
        reason=trial.reason,
        error_max=trial.error_max,
    )
    for rows, seconds in trial.batch_times:
        message.batch_times.add(rows=rows).duration.FromNanoseconds(int(seconds * 1e9))
    return message


def _timestamp(seconds: float) -> Timestamp:
    result = Timestamp()
    result.FromNanoseconds(int(seconds * 1e9))
    return result
