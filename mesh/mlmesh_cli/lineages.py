"""Where a version came from and what became of it, asked of the registry a generation at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc

from mlmesh.registry.v1 import registry_pb2 as pb

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub

VERSIONS_MAX = 200


async def ancestors(
    stub: ModelRegistryServiceAsyncStub, version: pb.ModelVersion, depth: int
) -> dict[str, Sequence[str]]:
    """Parents by name, up to a depth and VERSIONS_MAX versions. A parent that is gone has none."""
    found: dict[str, Sequence[str]] = {version.name: [*version.lineage.parents]}
    wanted = [*version.lineage.parents]
    for _ in range(depth - 1):
        above: list[str] = []
        for name in wanted:
            if name in found or len(found) >= VERSIONS_MAX:
                continue
            try:
                parent = (await stub.GetModelVersion(pb.GetModelVersionRequest(name=name))).model_version
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                continue
            found[name] = [*parent.lineage.parents]
            above += parent.lineage.parents
        wanted = above
    return found


async def descendants(
    stub: ModelRegistryServiceAsyncStub, version: pb.ModelVersion, depth: int
) -> dict[str, Sequence[str]]:
    """Children by name, down to a depth and VERSIONS_MAX versions."""
    found: dict[str, Sequence[str]] = {}
    wanted = [version.name]
    for _ in range(depth):
        below: list[str] = []
        for name in wanted:
            if name in found or len(found) >= VERSIONS_MAX:
                continue
            request = pb.ListModelVersionsRequest(
                parent="models/-", filter=f'lineage.parents:"{name}"', order_by="create_time", page_size=VERSIONS_MAX
            )
            listed = (await stub.ListModelVersions(request)).model_versions
            found[name] = [child.name for child in listed]
            below += found[name]
        wanted = below
    return found
