"""What goes wrong, for a person: one line that says the problem, one that says what to do next, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import grpc


class ExitCode(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_RUNNING = 3
    FINDINGS = 79
    INTERRUPTED = 130


class CliError(Exception):
    """A failure that a person can act on.

    Args:
        problem: one line, what went wrong.
        hint: one line, what to do next; empty when there is nothing to do.
        reason: stable UPPER_SNAKE reason for scripts (the server's ErrorInfo reason where there is one).
        exit_code: what the process exits with.
    """

    def __init__(
        self, problem: str, hint: str = "", *, reason: str = "", exit_code: ExitCode = ExitCode.FAILED
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint
        self.reason = reason
        self.exit_code = exit_code


def usage_error(problem: str, hint: str = "") -> CliError:
    """The caller asked for something that makes no sense; exit code 2."""
    return CliError(problem, hint, reason="USAGE", exit_code=ExitCode.USAGE)


def not_running(where: str) -> CliError:
    """No mesh answers at `where`; exit code 3."""
    return CliError(
        f"no mesh is running here: nothing answers at {where}",
        "start one with `mlmesh up`, or name its folder with --state-dir",
        reason="MESH_NOT_RUNNING",
        exit_code=ExitCode.NOT_RUNNING,
    )


# What to do next, by the reason that a service gave; then by the status code.
HINTS_BY_REASON = {
    "MODEL_NOT_FOUND": "`mlmesh models list` shows what is registered; `mlmesh train` makes one",
    "MODEL_VERSION_NOT_FOUND": "`mlmesh models versions MODEL` shows its versions",
    "MODEL_ALIAS_NOT_FOUND": "`mlmesh models show MODEL` shows its aliases",
    "MODEL_EXISTS": "choose another name, or publish a version of it with `mlmesh models publish`",
    "MODEL_NOT_READY": "it is still being loaded: look at it with `mlmesh status`, then try again",
    "INVALID_FILTER": "such as 'metrics.accuracy >= 0.9 AND labels.team = vision'; the README lists the fields",
    "GATE_REFUSED": "`mlmesh models promote MODEL ALIAS VERSION --dry-run` shows what each gate finds",
    "VERSION_QUARANTINED": "`mlmesh models show MODEL/VERSION` tells why; `mlmesh models verify` reads its bytes again",
    "VERSION_DELETED": "`mlmesh models undelete MODEL/VERSION` brings it back",
    "VERSION_IN_USE": "move or delete the alias first: `mlmesh models alias list MODEL` shows them",
    "MODEL_NOT_EMPTY": "delete its aliases, and its versions with it by --force",
    "MODEL_DELETED": "`mlmesh models undelete MODEL` brings it back",
    "QUOTA_EXCEEDED": "`mlmesh quota show` tells the limits, `mlmesh models gc` makes room",
    "SIGNATURE_INVALID": "it must be over the version's files, by a key in the registry's folder of trusted keys",
    "FORMAT_NOT_ALLOWED": "ONNX, safetensors, JSON and text may be stored: convert the file, such as to ONNX",
    "ETAG_MISMATCH": "someone moved it in between: read it again with `mlmesh models show MODEL`, then repeat",
    "JOB_NOT_FOUND": "`mlmesh train list` shows the jobs",
    "STUDY_NOT_FOUND": "`mlmesh studies list` shows the studies",
    "STUDY_FINISHED": "`mlmesh studies get STUDY` shows how it ended",
    "STUDIES_TOO_MANY": "wait until a study has ended, or stop one: `mlmesh studies list` shows them",
    "JOB_FINISHED": "`mlmesh jobs get JOB` shows how it ended, `mlmesh jobs retry JOB` tries it again",
    "JOB_NOT_FINISHED": "`mlmesh jobs cancel JOB` ends it; `mlmesh jobs watch JOB` shows when it has ended",
    "JOB_NOT_PAUSED": "it is still writing its checkpoint: `mlmesh jobs watch JOB` shows when it is paused",
    "JOB_NOT_RETRYABLE": "`mlmesh jobs get JOB` shows how it stands; a paused job is resumed, not retried",
    "RESOURCES_TOO_LARGE": "ask for less, or give the service more (MLMESH_TRAINING_CPUS and its siblings)",
    "UNKNOWN_RECIPE": "`mlmesh train recipes` shows what can be trained",
    "UNKNOWN_DATASET": "`mlmesh train recipes` shows which data sets each recipe takes",
    "BUILD_NOT_FOUND": "`mlmesh engines operations` shows the builds",
    "BUILD_FAILED": "`mlmesh engines list` shows which engines there are, and why others are not",
    "QUEUE_FULL": "wait a moment and try again",
    "INVALID_RESOURCE": "correct what is named; nothing was changed, the configuration before stays active",
    "TRACE_NOT_FOUND": "`mlmesh traces list` shows the traces kept",
    "WORKLOAD_NOT_FOUND": "`mlmesh status` shows the workloads",
    "DISK_FULL": "make room on the disk that holds the state folder, then try again",
}
# For what was found here, where no mesh was asked.
HINTS_OFFLINE = {
    **HINTS_BY_REASON,
    "INVALID_RESOURCE": "correct what is named, then run this again; no mesh was touched",
}
HINTS_BY_CODE = {
    "UNAVAILABLE": "`mlmesh status` shows what is running and why something is not",
    "DEADLINE_EXCEEDED": "it took too long: `mlmesh status` shows whether everything is ready",
    "PERMISSION_DENIED": "an AuthorizationPolicy in mesh/istio refuses this caller; `mlmesh status` shows who is who",
    "UNAUTHENTICATED": "call with a certificate of the mesh: `mlmesh certs issue` writes one",
    "UNIMPLEMENTED": "the service that answered does not know this call: is it of the same version?",
    "INTERNAL": "the service's log, in the state folder under logs/, tells more",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RpcFailure:
    """A failed call, taken apart: status code name, message, ErrorInfo reason, field violations ("path: text")."""

    code: str
    message: str
    reason: str
    violations: tuple[str, ...]


def rpc_failure(error: grpc.aio.AioRpcError) -> RpcFailure:
    """Takes a gRPC error apart, details included."""
    from google.rpc import error_details_pb2, status_pb2  # noqa: PLC0415  imported on failure only

    reason = ""
    violations: list[str] = []
    trailers: Any = error.trailing_metadata() or ()
    for key, value in trailers:
        if key != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            if detail.Unpack(info):
                reason = info.reason
            elif detail.Unpack(bad):
                violations += [f"{v.field}: {v.description}" for v in bad.field_violations]
    return RpcFailure(
        code=error.code().name, message=error.details() or "", reason=reason, violations=tuple(violations)
    )


def from_rpc(error: grpc.aio.AioRpcError) -> CliError:
    """The error that a person sees for a failed call."""
    failure = rpc_failure(error)
    problem = f"{failure.code}: {failure.message}" if failure.message else failure.code
    missing = [violation for violation in failure.violations if violation.split(": ", 1)[-1] not in failure.message]
    if missing:
        problem += " (" + "; ".join(missing) + ")"
    hint = HINTS_BY_REASON.get(failure.reason) or HINTS_BY_CODE.get(failure.code, "")
    return CliError(problem, hint, reason=failure.reason or failure.code)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions inside nested exception groups."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error
