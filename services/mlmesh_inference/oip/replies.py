"""From the engine's arrays to ModelInferResponse, in the representation that the request used."""

from __future__ import annotations

from collections.abc import Sequence

from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.oip.requests import Request
from mlmesh_inference.tensors import DATATYPES, Array, classify, encode_raw, encode_typed
from open_inference import grpc_service_pb2 as pb


def write(request_id: str, request: Request, model: ReadyModel, arrays: Sequence[Array]) -> pb.ModelInferResponse:
    """The answer. A typed request gets typed contents, unless an output is FP16 or BF16, which have none."""
    response = pb.ModelInferResponse(model_name=model.name, model_version=model.version_text, id=request_id)
    kinds = [model.outputs[name].datatype for name in request.outputs]
    if request.classes:
        arrays = list(arrays)
        for place, name in enumerate(request.outputs):
            if count := request.classes.get(name):
                arrays[place] = classify(arrays[place], count, model.labels, batched=model.policy.batches)
                kinds[place] = DATATYPES["BYTES"]
    typed = request.typed and all(kind.contents for kind in kinds)
    for name, kind, array in zip(request.outputs, kinds, arrays, strict=True):
        output = response.outputs.add(name=name, datatype=kind.name, shape=array.shape)
        if typed:
            getattr(output.contents, kind.contents).extend(encode_typed(array))
        else:
            response.raw_output_contents.append(encode_raw(kind, array))
    return response
