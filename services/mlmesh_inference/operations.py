"""google.longrunning.Operations (AIP-151) over the builds of this process, on the port that everything is served on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import grpc
from google.longrunning import operations_pb2 as ops
from google.protobuf.empty_pb2 import Empty
from google.rpc import code_pb2, error_details_pb2, status_pb2

from mlmesh.inference.v1 import control_pb2 as pb
from mlmesh_inference.builds import Build, Builds, Result
from mlmesh_runtime.calls import remaining_s
from mlmesh_runtime.errors import InvalidInput

SERVICE: Final = ops.DESCRIPTOR.services_by_name["Operations"]
WAIT_METHODS: Final = frozenset({"WaitOperation"})
"""RPCs that need no deadline."""
COLLECTION: Final = "operations"
PAGE_SIZE: Final = 50
PAGE_SIZE_MAX: Final = 1000
WAIT_S_MAX: Final = 3600.0
REPLY_S: Final = 0.2
"""How long before its caller's deadline a wait ends, so that the answer arrives."""

_NAME: Final = re.compile(r"operations/(?P<id>[0-9a-f]{1,64})")
_TERM: Final = re.compile(r"(?P<field>done|metadata\.name|metadata\.engine)\s*=\s*(\"(?P<text>[^\"]*)\"|(?P<word>\S+))")
_TOKEN: Final = re.compile(r"([0-9]{20}-[0-9a-f]{1,64})?")


class OperationsServicer:
    """Implements Operations over the builds."""

    def __init__(self, builds: Builds) -> None:
        self._builds = builds

    async def ListOperations(self, request: ops.ListOperationsRequest, context: Any) -> ops.ListOperationsResponse:  # noqa: ARG002
        """Newest first."""
        if request.name not in {"", COLLECTION}:
            raise InvalidInput(f"expected '{COLLECTION}', got {request.name[:64]!r}", field="name")
        if not _TOKEN.fullmatch(request.page_token) or request.page_size < 0:
            raise InvalidInput("it is not the next_page_token of a page", field="page_token")
        size = min(request.page_size or PAGE_SIZE, PAGE_SIZE_MAX)
        page = self._builds.list(parse_filter(request.filter), size=size, token=request.page_token)
        return ops.ListOperationsResponse(operations=map(operation, page.builds), next_page_token=page.next_token)

    async def GetOperation(self, request: ops.GetOperationRequest, context: Any) -> ops.Operation:  # noqa: ARG002
        """One operation."""
        return operation(self._builds.get(build_id(request.name)))

    async def WaitOperation(self, request: ops.WaitOperationRequest, context: Any) -> ops.Operation:  # noqa: ARG002
        """The operation when it has ended, or as it is when the time is up."""
        asked = request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else WAIT_S_MAX
        left = remaining_s()
        bounds = [max(0.0, asked), WAIT_S_MAX, *([] if left is None else [max(0.0, left - REPLY_S)])]
        return operation(await self._builds.wait(build_id(request.name), min(bounds)))

    async def CancelOperation(self, request: ops.CancelOperationRequest, context: Any) -> Empty:  # noqa: ARG002
        """Ask it to stop."""
        await self._builds.cancel(build_id(request.name))
        return Empty()

    async def DeleteOperation(self, request: ops.DeleteOperationRequest, context: Any) -> Empty:  # noqa: ARG002
        """Forget one that has ended."""
        await self._builds.delete(build_id(request.name))
        return Empty()


def add_to_server(servicer: OperationsServicer, server: Any) -> None:
    """Register the methods; the module that googleapis ships knows an older way only."""
    kinds: dict[str, tuple[Any, Any]] = {
        "ListOperations": (ops.ListOperationsRequest, ops.ListOperationsResponse),
        "GetOperation": (ops.GetOperationRequest, ops.Operation),
        "WaitOperation": (ops.WaitOperationRequest, ops.Operation),
        "CancelOperation": (ops.CancelOperationRequest, Empty),
        "DeleteOperation": (ops.DeleteOperationRequest, Empty),
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, name),
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )
        for name, (request, response) in kinds.items()
    }
    server.add_registered_method_handlers(SERVICE.full_name, handlers)


def build_id(name: str) -> str:
    """The id in "operations/{id}". Raises InvalidInput."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InvalidInput(f"expected operations/ID, got {name[:64]!r}", field="name")
    return match["id"]


def parse_filter(text: str) -> Callable[[Build], bool]:
    """A filter of AIP-160's form: `done`, `metadata.name` and `metadata.engine`, each with =, joined by AND.

    Raises InvalidInput that names the part that is not understood.
    """
    terms = [part.strip() for part in re.split(r"\s+AND\s+", text.strip())] if text.strip() else []
    wanted: list[tuple[str, str]] = []
    for term in terms:
        match = _TERM.fullmatch(term)
        value = "" if match is None else match["text"] if match["text"] is not None else match["word"]
        if match is None or (match["field"] == "done" and value not in {"true", "false"}):
            raise InvalidInput(
                f"{term[:64]!r} is not understood: done, metadata.name and metadata.engine may be compared by =, "
                "such as done = false AND metadata.engine = tensorrt",
                field="filter",
            )
        wanted.append((match["field"], value))

    def keep(build: Build) -> bool:
        found = {
            "done": "true" if build.done else "false",
            "metadata.name": build.version_name,
            "metadata.engine": build.engine,
        }
        return all(found[field] == value for field, value in wanted)

    return keep


def operation_name(build: Build) -> str:
    """The name "operations/{id}"."""
    return f"{COLLECTION}/{build.id}"


def operation(build: Build) -> ops.Operation:
    """A build as an operation: EngineBuildMetadata, and in the end an EngineBuild or an error."""
    result = ops.Operation(name=operation_name(build), done=build.done)
    metadata = pb.EngineBuildMetadata(
        name=build.version_name,
        engine=build.engine,
        phase=build.phase,
        steps_done=build.steps_done,
        steps_total=build.steps_total,
        cancel_requested=build.cancel_requested,
    )
    metadata.create_time.FromNanoseconds(int(build.created_s * 1e9))
    metadata.update_time.FromNanoseconds(int(build.updated_s * 1e9))
    result.metadata.Pack(metadata)
    if build.result is not None:
        result.response.Pack(_response(build, build.result))
    elif build.code:
        result.error.CopyFrom(_error(build))
    return result


def _response(build: Build, found: Result) -> pb.EngineBuild:
    response = pb.EngineBuild(
        name=build.version_name,
        engine=build.engine,
        precisions=found.precisions,
        size_bytes=found.size,
        sha256=found.sha256,
        source=found.source,
        serving=found.serving,
        reason=found.reason,
    )
    if found.seconds is not None:
        response.build_duration.FromNanoseconds(int(found.seconds * 1e9))
    return response


def _error(build: Build) -> status_pb2.Status:
    info = error_details_pb2.ErrorInfo(reason="BUILD_FAILED", domain="mlmesh")
    error = status_pb2.Status(code=code_pb2.Code.Value(build.code), message=build.message[:2000])
    error.details.add().Pack(info)
    return error
