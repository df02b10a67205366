"""What the protocol tells about models: metadata, configuration, statistics, the repository index."""

from __future__ import annotations

from typing import Final

from mlmesh_inference.catalog import Catalog, ReadyModel, State, Status
from mlmesh_inference.statistics import Duration
from mlmesh_inference.tensors import TensorSpec
from open_inference import grpc_service_pb2 as pb
from open_inference import model_config_pb2 as config_pb

SERVER_NAME: Final = "mlmesh"
EXTENSIONS: Final = (
    "classification",
    "model_repository",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
)
"""Extensions that are implemented, and no others."""

_STATES: Final = {
    State.FETCHING: "LOADING",
    State.BUILDING: "LOADING",
    State.WARMING_UP: "LOADING",
    State.READY: "READY",
    State.DRAINING: "UNLOADING",
    State.UNLOADED: "UNAVAILABLE",
    State.FAILED: "UNAVAILABLE",
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


def config(model: ReadyModel) -> config_pb.ModelConfig:
    """Configuration in Triton's terms: dims leave the batch dimension out where max_batch_size is above 0."""
    policy = model.policy
    start = 1 if policy.batches else 0
    result = config_pb.ModelConfig(
        name=model.name,
        platform=model.platform,
        backend=model.platform.partition("_")[0],
        version_policy=config_pb.ModelVersionPolicy(
            specific=config_pb.ModelVersionPolicy.Specific(versions=[model.version])
        ),
        max_batch_size=policy.rows_max if policy.batches else 0,
        input=[
            config_pb.ModelInput(
                name=spec.name, data_type=_data_type(spec), dims=spec.shape[start:], optional=spec.optional
            )
            for spec in model.signature.inputs
        ],
        output=[
            config_pb.ModelOutput(name=spec.name, data_type=_data_type(spec), dims=spec.shape[start:])
            for spec in model.signature.outputs
        ],
        instance_group=[
            config_pb.ModelInstanceGroup(name=model.name, kind=_kind(model), count=model.concurrency),
        ],
        default_model_filename="model.onnx",
    )
    if policy.batches:
        result.dynamic_batching.preferred_batch_size.append(policy.rows_preferred)
        result.dynamic_batching.preserve_ordering = True
        queue = result.dynamic_batching.default_queue_policy
        queue.max_queue_size = policy.queue_items_max
        queue.allow_timeout_override = True
    return result


def _data_type(spec: TensorSpec) -> config_pb.DataType.ValueType:
    name = "STRING" if spec.datatype.name == "BYTES" else spec.datatype.name
    return config_pb.DataType.Value(f"TYPE_{name}")


def _kind(model: ReadyModel) -> config_pb.ModelInstanceGroup.Kind.ValueType:
    on_gpu = model.platform.startswith("tensorrt")
    return config_pb.ModelInstanceGroup.KIND_GPU if on_gpu else config_pb.ModelInstanceGroup.KIND_CPU


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
    return result


def _duration(duration: Duration) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=duration.count, ns=duration.ns)


def index(catalog: Catalog, *, ready_only: bool) -> pb.RepositoryIndexResponse:
    """Every version known, or only those that answer."""
    response = pb.RepositoryIndexResponse()
    for status in catalog.statuses():
        if not ready_only or status.state is State.READY:
            response.models.add(
                name=status.model,
                version=str(status.version),
                state=_STATES[status.state],
                reason=_reason(status),
            )
    return response


def _reason(status: Status) -> str:
    return status.error if status.state is not State.READY else ""
