"""Messages to values and back; nothing is decided here."""

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_registry import names
from mlmesh_registry.convert_gates import gate
from mlmesh_registry.events import (
    Bookmark,
    Change,
    DeletedAlias,
    DeletedModel,
    DeletedVersion,
    from_micros,
    to_micros,
)
from mlmesh_registry.ledger import Blob, Upload
from mlmesh_registry.versions import (
    Alias,
    Artifact,
    Content,
    Lineage,
    Model,
    ModelKind,
    Signature,
    Stage,
    TensorSpec,
    Version,
    etag,
)
from mlmesh_runtime.errors import InvalidInput


def model(value: Model) -> pb.Model:
    """Model → message."""
    return pb.Model(
        name=value.name,
        description=value.description,
        labels=value.labels,
        create_time=timestamp(value.create_time),
        update_time=timestamp(value.update_time),
        etag=value.etag,
        latest_version=value.latest_version,
        kind=pb.ModelKind.Value(f"MODEL_KIND_{value.kind}"),
        gates=map(gate, value.gates),
        delete_time=_optional(value.delete_time),
        purge_time=_optional(value.purge_time),
    )


def version(value: Version) -> pb.ModelVersion:
    """Version → message."""
    content = value.content
    return pb.ModelVersion(
        name=value.name,
        artifacts=[
            pb.Artifact(
                path=artifact.path,
                blob=names.blob_name(artifact.sha256),
                size_bytes=artifact.size_bytes,
                media_type=artifact.media_type,
            )
            for artifact in content.artifacts
        ],
        signature=pb.ModelSignature(
            inputs=[_tensor(tensor) for tensor in content.signature.inputs],
            outputs=[_tensor(tensor) for tensor in content.signature.outputs],
        ),
        metrics=content.metrics,
        labels=content.labels,
        lineage=pb.Lineage(
            job=content.lineage.job,
            dataset=content.lineage.dataset,
            dataset_fingerprint=content.lineage.dataset_fingerprint,
            code_digest=content.lineage.code_digest,
            environment_digest=content.lineage.environment_digest,
            parents=content.lineage.parents,
            study=content.lineage.study,
            source_uri=content.lineage.source_uri,
        ),
        description=content.description,
        model_card=content.model_card,
        digest=value.digest,
        create_time=timestamp(value.create_time),
        creator=value.creator,
        revision=value.revision,
        aliases=[f"models/{value.model}/aliases/{alias}" for alias in value.aliases],
        stage=pb.VersionStage.Value(f"VERSION_STAGE_{value.stage}"),
        stage_reason=value.stage_reason,
        etag=value.etag,
        verify_time=_optional(value.verify_time),
        delete_time=_optional(value.delete_time),
        purge_time=_optional(value.purge_time),
        size_bytes=value.size_bytes,
    )


def content(message: pb.ModelVersion) -> Content:
    """Message → content; output-only fields are ignored. Errors: InvalidInput for a blob name of another form."""
    return Content(
        artifacts=tuple(
            Artifact(
                path=artifact.path,
                sha256=names.parse_blob(artifact.blob, f"model_version.artifacts[{position}].blob"),
                media_type=artifact.media_type,
            )
            for position, artifact in enumerate(message.artifacts)
        ),
        signature=Signature(
            inputs=tuple(_tensor_spec(tensor) for tensor in message.signature.inputs),
            outputs=tuple(_tensor_spec(tensor) for tensor in message.signature.outputs),
        ),
        metrics=dict(message.metrics),
        labels=dict(message.labels),
        lineage=Lineage(
            job=message.lineage.job,
            dataset=message.lineage.dataset,
            dataset_fingerprint=message.lineage.dataset_fingerprint,
            code_digest=message.lineage.code_digest,
            environment_digest=message.lineage.environment_digest,
            parents=tuple(message.lineage.parents),
            study=message.lineage.study,
            source_uri=message.lineage.source_uri,
        ),
        description=message.description,
        model_card=message.model_card,
    )


def alias(value: Alias) -> pb.ModelAlias:
    """Alias → message."""
    return pb.ModelAlias(
        name=value.name,
        version=value.version_name,
        etag=value.etag,
        update_time=timestamp(value.update_time),
        updater=value.updater,
        revision=value.revision,
    )


def event(value: Change | Bookmark) -> pb.WatchModelsResponse:
    """Change or bookmark → message."""
    response = pb.WatchModelsResponse(revision=value.revision, time=timestamp(value.time))
    if isinstance(value, Bookmark):
        response.bookmark.SetInParent()
        return response
    response.actor = value.actor
    match value.subject:
        case Model():
            response.model.CopyFrom(model(value.subject))
        case Version():
            response.model_version.CopyFrom(version(value.subject))
        case Alias():
            response.alias.CopyFrom(alias(value.subject))
        case DeletedAlias():
            response.deleted_alias.name = f"models/{value.subject.model}/aliases/{value.subject.alias}"
            response.deleted_alias.version = f"models/{value.subject.model}/versions/{value.subject.version}"
        case DeletedVersion():
            response.deleted_model_version.CopyFrom(_deleted_version(value.subject))
        case DeletedModel():
            response.deleted_model.CopyFrom(model(value.subject.model))
    return response


def kind_of(message: pb.ModelKind.ValueType) -> ModelKind:
    """Message → kind; not set means MODEL."""
    return "DATASET" if message == pb.MODEL_KIND_DATASET else "MODEL"


def stage_of(message: pb.VersionStage.ValueType) -> Stage:
    """Message → stage. Errors: InvalidInput for none."""
    found = _STAGES.get(message)
    if found is None:
        raise InvalidInput(f"stage: expected one of {', '.join(_STAGES.values())}", field="stage")
    return found


def _deleted_version(value: DeletedVersion) -> pb.ModelVersion:
    return pb.ModelVersion(
        name=f"models/{value.model}/versions/{value.number}",
        digest=value.digest,
        revision=value.revision,
        etag=etag(value.meta_revision),
        delete_time=timestamp(value.delete_time),
        purge_time=timestamp(value.purge_time),
    )


def upload(value: Upload) -> pb.Upload:
    """Upload → message."""
    return pb.Upload(
        name=value.name,
        size_bytes=value.size_bytes,
        committed_bytes=value.committed_bytes,
        expire_time=timestamp(value.expire_time),
    )


def blob(value: Blob) -> pb.Blob:
    """Blob → message."""
    return pb.Blob(name=value.name, size_bytes=value.size_bytes)


def _optional(time: datetime | None) -> Timestamp | None:
    return None if time is None else timestamp(time)


def timestamp(time: datetime) -> Timestamp:
    """UTC datetime → Timestamp, exact to the microsecond."""
    message = Timestamp()
    message.FromMicroseconds(to_micros(time))
    return message


def datetime_of(message: Timestamp) -> datetime:
    """Inverse of timestamp."""
    return from_micros(message.ToMicroseconds())


_STAGES: dict[pb.VersionStage.ValueType, Stage] = {
    pb.VERSION_STAGE_ACTIVE: "ACTIVE",
    pb.VERSION_STAGE_DEPRECATED: "DEPRECATED",
    pb.VERSION_STAGE_QUARANTINED: "QUARANTINED",
}


def _tensor(tensor: TensorSpec) -> pb.TensorSpec:
    return pb.TensorSpec(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


def _tensor_spec(message: pb.TensorSpec) -> TensorSpec:
    return TensorSpec(name=message.name, datatype=message.datatype, shape=tuple(message.shape))
