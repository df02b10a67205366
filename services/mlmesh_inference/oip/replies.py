"""From the engine's arrays to ModelInferResponse, in the representation that the request used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.oip.parameters import FINAL, Placement
from mlmesh_inference.oip.requests import Request, Window
from mlmesh_inference.oip.wire import PACKED, packed
from mlmesh_inference.tensors import DATATYPES, Array, Datatype, classify, encode_raw, encode_typed
from mlmesh_runtime.errors import InvalidInput
from open_inference import grpc_service_pb2 as pb

__all__ = ["FINAL", "write"]

CLASSES_MAX: Final = 1 << 18
"""Most classes of one output, all rows together: each is a text of its own."""

_Tensor = pb.ModelInferResponse.InferOutputTensor


def write(
    request_id: str,
    request: Request,
    model: ReadyModel,
    arrays: Sequence[Array],
    *,
    outputs: Sequence[str] | None = None,
    final: bool | None = None,
) -> pb.ModelInferResponse:
    """The answer. A typed request gets typed contents, unless an output is FP16 or BF16, which have none.

    Args:
        arrays: one an output. outputs: their names where they are not all that the request wants (running.Answer).
        final: of an answer on a stream, whether it is the last to its request.

    Raises InvalidInput where an output does not fit into the shared memory that it is to be put into.
    """
    response = pb.ModelInferResponse(model_name=model.name, model_version=model.version_text, id=request_id)
    if final is not None:
        response.parameters[FINAL].bool_param = final
    names = request.outputs if outputs is None else outputs
    kinds = [model.outputs[name].datatype for name in names]
    if request.classes:
        arrays = list(arrays)
        for place, name in enumerate(names):
            if count := request.classes.get(name):
                arrays[place] = _classes(name, arrays[place], count, model)
                kinds[place] = DATATYPES["BYTES"]
    typed = request.typed and not request.always_raw and not request.placed and all(kind.contents for kind in kinds)
    for name, kind, array in zip(names, kinds, arrays, strict=True):
        output = response.outputs.add(name=name, datatype=kind.name, shape=array.shape)
        if typed:
            _write_typed(output, kind, array)
        elif (placed := request.placed.get(name)) is not None:
            _place(output, *placed, encode_raw(kind, array))
            # Raw contents go with outputs by their place, so one that is elsewhere takes a place too.
            response.raw_output_contents.append(b"")
        else:
            response.raw_output_contents.append(encode_raw(kind, array))
    return response


def _classes(name: str, array: Array, count: int, model: ReadyModel) -> Array:
    batched = model.policy.batches
    rows = array.shape[0] if batched else 1
    if rows * min(count, array.size // max(rows, 1)) > CLASSES_MAX:
        raise InvalidInput(
            f"'classification' of output '{name}' gives more than {CLASSES_MAX} classes",
            field=f"outputs[{name}].parameters[classification]",
        )
    return classify(array, count, model.output_labels.get(name, model.labels), batched=batched)


def _write_typed(output: _Tensor, kind: Datatype, array: Array) -> None:
    if kind.contents in PACKED:
        output.contents.MergeFromString(packed(kind, array))
    else:
        getattr(output.contents, kind.contents).extend(encode_typed(array))


def _place(output: _Tensor, placement: Placement, window: Window, data: bytes) -> None:
    if len(data) > len(window):
        raise InvalidInput(
            f"shared memory size specified with the request for output '{output.name}' ({len(window)} bytes) should be "
            f"at least {len(data)} bytes",
            field=f"outputs[{output.name}].parameters[shared_memory_byte_size]",
        )
    window.write(data)
    output.parameters["shared_memory_region"].string_param = placement.region
    output.parameters["shared_memory_byte_size"].int64_param = len(data)
    if placement.offset:
        output.parameters["shared_memory_offset"].int64_param = placement.offset
