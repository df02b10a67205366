"""MLServer's own stubs and converters, unchanged, against the servers given as ADDRESS=DIALECT: prints a line
of JSON for each.

Runs in MLServer's environment (.tools/mlserver), where nothing of ours is.
"""

import asyncio
import json
import sys

import grpc
from mlserver.codecs import NumpyCodec
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc import model_repository_pb2 as repository_pb
from mlserver.grpc.converters import ModelInferRequestConverter, ModelInferResponseConverter
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub
from mlserver.grpc.model_repository_pb2_grpc import ModelRepositoryServiceStub
from mlserver.types import InferenceRequest, RequestInput

HEADER = (("x-oip-dialect", "mlserver"),)
# What grpc.aio says instead of a stream's status when the stream ended in the middle of a write; no server says it
# (github.com/grpc/grpc/issues/36066).
OWN_WRITE = ("INTERNAL", "Internal error from Core")


def request(model: str, *, raw: bool, first: int = 0) -> pb.ModelInferRequest:
    """INPUT0 = first, first + 1, ... and INPUT1 = 3, in typed contents as MLServer sends them, or raw."""
    inputs = [
        RequestInput(name="INPUT0", shape=[1, 16], datatype="INT32", data=list(range(first, first + 16))),
        RequestInput(name="INPUT1", shape=[1, 16], datatype="INT32", data=[3] * 16),
    ]
    told = InferenceRequest(id=f"m{first}", inputs=inputs)
    return ModelInferRequestConverter.from_types(told, model_name=model, model_version=None, use_raw=raw)


def outputs(response: pb.ModelInferResponse) -> dict:
    """What MLServer's own converters read from an answer."""
    read = ModelInferResponseConverter.to_types(response)
    found = {output.name: NumpyCodec.decode_output(output).tolist() for output in read.outputs}
    return {"id": read.id, "model": read.model_name, **found}


async def code_of(call) -> tuple[str, str]:
    """Status and text of a call that must fail."""
    try:
        await call
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


async def stream(stub: GRPCInferenceServiceStub, models: list[str], metadata) -> dict:
    """A stream with a request for each model: the answers, and how the server ended it."""
    for _ in range(20):
        told = await stream_once(stub, models, metadata)
        if (told["code"], told.get("text")) != OWN_WRITE:
            break
    return told


async def stream_once(stub: GRPCInferenceServiceStub, models: list[str], metadata) -> dict:
    """The same, as this client tells it."""

    async def messages():
        for place, model in enumerate(models):
            yield request(model, raw=False, first=place)

    answers = []
    try:
        async for response in stub.ModelStreamInfer(messages(), metadata=metadata, timeout=20):
            answers.append(outputs(response))  # noqa: PERF401  what came before an error counts
    except grpc.RpcError as error:
        return {"answers": answers, "code": error.code().name, "text": error.details()}
    return {"answers": answers, "code": "OK"}


async def main(address: str, default: str) -> dict:
    """All that MLServer's stubs do; `default` is the server's own dialect of streams."""
    told: dict = {}
    metadata = () if default == "mlserver" else HEADER
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        told["live"] = (await stub.ServerLive(pb.ServerLiveRequest())).live
        told["ready"] = (await stub.ServerReady(pb.ServerReadyRequest())).ready
        told["model_ready"] = (await stub.ModelReady(pb.ModelReadyRequest(name="simple"))).ready
        model = await stub.ModelMetadata(pb.ModelMetadataRequest(name="simple"))
        told["metadata"] = [[t.name, t.datatype, list(t.shape)] for t in model.inputs]
        told["metadata_parameters"] = len(model.parameters)
        for raw in (False, True):
            answer = await stub.ModelInfer(request("simple", raw=raw))
            told[f"infer_{raw}"] = outputs(answer)
            told[f"mirrors_{raw}"] = bool(answer.raw_output_contents) == raw
        told["infer_unknown"] = await code_of(stub.ModelInfer(request("nobody", raw=False)))
        told["stream"] = await stream(stub, ["simple"] * 5, metadata)
        told["stream_error"] = await stream(stub, ["simple", "nobody", "simple"], metadata)
        told["stream_wrong_dialect"] = await stream(stub, ["simple"], (("x-oip-dialect", "klingon"),))
        index = await stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))
        told["index"] = [[m.name, m.version, m.state] for m in index.models]
        await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="simple"))
        told["after_unload"] = await code_of(stub.ModelMetadata(pb.ModelMetadataRequest(name="simple")))
        await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="simple"))
        told["after_load"] = (await stub.ModelReady(pb.ModelReadyRequest(name="simple"))).ready
        told["load_unknown"] = await code_of(
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="nobody"))
        )
        older = ModelRepositoryServiceStub(channel)
        index = await older.RepositoryIndex(repository_pb.RepositoryIndexRequest(ready=True))
        told["older_index"] = [[m.name, m.version, m.state] for m in index.models]
        named = repository_pb.RepositoryModelLoadRequest(model_name="simple")
        await older.RepositoryModelUnload(repository_pb.RepositoryModelUnloadRequest(model_name="simple"))
        told["older_unload"] = (await stub.ModelReady(pb.ModelReadyRequest(name="simple"))).ready
        await older.RepositoryModelLoad(named)
        told["older_load"] = (await stub.ModelReady(pb.ModelReadyRequest(name="simple"))).ready
        named.model_name = "nobody"
        told["older_unknown"] = await code_of(older.RepositoryModelLoad(named))
    return told


for each in sys.argv[1:]:
    print(json.dumps(asyncio.run(main(*each.split("=")))))
