"""Triton's Python backend: ONNX Runtime over whatever Triton's dynamic batcher put together."""

from __future__ import annotations

import sys

import numpy as np
import triton_python_backend_utils as backend


class TritonPythonModel:
    """One instance."""

    def initialize(self, args: dict) -> None:
        """Read the file that the configuration names."""
        import json

        parameters = json.loads(args["model_config"])["parameters"]
        sys.path.insert(0, parameters["folder"]["string_value"])
        from runtime_onnx import Model as Onnx

        self._model = Onnx(parameters["path"]["string_value"])

    def execute(self, requests: list) -> list:
        """One batch."""
        feeds = [
            [backend.get_input_tensor_by_name(request, name).as_numpy() for name, _ in self._model.inputs]
            for request in requests
        ]
        arrays = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*feeds, strict=True)]
        result = self._model.run({name: array for (name, _), array in zip(self._model.inputs, arrays, strict=True)})
        answers, start = [], 0
        for feed in feeds:
            end = start + len(feed[0])
            tensor = backend.Tensor(self._model.output, result[start:end])
            answers.append(backend.InferenceResponse(output_tensors=[tensor]))
            start = end
        return answers
