"""Models and versions as people name them, found, deleted and brought back."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from rich.text import Text

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import usage_error
from mlmesh_cli.names import ModelReference, parse_model
from mlmesh_cli.render import text as t

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub


async def version_of(stub: ModelRegistryServiceAsyncStub, reference: str | ModelReference) -> pb.ModelVersion:
    """The version that MODEL/VERSION or MODEL@ALIAS names. Raises CliError (exit code 2) for a model alone."""
    parsed = parse_model(reference) if isinstance(reference, str) else reference
    if not parsed.version_name:
        raise usage_error(f"{parsed.model} names a model, not a version", "write MODEL/VERSION, such as mnist/3")
    return (await stub.GetModelVersion(pb.GetModelVersionRequest(name=parsed.version_name))).model_version


async def deleted(
    stub: ModelRegistryServiceAsyncStub, reference: ModelReference, *, force: bool
) -> pb.Model | pb.ModelVersion:
    """Deletes a version or a model as it is now; an alias is no name for what is to be deleted."""
    if reference.alias:
        raise usage_error(
            "an alias names a version that is in use", "name the version, or `mlmesh models alias delete` first"
        )
    if reference.version:
        version = await version_of(stub, reference)
        request = pb.DeleteModelVersionRequest(name=version.name, etag=version.etag)
        return (await stub.DeleteModelVersion(request)).model_version
    model = (await stub.GetModel(pb.GetModelRequest(name=reference.parent))).model
    return (await stub.DeleteModel(pb.DeleteModelRequest(name=model.name, etag=model.etag, force=force))).model


async def undeleted(stub: ModelRegistryServiceAsyncStub, reference: ModelReference) -> pb.Model | pb.ModelVersion:
    """Brings a version or a model back."""
    if reference.alias:
        raise usage_error("no alias points at what is deleted", "name the version, such as mnist/3")
    if reference.version:
        request = pb.UndeleteModelVersionRequest(name=reference.version_name)
        return (await stub.UndeleteModelVersion(request)).model_version
    return (await stub.UndeleteModel(pb.UndeleteModelRequest(name=reference.parent))).model


def gone_until(item: pb.Model | pb.ModelVersion, now: datetime) -> Text:
    """What a person reads who deleted something."""
    name = item.name.removeprefix("models/").replace("/versions/", "/")
    return Text(f"{item.name} is deleted", style="green").append(
        f"; it goes for good {t.until(item.purge_time, now)}. `mlmesh models undelete {name}` brings it back",
        style="dim",
    )
