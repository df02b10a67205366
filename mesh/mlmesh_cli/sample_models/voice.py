"""Voice activity: Silero's detector as a model with implicit state, 32 ms of sound a request.

The published network keeps a recurrent state [2, batch, 128] and wants each frame behind the last 64 samples of the one
before. Both become states of the sequence: the network is wrapped so that every tensor begins with the batch dimension,
which lets the server run frames of many callers together.
"""

from __future__ import annotations

import copy
from typing import Any

from mlmesh_cli.sample_models.base import CARD_FILE, CONFIG_FILE, SampleModel, onnx_library, origin, package_file

RATE, FRAME, CONTEXT, HIDDEN = 16_000, 512, 64, 128

_CONFIG = f"""\
max_batch_size: 32
input [ {{ name: "audio" data_type: TYPE_FP32 dims: [ {FRAME} ] }} ]
output [ {{ name: "speech" data_type: TYPE_FP32 dims: [ 1 ] }} ]
sequence_batching {{
  max_sequence_idle_microseconds: 60000000
  oldest {{ max_candidate_sequences: 1024 }}
  state [
    {{ input_name: "state" output_name: "state_out" data_type: TYPE_FP32 dims: [ 2, {HIDDEN} ] }},
    {{ input_name: "context" output_name: "context_out" data_type: TYPE_FP32 dims: [ {CONTEXT} ] }}
  ]
}}
"""

_CARD = """\
# Voice activity detection

How likely the last 32 ms are speech. A sequence is one stream of sound at 16 kHz: 512 samples, -1 to 1, a request.

- Network: Silero VAD, from the Python package {origin}, file `silero_vad_16k_op15.onnx`.
- Licence: MIT, Silero Team.
- Changed: its recurrent state and the last 64 samples are tensors with a batch dimension in front; weights are as they
  were.
- Input `audio` FP32 [batch, 512], output `speech` FP32 [batch, 1], 0 to 1.
"""


def build() -> SampleModel:
    """Make it. Raises CliError when a package is missing."""
    source = package_file("silero_vad", "data/silero_vad_16k_op15.onnx", distribution="silero-vad")
    return SampleModel(
        description="Voice activity detection, 32 ms a request, stateful (Silero VAD, MIT)",
        card=_CARD.format(origin=origin("silero-vad")),
        files={
            "model.onnx": wrapped(onnx_library().load(str(source))),
            CONFIG_FILE: _CONFIG.encode(),
            CARD_FILE: _CARD.format(origin=origin("silero-vad")).encode(),
        },
        labels={"license": "MIT", "origin": origin("silero-vad"), "sample_rate": str(RATE)},
    )


def wrapped(model: Any) -> bytes:
    """Silero's network with its memory as plain tensors that have the batch in front.

    audio [batch, 512], context [batch, 64], state [batch, 2, 128] -> speech [batch, 1], context_out, state_out.
    """
    onnx = onnx_library()
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = model.graph
    # What callers know as "state" has the batch in front, what the network knows by this name has not.
    nodes = [_renamed(node, {"state": "state_inside"}) for node in graph.node]
    before = [
        helper.make_node("Concat", ["context", "audio"], ["input"], axis=1),
        helper.make_node("Transpose", ["state"], ["state_inside"], perm=[1, 0, 2]),
    ]
    after = [
        helper.make_node("Identity", ["output"], ["speech"]),
        helper.make_node("Transpose", ["stateN"], ["state_out"], perm=[1, 0, 2]),
        helper.make_node("Slice", ["audio", "tail_start", "tail_end", "tail_axis"], ["context_out"]),
    ]
    constants = [
        helper.make_tensor("sr", kinds.INT64, [], [RATE]),
        helper.make_tensor("tail_start", kinds.INT64, [1], [FRAME - CONTEXT]),
        helper.make_tensor("tail_end", kinds.INT64, [1], [FRAME]),
        helper.make_tensor("tail_axis", kinds.INT64, [1], [1]),
    ]

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, kinds.FLOAT, ["batch", *shape])

    made = helper.make_graph(
        [*before, *nodes, *after],
        "voice-activity",
        [value("audio", FRAME), value("context", CONTEXT), value("state", 2, HIDDEN)],
        [value("speech", 1), value("context_out", CONTEXT), value("state_out", 2, HIDDEN)],
        [*graph.initializer, *constants],
    )
    result = helper.make_model(made, opset_imports=list(model.opset_import), producer_name="mlmesh")
    result.ir_version = model.ir_version
    onnx.checker.check_model(result)
    data: bytes = result.SerializeToString(deterministic=True)
    return data


def _renamed(node: Any, names: dict[str, str]) -> Any:
    """A node with other names for what it takes; the graphs inside it, too, which see the outer ones."""
    node = copy.deepcopy(node)
    node.input[:] = [names.get(name, name) for name in node.input]
    for attribute in node.attribute:
        if attribute.HasField("g"):
            inner = [_renamed(each, names) for each in attribute.g.node]
            del attribute.g.node[:]
            attribute.g.node.extend(inner)
    return node
