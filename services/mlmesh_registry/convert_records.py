"""History, quotas, the audit log and reports: messages to values and back; nothing is decided here."""

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_registry.audit import AuditEntry
from mlmesh_registry.convert import timestamp, version
from mlmesh_registry.convert_gates import gate_result
from mlmesh_registry.garbage import Report
from mlmesh_registry.moves import AliasMove, version_name
from mlmesh_registry.quotas import Limits, Quota
from mlmesh_registry.verification import Verified


def alias_move(value: AliasMove) -> pb.AliasMove:
    """Move → message."""
    return pb.AliasMove(
        alias=value.name,
        from_version=version_name(value.model, value.from_version),
        to_version=version_name(value.model, value.to_version),
        time=timestamp(value.time),
        actor=value.actor,
        reason=value.reason,
        revision=value.revision,
        gate_results=map(gate_result, value.gate_results),
    )


def quota(value: Quota) -> pb.Quota:
    """Limits and use → message."""
    return pb.Quota(
        name=value.name,
        bytes_max=value.limits.bytes_max,
        versions_max=value.limits.versions_max,
        models_max=value.limits.models_max,
        bytes_used=value.bytes_used,
        versions_used=value.versions_used,
        models_used=value.models_used,
        etag=value.etag,
    )


def limits(message: pb.Quota) -> Limits:
    """Message → limits; output-only fields are ignored."""
    return Limits(bytes_max=message.bytes_max, versions_max=message.versions_max, models_max=message.models_max)


def audit_entry(value: AuditEntry) -> pb.AuditEntry:
    """Audit entry → message."""
    return pb.AuditEntry(
        sequence=value.sequence,
        time=timestamp(value.time),
        actor=value.actor,
        method=value.method,
        resource=value.resource,
        detail=value.detail,
        previous_digest=value.previous_digest,
        digest=value.digest,
    )


def garbage(value: Report, *, dry_run: bool) -> pb.CollectGarbageResponse:
    """What was removed, or would be → message."""
    return pb.CollectGarbageResponse(
        freed_bytes=value.freed_bytes,
        blobs=value.blobs,
        blob_count=value.blob_count,
        purged=value.purged,
        purged_count=value.purged_count,
        dry_run=dry_run,
    )


def verified(value: Verified) -> pb.VerifyModelVersionResponse:
    """What a verification found → message."""
    return pb.VerifyModelVersionResponse(
        model_version=version(value.version),
        corrupt_paths=value.corrupt_paths,
        verified_bytes=value.verified_bytes,
    )
