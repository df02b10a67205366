"""Making Istio resources active: what `mlmesh apply` and the demo both do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.errors import CliError, RpcFailure, rpc_failure
from mlmesh_cli.moving import Moved, follow_weights
from mlmesh_local.resources.parse import Document, defines_nothing
from mlmesh_local.resources.problems import InvalidResource

if TYPE_CHECKING:
    from mlmesh.local.v1.local_pb2_grpc import LocalMeshServiceAsyncStub
    from mlmesh_cli.connection import Connection


_DEADLINE_S = 30.0


def refuse_nothing(documents: Sequence[tuple[Path, str]]) -> None:
    """Raises CliError where no text has a resource: a pipe that gave nothing must not look like success."""
    try:
        nothing = defines_nothing(Document(source=str(path), text=text) for path, text in documents)
    except InvalidResource:
        # The mesh says what is wrong, and where.
        return
    if nothing:
        raise CliError(
            "no objects passed to apply", "the files are empty, or have only comments", reason="NOTHING_TO_APPLY"
        )


async def apply_documents(
    stub: LocalMeshServiceAsyncStub,
    documents: Sequence[tuple[Path, str]],
    *,
    dry_run: bool = False,
    prune: bool = False,
) -> pb.ApplyResponse:
    """Applies YAML texts and waits until the sidecars acknowledged.

    Raises:
        CliError: refused; the problem names file, line and field.
        grpc.aio.AioRpcError: anything else.
    """
    request = pb.ApplyRequest(dry_run=dry_run, prune=prune)
    for path, text in documents:
        request.documents.add(source=str(path), yaml=text)
    try:
        return await stub.Apply(request, timeout=_DEADLINE_S)
    except grpc.aio.AioRpcError as error:
        failure = rpc_failure(error)
        if failure.code != "INVALID_ARGUMENT":
            raise
        raise CliError(
            _problems(failure),
            "correct it and apply again; nothing was changed, the configuration before stays active",
            reason=failure.reason or failure.code,
        ) from None


async def streams_follow(connection: Connection, response: pb.ApplyResponse) -> Moved | None:
    """Has open streams follow the routes, where they changed; None where they did not.

    What cannot be asked is left: a change that is active is not undone because a process just restarts.
    """
    if not any(change.kind == "VirtualService" and change.action != "unchanged" for change in response.changes):
        return None
    try:
        return await follow_weights(connection)
    except grpc.aio.AioRpcError:
        return None


def _problems(failure: RpcFailure) -> str:
    """Each problem once: a violation's text names its field already when it says where in which file it stands."""
    texts = []
    for violation in failure.violations:
        field, _, description = violation.partition(": ")
        texts.append(description if field in description else violation)
    return "\n       ".join(texts) or failure.message
