"""Small networks as ONNX, made here: what engines are compared on. Weights are the same every time."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.support.onnx_models import _model


def _weights(**arrays: np.ndarray) -> list[object]:
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def perceptron(features: int = 64, hidden: int = 32, classes: int = 10, *, scale: float = 1.0) -> bytes:
    """logits[N,classes] = w2 * relu(w1 * x + b1) + b2 over x[N,features], FP32."""
    random = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * scale / np.sqrt(shape[0])).astype(np.float32)

    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["logits"]),
    ]
    constants = _weights(w1=normal(features, hidden), b1=normal(hidden), w2=normal(hidden, classes), b2=normal(classes))
    return _model(
        nodes,
        {"x": (TensorProto.FLOAT, ["batch", features])},
        {"logits": (TensorProto.FLOAT, ["batch", classes])},
        constants,  # type: ignore[arg-type]
    )


def convolutions(size: int = 8) -> bytes:
    """logits[N,4] of image[N,1,size,size]: convolution, pooling, a linear layer."""
    random = np.random.default_rng(2)
    nodes = [
        helper.make_node("Conv", ["image", "k"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["logits"]),
    ]
    constants = _weights(
        k=(random.standard_normal((4, 1, 3, 3)) / 3).astype(np.float32),
        w=(random.standard_normal((4 * (size // 2) ** 2, 4)) / size).astype(np.float32),
    )
    return _model(
        nodes,
        {"image": (TensorProto.FLOAT, ["batch", 1, size, size])},
        {"logits": (TensorProto.FLOAT, ["batch", 4])},
        constants,  # type: ignore[arg-type]
    )


def embedder(vocabulary: int = 50, width: int = 16) -> bytes:
    """embedding[N,width] = sum of table[ids] where mask is 1, over ids and mask INT64 [N,sequence]."""
    random = np.random.default_rng(3)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "last"], ["wide"]),
        helper.make_node("Mul", ["e", "wide"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "middle"], ["embedding"], keepdims=0),
    ]
    constants = _weights(
        table=random.standard_normal((vocabulary, width)).astype(np.float32),
        last=np.array([2], np.int64),
        middle=np.array([1], np.int64),
    )
    shape = ["batch", "sequence"]
    return _model(
        nodes,
        {"ids": (TensorProto.INT64, shape), "mask": (TensorProto.INT64, shape)},
        {"embedding": (TensorProto.FLOAT, ["batch", width])},
        constants,  # type: ignore[arg-type]
    )


def endless(turns: int = 1 << 40) -> bytes:
    """y[N,4] of x[N,4], after so many turns of a loop: a file of a few bytes that takes for ever."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Tanh", ["before"], ["after"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, None),
        ],
    )
    shape = ["batch", 4]
    return _model(
        [helper.make_node("Loop", ["turns", "always", "x"], ["y"], body=body)],
        {"x": (TensorProto.FLOAT, shape)},
        {"y": (TensorProto.FLOAT, shape)},
        _weights(turns=np.array(turns, np.int64), always=np.array(True)),  # type: ignore[arg-type]
    )
