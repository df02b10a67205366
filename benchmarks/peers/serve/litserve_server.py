"""LitServe over HTTP, the only protocol it has. Usage: litserve_server.py NAME=PATH..."""

from __future__ import annotations

import os
import sys

import litserve as ls
import numpy as np

NAME, PATH = sys.argv[1].split("=", 1)


class Served(ls.LitAPI):
    """Batches of what waits; the body of a request is the raw bytes of its tensors, one after the other."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        """Read the file, in the worker."""
        sys.path.insert(0, os.environ["BENCH_FOLDER"])
        from runtime_onnx import Model as Onnx

        self._model = Onnx(PATH)

    def decode_request(self, request: dict) -> list:
        """Lists of numbers: JSON is what LitServe's requests are made of."""
        types = [np.float32 if kind == "tensor(float)" else np.int64 for _, kind in self._model.inputs]
        pairs = zip(self._model.inputs, types, strict=True)
        return [np.asarray(request[name], dtype)[None] for (name, _), dtype in pairs]

    def batch(self, inputs: list) -> list:
        """Rows of several requests."""
        return [np.concatenate(parts) for parts in zip(*inputs, strict=True)]

    def unbatch(self, output: np.ndarray) -> list:
        """One row each."""
        return list(output)

    def predict(self, x: list) -> np.ndarray:
        """One batch."""
        return self._model.run({name: array for (name, _), array in zip(self._model.inputs, x, strict=True)})

    def encode_response(self, output: np.ndarray) -> dict:
        """Numbers."""
        return {"y": output.ravel().tolist()}


if __name__ == "__main__":
    api = Served(max_batch_size=8, batch_timeout=0.0, api_path="/predict")
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ.get("BENCH_WORKERS", "2")))
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_HTTP_PORT"]), generate_client_file=False)
