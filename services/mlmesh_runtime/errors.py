# ruff: noqa: N818  errors are named by what is wrong
"""What domain code raises. One place (`mlmesh_runtime.status`) turns these into gRPC statuses; nothing else sets one.

Each error carries a stable ``reason`` (google.rpc.ErrorInfo, domain "mlmesh") that clients and contract tests compare;
the ``message`` is for people and may change. Choose by what the caller should do next:

================  ====================  ==============================================================
error             status                what the caller does
================  ====================  ==============================================================
InvalidInput      INVALID_ARGUMENT      corrects the request; it never succeeds as it is
NotFound          NOT_FOUND             looks for another name
AlreadyExists     ALREADY_EXISTS        reads what is there
Conflict          ABORTED               reads again, then retries (compare-and-set lost)
WrongState        FAILED_PRECONDITION   changes the state first
Overloaded        RESOURCE_EXHAUSTED    waits ``retry_after_s``; the mesh does not retry it
NotReady          UNAVAILABLE           retries elsewhere; the only one the mesh retries
TimedOut          DEADLINE_EXCEEDED     allows more time
RevisionLost      OUT_OF_RANGE          lists again, then watches from there
Unauthenticated   UNAUTHENTICATED       shows a valid identity
Denied            PERMISSION_DENIED     asks for permission
Corrupt           DATA_LOSS             restores the data
Unsupported       UNIMPLEMENTED         uses something else
================  ====================  ==============================================================

Any other exception becomes INTERNAL with a fixed text and a log id; its own text stays in the log.
This module imports nothing but the standard library, so every domain module may use it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldViolation:
    """One wrong field: its path as in ``spec.layers[2].units`` and what was expected and what came."""

    field: str
    description: str


class MeshError(Exception):
    """Base of all errors a caller is meant to see.

    Attributes:
        message: one sentence for people; no bytes, no secrets.
        reason: UPPER_SNAKE, stable; the class's default when not given.
        metadata: small facts for programs (google.rpc.ErrorInfo.metadata).
        retry_after_s: seconds to wait before trying again (google.rpc.RetryInfo); None says nothing.
    """

    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: Mapping[str, str] = MappingProxyType(dict(metadata or {}))
        self.retry_after_s = retry_after_s


class InvalidInput(MeshError):
    """The request itself is wrong. Name the field, what was expected and what came; never echo bytes."""

    default_reason = "INVALID_FIELD"

    def __init__(
        self,
        message: str,
        *,
        field: str = "",
        violations: Sequence[FieldViolation] = (),
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata, retry_after_s=retry_after_s)
        self.field = field
        first = (FieldViolation(field=field, description=message),) if field and not violations else ()
        self.violations: tuple[FieldViolation, ...] = (*first, *violations)


class NotFound(MeshError):
    """The named thing is not here."""

    default_reason = "NOT_FOUND"


class AlreadyExists(MeshError):
    """The name is taken."""

    default_reason = "ALREADY_EXISTS"


class Conflict(MeshError):
    """A compare-and-set lost: somebody else was faster. Nothing was changed."""

    default_reason = "CONFLICT"


class WrongState(MeshError):
    """The request is fine, but not in the present state, and trying again alone will not help."""

    default_reason = "WRONG_STATE"


class Overloaded(MeshError):
    """A bound is reached. Not UNAVAILABLE: the mesh would retry that and amplify the overload."""

    default_reason = "OVERLOADED"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = 1.0,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata, retry_after_s=retry_after_s)


class NotReady(MeshError):
    """Starting or draining: another replica may answer. The only error the mesh retries."""

    default_reason = "NOT_READY"


class TimedOut(MeshError):
    """There is not enough time left, or a peer kept silent for too long."""

    default_reason = "TIMED_OUT"


class RevisionLost(MeshError):
    """A resume point older than the oldest kept."""

    default_reason = "REVISION_LOST"


class Unauthenticated(MeshError):
    """The caller shows no usable identity."""

    default_reason = "UNAUTHENTICATED"


class Denied(MeshError):
    """The caller's identity may not do this."""

    default_reason = "PERMISSION_DENIED"


class Corrupt(MeshError):
    """Stored or sent bytes are not what they were announced to be."""

    default_reason = "DATA_LOSS"


class Unsupported(MeshError):
    """Not built, here or at all."""

    default_reason = "UNSUPPORTED"
