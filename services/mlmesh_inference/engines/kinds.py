"""The engines there are."""

from __future__ import annotations

from mlmesh_inference.engines.base import EngineKind
from mlmesh_inference.engines.onnx import OnnxCudaKind, OnnxKind
from mlmesh_inference.engines.openvino import OpenVinoKind
from mlmesh_inference.engines.torch import TorchKind


def engine_kinds() -> tuple[EngineKind, ...]:
    """Engines that take a model file as it is, in the order of preference before anything is measured."""
    return (OnnxCudaKind(), OnnxKind(), OpenVinoKind(), TorchKind(), TorchKind(compiled=True))
