"""What the protocol tells about models: metadata, configuration, statistics, the repository index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from mlmesh_inference.catalog import Catalog, ReadyModel, State, Status
from mlmesh_inference.oip.shared_memory import RegionStatus
from mlmesh_inference.statistics import Duration
from mlmesh_inference.tensors import TensorSpec
from open_inference import grpc_service_pb2 as pb

SERVER_NAME: Final = "mlmesh"
EXTENSIONS: Final = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
"""Extensions that are implemented, and no others; shared memory comes on top where it is enabled."""

_STATES: Final = {
    State.FETCHING: "LOADING",
    State.BUILDING: "LOADING",
    State.WARMING_UP: "LOADING",
    State.READY: "READY",
    State.DRAINING: "UNLOADING",
    State.UNLOADED: "UNAVAILABLE",
    State.FAILED: "UNAVAILABLE",
    State.ASLEEP: "UNAVAILABLE",
}


def metadata(catalog: Catalog, model: ReadyModel) -> pb.ModelMetadataResponse:
    """Tensors with their batch dimension, -1 where a dimension is variable; versions that answer."""
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=[version.version_text for version in catalog.versions(model.name)],
        platform=model.platform,
        inputs=[_tensor(spec) for spec in model.signature.inputs],
        outputs=[_tensor(spec) for spec in model.signature.outputs],
    )


def _tensor(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype.name, shape=spec.shape)


def extensions(*, shared_memory: bool) -> tuple[str, ...]:
    """What the server says that it can."""
    return (*EXTENSIONS, "system_shared_memory") if shared_memory else EXTENSIONS


def regions(statuses: Mapping[str, RegionStatus]) -> pb.SystemSharedMemoryStatusResponse:
    """Shared memory that is registered, by name."""
    response = pb.SystemSharedMemoryStatusResponse()
    for name, status in statuses.items():
        region = response.regions[name]
        region.name, region.key, region.offset, region.byte_size = name, status.key, status.offset, status.byte_size
    return response


def trace_settings(settings: Mapping[str, Sequence[str]]) -> pb.TraceSettingResponse:
    """Settings of traces as they hold."""
    response = pb.TraceSettingResponse()
    for name, values in settings.items():
        response.settings[name].value.extend(values)
    return response


def log_settings(settings: Mapping[str, bool | int | str]) -> pb.LogSettingsResponse:
    """Settings of the log as they hold."""
    response = pb.LogSettingsResponse()
    for name, value in settings.items():
        if isinstance(value, bool):
            response.settings[name].bool_param = value
        elif isinstance(value, int):
            response.settings[name].uint32_param = value
        else:
            response.settings[name].string_param = value
    return response


def statistics(model: ReadyModel) -> pb.ModelStatistics:
    """Counts and times since the version was loaded."""
    stats = model.statistics
    result = pb.ModelStatistics(
        name=model.name,
        version=model.version_text,
        last_inference=int(stats.last_inference_s * 1000),
        inference_count=stats.inference_count,
        execution_count=stats.execution_count,
        inference_stats=pb.InferStatistics(
            success=_duration(stats.success),
            fail=_duration(stats.fail),
            queue=_duration(stats.queue),
            compute_input=_duration(stats.input),
            compute_infer=_duration(stats.infer),
            compute_output=_duration(stats.output),
            cache_hit=pb.StatisticDuration(),
            cache_miss=pb.StatisticDuration(),
        ),
    )
    for rows, costs in sorted(stats.batches.items()):
        result.batch_stats.add(
            batch_size=rows,
            compute_input=_duration(costs.input),
            compute_infer=_duration(costs.infer),
            compute_output=_duration(costs.output),
        )
    for memory in stats.memory:
        result.memory_usage.add(type=memory.kind, id=memory.device, byte_size=memory.size_bytes)
    for place, response in sorted(stats.responses.items()):
        result.response_stats[str(place)].CopyFrom(
            pb.InferResponseStatistics(
                compute_infer=_duration(response.infer),
                compute_output=_duration(response.output),
                success=_duration(response.success),
                fail=_duration(response.fail),
                empty_response=_duration(response.empty),
                cancel=_duration(response.cancel),
            )
        )
    return result


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)


def index(catalog: Catalog, known: Iterable[tuple[str, int, str]], *, ready_only: bool) -> pb.RepositoryIndexResponse:
    """Every version, or only those that answer. `known` are those of the repository, and why one is not served."""
    found = {(status.model, status.version): (_STATES[status.state], _reason(status)) for status in catalog.statuses()}
    unserved = {(model, version): ("UNAVAILABLE", why) for model, version, why in known}
    response = pb.RepositoryIndexResponse()
    for (model, version), (state, why) in sorted({**unserved, **found}.items()):
        if not ready_only or state == "READY":
            response.models.add(name=model, version=str(version), state=state, reason=why)
    return response


def _reason(status: Status) -> str:
    if status.state is State.ASLEEP:
        return "asleep: loaded when it is asked for"
    return status.error if status.state is not State.READY else ""
