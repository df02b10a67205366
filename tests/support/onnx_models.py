"""Small ONNX models, made here. Each function returns the bytes of a .onnx file; tensors are named as given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

DATATYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}
Shape = Sequence[int | str]


def _model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, Shape]],
    outputs: dict[str, tuple[int, Shape]],
    constants: Sequence[onnx.TensorProto] = (),
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
        list(constants),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def add(width: int = 4, *, plus: float = 1.0) -> bytes:
    """y[N,width] = x[N,width] + plus, FP32."""
    constant = numpy_helper.from_array(np.array(plus, np.float32), "plus")
    return _model(
        [helper.make_node("Add", ["x", "plus"], ["y"])],
        {"x": (TensorProto.FLOAT, ["batch", width])},
        {"y": (TensorProto.FLOAT, ["batch", width])},
        [constant],
    )


def add_sub(kind: str = "INT32", width: int = 16) -> bytes:
    """OUTPUT0 = INPUT0 + INPUT1, OUTPUT1 = INPUT0 - INPUT1, all [N,width]: the model of the protocol's examples."""
    shape: Shape = ["batch", width]
    return _model(
        [
            helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
            helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
        ],
        dict.fromkeys(("INPUT0", "INPUT1"), (DATATYPES[kind], shape)),
        dict.fromkeys(("OUTPUT0", "OUTPUT1"), (DATATYPES[kind], shape)),
    )


def identity(kinds: Sequence[str] = tuple(DATATYPES), shape: Shape = ("batch", "width")) -> bytes:
    """out_KIND = in_KIND for every datatype given."""
    return _model(
        [helper.make_node("Identity", [f"in_{kind}"], [f"out_{kind}"]) for kind in kinds],
        {f"in_{kind}": (DATATYPES[kind], list(shape)) for kind in kinds},
        {f"out_{kind}": (DATATYPES[kind], list(shape)) for kind in kinds},
    )


def lookup(rows: int = 8) -> bytes:
    """y[N] = table[x[N]] with table = 0, 10, 20, ...: an index that is not in the table fails in the engine."""
    table = numpy_helper.from_array(np.arange(rows, dtype=np.float32) * 10, "table")
    return _model(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        {"x": (TensorProto.INT64, ["batch"])},
        {"y": (TensorProto.FLOAT, ["batch"])},
        [table],
    )


def fixed(width: int = 4) -> bytes:
    """y[2,width] = -x[2,width], FP32: no batch dimension."""
    return _model(
        [helper.make_node("Neg", ["x"], ["y"])],
        {"x": (TensorProto.FLOAT, [2, width])},
        {"y": (TensorProto.FLOAT, [2, width])},
    )


def wrong_shape() -> bytes:
    """Says y[N,4] and gives one row, whatever came in: a model that lies about its batch dimension."""
    return _model(
        [helper.make_node("Compress", ["x", "first"], ["y"], axis=0)],
        {"x": (TensorProto.FLOAT, ["batch", 4])},
        {"y": (TensorProto.FLOAT, ["rows", 4])},
        [numpy_helper.from_array(np.array([True]), "first")],
    )


def always_failing() -> bytes:
    """Loads, and fails on every row: it looks something up that is not there."""
    return _model(
        [
            helper.make_node("Add", ["x", "beyond"], ["index"]),
            helper.make_node("Gather", ["table", "index"], ["y"]),
        ],
        {"x": (TensorProto.INT64, ["batch"])},
        {"y": (TensorProto.FLOAT, ["batch"])},
        [
            numpy_helper.from_array(np.arange(2, dtype=np.float32), "table"),
            numpy_helper.from_array(np.array(1000, np.int64), "beyond"),
        ],
    )


def slow(turns: int = 200, width: int = 256) -> bytes:
    """y[N,width] = x[N,width] multiplied `turns` times by a fixed matrix: takes time in proportion to turns."""
    matrix = numpy_helper.from_array(np.eye(width, dtype=np.float32), "matrix")
    nodes = [
        helper.make_node("MatMul", ["x" if turn == 0 else f"t{turn}", "matrix"], [f"t{turn + 1}"])
        for turn in range(turns)
    ]
    nodes.append(helper.make_node("Identity", [f"t{turns}"], ["y"]))
    return _model(
        nodes,
        {"x": (TensorProto.FLOAT, ["batch", width])},
        {"y": (TensorProto.FLOAT, ["batch", width])},
        [matrix],
    )


