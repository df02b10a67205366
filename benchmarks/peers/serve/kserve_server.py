"""KServe's own server with one model a file, gRPC on BENCH_GRPC_PORT. Usage: kserve_server.py NAME=PATH..."""

from __future__ import annotations

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from runtime_onnx import Model as Onnx


class Served(Model):
    """Runs each request by itself: KServe's Python server does not batch."""

    def __init__(self, name: str, path: str, threads: ThreadPoolExecutor) -> None:
        super().__init__(name)
        self._model = Onnx(path)
        self._threads = threads
        self.ready = True

    async def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:  # noqa: ARG002
        """One request."""
        feed = {tensor.name: tensor.as_numpy() for tensor in payload.inputs}
        if os.environ.get("BENCH_SESSIONS", "1") == "1":
            result = self._model.run(feed)
        else:
            result = await asyncio.get_running_loop().run_in_executor(self._threads, self._model.run, feed)
        output = InferOutput(name=self._model.output, shape=list(result.shape), datatype="FP32")
        output.set_data_from_numpy(result, binary_data=True)
        return InferResponse(response_id=payload.id or "", model_name=self.name, infer_outputs=[output])


if __name__ == "__main__":
    port = int(os.environ["BENCH_GRPC_PORT"])
    pool = ThreadPoolExecutor(2)
    models = [Served(*argument.split("=", 1), pool) for argument in sys.argv[1:]]
    ModelServer(http_port=int(os.environ["BENCH_HTTP_PORT"]), grpc_port=port, workers=1).start(models)
