"""KServe's own client, unchanged, against the servers at the addresses given: prints a line of JSON for each.

Runs in KServe's environment (.tools/kserve), where nothing of ours is.
"""

import asyncio
import json
import sys

import grpc
import numpy as np
from kserve import InferInput, InferRequest
from kserve.inference_client import InferenceGRPCClient
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub


def request(model: str, *, raw: bool) -> InferRequest:
    """INPUT0 = 0, 1, ... 15 and INPUT1 = 3, raw or in typed contents."""
    first = InferInput("INPUT0", [1, 16], "INT32", data=list(range(16)))
    second = InferInput("INPUT1", [1, 16], "INT32", data=[3] * 16)
    if raw:
        first.set_data_from_numpy(np.arange(16, dtype=np.int32)[None], binary_data=True)
        second.set_data_from_numpy(np.full((1, 16), 3, np.int32), binary_data=True)
    return InferRequest(model_name=model, infer_inputs=[first, second], request_id="k1")


async def code_of(call) -> tuple[str, str]:
    """Status and text of a call that must fail."""
    try:
        await call
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


async def main(address: str) -> dict:
    """All that KServe's client and stubs do."""
    told: dict = {}
    async with InferenceGRPCClient(address, timeout=20) as client:
        told["live"] = await client.is_server_live()
        told["ready"] = await client.is_server_ready()
        told["model_ready"] = await client.is_model_ready("simple")
        told["unknown_ready"] = await client.is_model_ready("nobody")
        for raw in (False, True):
            response = await client.infer(request("simple", raw=raw))
            told[f"infer_{raw}"] = {
                "id": response.id,
                "model": response.model_name,
                "version": response.model_version,
                "sum": np.asarray(response.get_output_by_name("OUTPUT0").as_numpy()).tolist(),
                "difference": np.asarray(response.get_output_by_name("OUTPUT1").as_numpy()).tolist(),
            }
        told["infer_unknown"] = await code_of(client.infer(request("nobody", raw=False)))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = GRPCInferenceServiceStub(channel)
        metadata = await stub.ModelMetadata(pb.ModelMetadataRequest(name="simple"))
        told["metadata"] = [[t.name, t.datatype, list(t.shape)] for t in metadata.inputs]
        told["server"] = (await stub.ServerMetadata(pb.ServerMetadataRequest())).name
        answer = await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="simple"))
        told["unload"] = [answer.model_name, answer.isUnloaded]
        told["after_unload"] = (await stub.ModelReady(pb.ModelReadyRequest(name="simple"))).ready
        answer = await stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="simple"))
        told["load"] = [answer.model_name, answer.isLoaded]
        told["after_load"] = (await stub.ModelReady(pb.ModelReadyRequest(name="simple"))).ready
        told["load_unknown"] = await code_of(
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="nobody"))
        )
        told["unload_unknown"] = await code_of(
            stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="nobody"))
        )
        told["path"] = await code_of(stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="../etc")))
        told["nothing"] = await code_of(stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest()))
    return told


for each in sys.argv[1:]:
    print(json.dumps(asyncio.run(main(each))))
