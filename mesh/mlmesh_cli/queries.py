"""Requests for a model, made from images or from a file, in the shape that the model says it takes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from mlmesh_cli import samples, tensors
from mlmesh_cli.errors import CliError, usage_error
from mlmesh_cli.inferring import Metadata, Query
from mlmesh_cli.names import ModelReference
from open_inference import grpc_service_pb2 as oip

if TYPE_CHECKING:
    from open_inference.grpc_service_pb2_grpc import GRPCInferenceServiceAsyncStub


async def queries_for(
    stub: GRPCInferenceServiceAsyncStub,
    reference: ModelReference,
    metadata: Metadata,
    *,
    start: int,
    count: int,
    dataset: str,
    input_file: Path | None,
) -> list[Query]:
    """Asks the model what it takes and makes `count` requests of it.

    Args:
        stub: where the model is served; `metadata` may route to a version.
        reference: the model, and a version where one was asked for.
        start, count: images of the data set, from `start` on, spread over the classes.
        dataset: its name; empty chooses the one whose images fit the model.
        input_file: a tensor to send `count` times instead.

    Raises:
        CliError: nothing fits the model.
    """
    if reference.alias:
        raise usage_error("an alias is not part of a request", "the mesh routes by subset: name the model alone")
    request = oip.ModelMetadataRequest(name=reference.model, version=reference.version)
    described = await stub.ModelMetadata(request, metadata=metadata)
    if input_file is not None:
        return await asyncio.to_thread(_from_file, described, reference, input_file, count)
    if len(described.inputs) != 1:
        names = ", ".join(tensor.name for tensor in described.inputs)
        raise CliError(
            f"{reference.model} takes {len(described.inputs)} inputs: {names}", "send them with --input FILE"
        )
    name = dataset or samples.for_shape(described.inputs[0].shape)
    if not name:
        shape = list(described.inputs[0].shape)
        raise CliError(f"no data set here has images of shape {shape}", "send a tensor of your own with --input FILE")
    return await asyncio.to_thread(image_queries, described, reference.version, name, start, count)


def image_queries(
    described: oip.ModelMetadataResponse, version: str, dataset: str, start: int, count: int
) -> list[Query]:
    """One request an image, of a batch of one."""
    data = samples.load(dataset)
    tensor = described.inputs[0]
    made: dict[int, Query] = {}
    for index in samples.spread(start, count, len(data.labels)):
        if index not in made:
            array = tensors.fit(data.images[index : index + 1].reshape(1, -1), [*tensor.shape], tensor.name)
            array = array.reshape([1, *(abs(int(d)) for d in tensor.shape[1:])])
            message = tensors.infer_request(described.name, [(tensor.name, tensor.datatype, array)], version=version)
            made[index] = Query(request=message, name=f"{dataset} {index}", expected=int(data.labels[index]))
    return [made[index] for index in samples.spread(start, count, len(data.labels))]


def _from_file(described: oip.ModelMetadataResponse, reference: ModelReference, path: Path, count: int) -> list[Query]:
    wanted = [(tensor.name, tensor.datatype) for tensor in described.inputs]
    shapes = {tensor.name: list(tensor.shape) for tensor in described.inputs}
    inputs = [
        (name, datatype, tensors.fit(array, shapes[name], name) if name in shapes else array)
        for name, datatype, array in tensors.read_file(path, wanted)
    ]
    message = tensors.infer_request(described.name, inputs, version=reference.version)
    return [Query(request=message, name=path.name)] * count