def classes(count: int = 10, width: int = 64) -> bytes:
    """Scores[N,count] of a fixed random linear layer over x[N,width], FP32."""
    weights = np.random.default_rng(7).standard_normal((width, count)).astype(np.float32)
    return _model(
        [helper.make_node("MatMul", ["x", "weights"], ["scores"])],
        {"x": (TensorProto.FLOAT, ["batch", width])},
        {"scores": (TensorProto.FLOAT, ["batch", count])},
        [numpy_helper.from_array(weights, "weights")],
    )


def image_classes(count: int = 10, size: int = 8) -> bytes:
    """Scores[N,count] of a fixed random linear layer over images x[N,1,size,size], FP32."""
    weights = np.random.default_rng(7).standard_normal((size * size, count)).astype(np.float32)
    return _model(
        [
            helper.make_node("Flatten", ["x"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "weights"], ["scores"]),
        ],
        {"x": (TensorProto.FLOAT, ["batch", 1, size, size])},
        {"scores": (TensorProto.FLOAT, ["batch", count])},
        [numpy_helper.from_array(weights, "weights")],
    )


def accumulate() -> bytes:
    """OUTPUT[N,1] = SUM_NEXT[N,1] = INPUT[N,1] + SUM[N,1], INT32, with SUM taken as 0 where START[N,1] is 1."""
    kinds = (TensorProto.INT32, ["batch", 1])
    return _model(
        [
            helper.make_node("Sub", ["one", "START"], ["keep"]),
            helper.make_node("Mul", ["SUM", "keep"], ["kept"]),
            helper.make_node("Add", ["INPUT", "kept"], ["SUM_NEXT"]),
            helper.make_node("Identity", ["SUM_NEXT"], ["OUTPUT"]),
        ],
        dict.fromkeys(("INPUT", "START", "SUM"), kinds),
        dict.fromkeys(("OUTPUT", "SUM_NEXT"), kinds),
        [numpy_helper.from_array(np.array([[1]], np.int32), "one")],
    )


def countdown() -> bytes:
    """A model that is run again and again: VALUE[N,1] = LEFT - TURN_NEXT, INT64, until it is 0.

    TURN_NEXT = TURN + 1; LEFT is the caller's; STOP[N,1] BOOL is whether VALUE is 0.
    """
    whole = (TensorProto.INT64, ["batch", 1])
    return _model(
        [
            helper.make_node("Add", ["TURN", "one"], ["TURN_NEXT"]),
            helper.make_node("Sub", ["LEFT", "TURN_NEXT"], ["VALUE"]),
            helper.make_node("Equal", ["VALUE", "zero"], ["STOP"]),
        ],
        dict.fromkeys(("LEFT", "TURN"), whole),
        {**dict.fromkeys(("VALUE", "TURN_NEXT"), whole), "STOP": (TensorProto.BOOL, ["batch", 1])},
        [
            numpy_helper.from_array(np.array([[1]], np.int64), "one"),
            numpy_helper.from_array(np.array([[0]], np.int64), "zero"),
        ],
    )


def heavy(*, plus: float = 1.0, wide: int = 1 << 16) -> bytes:
    """y[N,4] = (x[N,4] @ a) @ b + plus, FP32, with weights of 32 * `wide` bytes that no optimisation takes away."""
    generator = np.random.default_rng(int(plus))
    a = numpy_helper.from_array(generator.standard_normal((4, wide)).astype(np.float32), "a")
    b = numpy_helper.from_array(generator.standard_normal((wide, 4)).astype(np.float32), "b")
    constant = numpy_helper.from_array(np.array(plus, np.float32), "plus")
    return _model(
        [
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "b"], ["s"]),
            helper.make_node("Add", ["s", "plus"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, ["batch", 4])},
        {"y": (TensorProto.FLOAT, ["batch", 4])},
        [a, b, constant],
    )
