"""MLServer's runtime for an ONNX file; its settings (adaptive batching among them) are in model-settings.json."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from runtime_onnx import Model as Onnx


class OnnxRuntime(MLModel):
    """One model."""

    async def load(self) -> bool:
        """Read the file."""
        self._model = Onnx(self.settings.parameters.uri)
        self._threads = ThreadPoolExecutor(2)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One request, or a batch that MLServer put together."""
        feed = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        result = await asyncio.get_running_loop().run_in_executor(self._threads, self._model.run, feed)
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output(name=self._model.output, payload=result)]
        )
