# ruff: noqa: N818  errors are named by what is wrong
"""What can go wrong, as exceptions that say what to do next.

A server of mlmesh tells a stable `reason`, the field at fault and when to come back (google.rpc details); any other
server of the protocol tells a status code and a text, and the rest stays empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc
from google.rpc import error_details_pb2, status_pb2

from open_inference import grpc_service_pb2 as pb

_DETAILS: Final = "grpc-status-details-bin"
_PUSHBACK: Final = "grpc-retry-pushback-ms"
_DOMAIN: Final = "mlmesh"


class InferenceError(Exception):
    """A request failed.

    Attributes:
        message: for a person.
        code: name of the gRPC status code, such as "INVALID_ARGUMENT".
        reason: stable name of what is wrong, such as "SHAPE_MISMATCH"; the code's name where the server tells none.
        field: of the request that is wrong, such as "inputs[x].shape"; "" when none is.
        retry_after_s: when it makes sense to try again; None when the server did not say.
        retryable: False when the server said not to try again.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "UNKNOWN",
        reason: str = "",
        field: str = "",
        retry_after_s: float | None = None,
        retryable: bool = True,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason or code
        self.field = field
        self.retry_after_s = retry_after_s
        self.retryable = retryable

    def __repr__(self) -> str:
        place = f", field={self.field!r}" if self.field else ""
        return f"{type(self).__name__}({self.message!r}, code={self.code!r}, reason={self.reason!r}{place})"


class InvalidInput(InferenceError):
    """The request is wrong and never succeeds as it is. Also raised here, before anything is sent."""


class NotFound(InferenceError):
    """There is no such model or version."""


class Overloaded(InferenceError):
    """The server has enough to do: come back after `retry_after_s`."""


class Unavailable(InferenceError):
    """No server answers, or the model is not ready."""


class TimedOut(InferenceError):
    """The time ran out, here or on the server."""


class Denied(InferenceError):
    """The caller is unknown, or may not."""


class Unsupported(InferenceError):
    """The server or the model cannot do that."""


class ServerError(InferenceError):
    """The server failed on a request that was in order."""


class SequenceLost(InferenceError):
    """No server holds the sequence's state (any more): begin the sequence again."""


_KINDS: Final[Mapping[str, type[InferenceError]]] = {
    "INVALID_ARGUMENT": InvalidInput,
    "OUT_OF_RANGE": InvalidInput,
    "NOT_FOUND": NotFound,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": TimedOut,
    "PERMISSION_DENIED": Denied,
    "UNAUTHENTICATED": Denied,
    "UNIMPLEMENTED": Unsupported,
    "FAILED_PRECONDITION": Unsupported,
    "INTERNAL": ServerError,
    "UNKNOWN": ServerError,
    "DATA_LOSS": ServerError,
}


def error_of(code: str, message: str, **details: Any) -> InferenceError:
    """The exception of a status code."""
    kind = SequenceLost if details.get("reason") == "SEQUENCE_NOT_FOUND" else _KINDS.get(code, InferenceError)
    return kind(message, code=code, **details)


def invalid(message: str, field: str) -> InvalidInput:
    """What is found wrong before anything is sent."""
    return InvalidInput(message, code="INVALID_ARGUMENT", reason="INVALID_FIELD", field=field)


def from_call(error: grpc.RpcError) -> InferenceError:
    """The exception of a call that failed, sync or aio."""
    call: Any = error
    code = call.code().name
    reason, field, retry_after_s = _details(call.trailing_metadata() or ())
    pushback_s, retryable = _pushback(call.trailing_metadata() or ())
    if pushback_s is not None:
        retry_after_s = pushback_s if retry_after_s is None else max(retry_after_s, pushback_s)
    return error_of(
        code, call.details() or code, reason=reason, field=field, retry_after_s=retry_after_s, retryable=retryable
    )


def from_stream(message: pb.ModelStreamInferResponse) -> InferenceError:
    """The exception of an error in the place of an answer."""
    parameters = message.infer_response.parameters
    after_ms = parameters["mlmesh_retry_after_ms"].int64_param if "mlmesh_retry_after_ms" in parameters else None

    def text(name: str) -> str:
        return parameters[name].string_param if name in parameters else ""

    return error_of(
        text("mlmesh_code") or "UNKNOWN",
        message.error_message,
        reason=text("mlmesh_reason"),
        field=text("mlmesh_field"),
        retry_after_s=None if after_ms is None else after_ms / 1000,
    )


def _details(trailers: Sequence[tuple[str, str | bytes]]) -> tuple[str, str, float | None]:
    """Reason, field and time to wait, as far as the trailers tell."""
    reason, field, retry_after_s = "", "", None
    for key, value in trailers:
        if key != _DETAILS or not isinstance(value, bytes):
            continue
        try:
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                    info = error_details_pb2.ErrorInfo.FromString(detail.value)
                    reason = info.reason if info.domain == _DOMAIN else reason
                elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                    bad = error_details_pb2.BadRequest.FromString(detail.value)
                    field = bad.field_violations[0].field if bad.field_violations else ""
                elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                    retry = error_details_pb2.RetryInfo.FromString(detail.value)
                    retry_after_s = max(0.0, retry.retry_delay.ToNanoseconds() / 1e9)
        except Exception:  # noqa: S112  what a peer attached must not hide the status itself
            continue
    return reason, field, retry_after_s


def _pushback(trailers: Sequence[tuple[str, str | bytes]]) -> tuple[float | None, bool]:
    """gRPC's retry pushback: seconds to wait, and whether to retry at all (anything but a number says no)."""
    for key, value in trailers:
        if key == _PUSHBACK:
            text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
            return (int(text) / 1000, True) if text.isascii() and text.isdigit() else (None, False)
    return None, True
