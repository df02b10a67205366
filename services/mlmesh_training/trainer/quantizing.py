"""ONNX models in fewer bits: INT8 by calibration, FP16 inside. ONNX Runtime's own tools do the work.

What comes out is what TensorRT takes: Q/DQ pairs with symmetric scales, weights a scale a channel, biases left alone.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mlmesh_training.options import MixedPrecision, Quantization
from mlmesh_training.trainer.reporter import PermanentError

CALIBRATION_BATCH = 32


def int8(source: bytes, quantization: Quantization, inputs: Sequence[Tensor], *, input_names: Sequence[str]) -> bytes:
    """A model with 8-bit weights and activations.

    Args:
        inputs: training examples, one tensor an input; the first `calibration_examples` are calibrated on.

    Errors: PermanentError when the model cannot be quantised.
    """
    import onnx  # noqa: PLC0415
    from onnxruntime import quantization as tools  # noqa: PLC0415

    methods = {
        "minmax": tools.CalibrationMethod.MinMax,
        "entropy": tools.CalibrationMethod.Entropy,
        "percentile": tools.CalibrationMethod.Percentile,
    }
    examples = _Examples([each[: quantization.calibration_examples] for each in inputs], input_names)
    with tempfile.TemporaryDirectory(prefix="quantize-") as scratch, _quiet(), _explained("quantised"):
        given, prepared, made = (Path(scratch) / name for name in ("source.onnx", "prepared.onnx", "int8.onnx"))
        given.write_bytes(source)
        tools.quant_pre_process(given, prepared, skip_symbolic_shape=True)
        tools.quantize_static(
            prepared,
            made,
            examples,
            quant_format=tools.QuantFormat.QDQ,
            # Where the arithmetic is. Quantised scalars of other operators win nothing, and TensorRT refuses them.
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            activation_type=tools.QuantType.QInt8,
            weight_type=tools.QuantType.QInt8,
            calibrate_method=methods[quantization.method],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
        )
        proto = onnx.load(made)
    return _whole(proto)


def half(source: bytes, mixed: MixedPrecision) -> bytes:
    """A model that computes in FP16 where that is safe and keeps FP32 inputs and outputs. Errors: PermanentError."""
    import onnx  # noqa: PLC0415
    from onnxruntime.transformers.float16 import convert_float_to_float16  # noqa: PLC0415
    from onnxruntime.transformers.onnx_model import OnnxModel  # noqa: PLC0415

    if mixed.precision != "FP16":
        raise PermanentError(f"{mixed.precision} models cannot be checked here: ONNX Runtime computes FP16 on a CPU")
    with _quiet(), _explained("converted"):
        made = OnnxModel(convert_float_to_float16(onnx.load_from_string(source), keep_io_types=True))
        # The converter appends its casts at the end.
        made.topological_sort()
        proto = made.model
    return _whole(proto)


class _Examples:
    """Batches of examples by input name, as the calibrators of ONNX Runtime read them."""

    def __init__(self, inputs: Sequence[Tensor], names: Sequence[str]) -> None:
        self._inputs = inputs
        self._names = names
        self._at = 0

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, None at the end."""
        batch = [each[self._at : self._at + CALIBRATION_BATCH].numpy() for each in self._inputs]
        self._at += CALIBRATION_BATCH
        return dict(zip(self._names, batch, strict=True)) if len(batch[0]) else None

    def rewind(self) -> None:
        """Begin anew."""
        self._at = 0

    def set_range(self, start_index: int, end_index: int) -> None:
        """Strided calibration is not used."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Batches."""
        return (len(self._inputs[0]) + CALIBRATION_BATCH - 1) // CALIBRATION_BATCH


def _whole(proto: Any) -> bytes:
    proto.ClearField("metadata_props")
    proto.graph.ClearField("value_info")
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """The tools raise whatever they meet; a person hears what it was."""
    try:
        yield
    except PermanentError:
        raise
    except Exception as error:
        raise PermanentError(f"the source cannot be {what}: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools' advice, which is for those who call them by hand, out of the job's log."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
