"""The one table between domain errors and gRPC statuses, both ways.

Details travel as google.rpc messages in ``grpc-status-details-bin``: ErrorInfo always, BadRequest and RetryInfo where
they say something. `Overloaded` tells gRPC's own retries too when to come back, by ``grpc-retry-pushback-ms`` (gRFC
A6): a client whose retry policy names RESOURCE_EXHAUSTED waits exactly that long.

Everything is cut to a bound: gRPC begins to refuse trailers at 8 KiB, and then the caller would see that refusal and
not the error. On the wire the details grow by a third (base64), the message up to threefold (percent).
"""

from __future__ import annotations

import math
import uuid
from typing import Any, TypeAlias

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from mlmesh_runtime import errors
from mlmesh_runtime.errors import FieldViolation, InvalidInput, MeshError

DOMAIN = "mlmesh"
DETAILS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"
PUSHBACK_MS_MAX = (1 << 31) - 1
TEXT_BYTES_MAX = 400
DETAILS_BYTES_MAX = 4096
VIOLATIONS_MAX = 8
METADATA_ITEMS_MAX = 32
METADATA_BYTES_MAX = 3072
METADATA_KEY_CHARS_MAX = 64

CODES: dict[type[MeshError], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.Conflict: grpc.StatusCode.ABORTED,
    errors.WrongState: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.NotReady: grpc.StatusCode.UNAVAILABLE,
    errors.TimedOut: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.RevisionLost: grpc.StatusCode.OUT_OF_RANGE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Denied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Corrupt: grpc.StatusCode.DATA_LOSS,
    errors.Unsupported: grpc.StatusCode.UNIMPLEMENTED,
}
_ERRORS: dict[grpc.StatusCode, type[MeshError]] = {code: error for error, code in CODES.items()}

_Detail: TypeAlias = error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo
Trailers = tuple[tuple[str, str | bytes], ...]


def code_of(error: MeshError) -> grpc.StatusCode:
    """The status code of an error; INTERNAL for a MeshError that is none of the table's kinds."""
    for kind in type(error).__mro__:
        if (code := CODES.get(kind)) is not None:
            return code
    return grpc.StatusCode.INTERNAL


def to_status(error: MeshError) -> tuple[grpc.StatusCode, str, Trailers]:
    """Code, message and trailing metadata that tell `error` to a client."""
    code = code_of(error)
    message = _cut(error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    for key, value in list(error.metadata.items())[:METADATA_ITEMS_MAX]:
        info.metadata[key[:METADATA_KEY_CHARS_MAX]] = _cut(value, 150)
        if info.ByteSize() > METADATA_BYTES_MAX:
            del info.metadata[key[:METADATA_KEY_CHARS_MAX]]
            break
    details: list[_Detail] = [info]
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(retry)
    if isinstance(error, InvalidInput) and error.violations:
        details.append(_bad_request(error, room=DETAILS_BYTES_MAX - info.ByteSize()))
    status = status_pb2.Status(code=code.value[0], message=message, details=[_any(detail) for detail in details])
    trailers: Trailers = ((DETAILS_KEY, status.SerializeToString()),)
    if error.retry_after_s is not None and isinstance(error, errors.Overloaded):
        # A signed 32-bit number without leading zeros; a negative one would forbid the retry.
        pushback_ms = min(max(math.ceil(error.retry_after_s * 1000), 0), PUSHBACK_MS_MAX)
        trailers = (*trailers, (PUSHBACK_KEY, str(pushback_ms)))
    return code, message, trailers


def _bad_request(error: InvalidInput, *, room: int) -> error_details_pb2.BadRequest:
    """As many violations as fit, the first ones first."""
    bad = error_details_pb2.BadRequest()
    for violation in error.violations[:VIOLATIONS_MAX]:
        bad.field_violations.add(field=_cut(violation.field), description=_cut(violation.description))
        if bad.ByteSize() > room:
            del bad.field_violations[-1]
            break
    return bad


class InternalError(MeshError):
    """What a caller sees of an unexpected exception: a fixed text and the id of the log entry with the rest."""

    default_reason = "INTERNAL"

    def __init__(self, log_id: str) -> None:
        super().__init__(f"internal error; log id {log_id}", metadata={"log_id": log_id})
        self.log_id = log_id

    @classmethod
    def fresh(cls) -> InternalError:
        """An error with a log id nobody has used."""
        return cls(uuid.uuid4().hex[:16])


def single_cause(error: BaseException) -> BaseException:
    """Unwrap exception groups (a handler's TaskGroup makes them) that hold one cause, or only errors for the caller.

    Siblings that were merely cancelled never show in a group, so the first MeshError is the cause.
    """
    while isinstance(error, BaseExceptionGroup):
        causes = list(_leaves(error))
        meant = [cause for cause in causes if isinstance(cause, MeshError)]
        if len(causes) > 1 and len(meant) != len(causes):
            return error
        error = causes[0]
    return error


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


def mesh_error(rpc_error: grpc.aio.AioRpcError) -> MeshError:
    """The typed error that a server told by status and details; the counterpart of `to_status` in a client.

    A status without ErrorInfo (a proxy's, another server's) gives the class of its code and the class's own reason.
    UNKNOWN, INTERNAL, CANCELLED and others outside the table give a plain MeshError.
    """
    code = rpc_error.code()
    message = rpc_error.details() or code.name
    info, bad, retry = _details(rpc_error)
    kind = _ERRORS.get(code)
    reason = info.reason if info is not None and info.domain == DOMAIN else None
    metadata = dict(info.metadata) if info is not None else {}
    retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9 if retry is not None else None
    if kind is None:
        return MeshError(message, reason=reason or code.name, metadata=metadata, retry_after_s=retry_after_s)
    if kind is InvalidInput:
        violations = [
            FieldViolation(field=v.field, description=v.description) for v in (bad.field_violations if bad else ())
        ]
        return InvalidInput(
            message,
            field=violations[0].field if violations else "",
            violations=violations,
            reason=reason,
            metadata=metadata,
        )
    return kind(message, reason=reason, metadata=metadata, retry_after_s=retry_after_s)


def _details(
    rpc_error: grpc.aio.AioRpcError,
) -> tuple[error_details_pb2.ErrorInfo | None, error_details_pb2.BadRequest | None, error_details_pb2.RetryInfo | None]:
    info: error_details_pb2.ErrorInfo | None = None
    bad: error_details_pb2.BadRequest | None = None
    retry: error_details_pb2.RetryInfo | None = None
    trailers: Any = rpc_error.trailing_metadata()
    for key, value in trailers or ():
        if key != DETAILS_KEY or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                    info = error_details_pb2.ErrorInfo.FromString(detail.value)
                elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                    bad = error_details_pb2.BadRequest.FromString(detail.value)
                elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                    retry = error_details_pb2.RetryInfo.FromString(detail.value)
        except Exception:  # noqa: S112  what a peer attached must not hide the status itself
            continue
    return info, bad, retry


def _any(message: _Detail) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _cut(text: str, bytes_max: int = TEXT_BYTES_MAX) -> str:
    raw = text.encode("utf-8", "replace")
    return text if len(raw) <= bytes_max else raw[: bytes_max - 3].decode("utf-8", "ignore") + "…"
