"""Reading text in images: PP-OCRv6's detector and recogniser as one ensemble, boxes first, then what stands in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlmesh_cli.errors import CliError
from mlmesh_cli.sample_models.base import CARD_FILE, CONFIG_FILE, SampleModel, onnx_library, origin, package_file

_CONFIG = """\
platform: "ensemble"
max_batch_size: 0
input [ { name: "image" data_type: TYPE_STRING dims: [ 1 ] } ]
output [
  { name: "boxes" data_type: TYPE_FP32 dims: [ -1, 4, 2 ] },
  { name: "scores" data_type: TYPE_FP32 dims: [ -1 ] },
  { name: "text" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "confidence" data_type: TYPE_FP32 dims: [ -1 ] }
]
ensemble_scheduling {
  step [
    {
      model_name: "mlmesh.decode" model_version: -1
      input_map { key: "image" value: "image" }
      output_map { key: "pixels" value: "pixels" }
    },
    {
      model_name: "mlmesh.text-input" model_version: -1
      input_map { key: "pixels" value: "pixels" }
      output_map { key: "x" value: "whole" }
    },
    {
      model_name: "det.onnx" model_version: -1
      input_map { key: "x" value: "whole" }
      output_map { key: "map" value: "map" }
    },
    {
      model_name: "mlmesh.text-boxes" model_version: -1
      input_map { key: "map" value: "map" }
      input_map { key: "pixels" value: "pixels" }
      output_map { key: "boxes" value: "boxes" }
      output_map { key: "scores" value: "scores" }
    },
    {
      model_name: "mlmesh.text-crops" model_version: -1
      input_map { key: "pixels" value: "pixels" }
      input_map { key: "boxes" value: "boxes" }
      output_map { key: "x" value: "crops" }
    },
    {
      model_name: "rec.onnx" model_version: -1
      input_map { key: "x" value: "crops" }
      output_map { key: "class" value: "class" }
      output_map { key: "probability" value: "probability" }
    },
    {
      model_name: "mlmesh.ctc" model_version: -1
      input_map { key: "class" value: "class" }
      input_map { key: "probability" value: "probability" }
      output_map { key: "text" value: "text" }
      output_map { key: "confidence" value: "confidence" }
    }
  ]
}
parameters [
  { key: "mlmesh.text-input.side_min" value: { string_value: "320" } },
  { key: "mlmesh.text-input.side_max" value: { string_value: "1536" } },
  { key: "mlmesh.text-boxes.boxes_max" value: { string_value: "100" } },
  { key: "mlmesh.text-crops.width_max" value: { string_value: "1280" } },
  { key: "mlmesh.requests_max" value: { string_value: "16" } }
]
"""
_STREAMED = "model_transaction_policy { decoupled: true }\n"

_CARD = """\
# Text recognition

Finds the lines of text in an image and reads them. Every request is one PNG or JPEG file; there are two answers to it,
as they come: where the lines are, then what stands in them.

- Networks: PP-OCRv6 small, detection and recognition, from the Python package {origin}.
- Licence: Apache-2.0; the networks are of PaddleOCR (Baidu), `MODEL_LICENSES.md` says more.
- Changed: the recogniser answers with the best class of every step and its probability instead of all of them;
  tensors have other names.
- Input `image` BYTES [1]. Outputs `boxes` FP32 [lines, 4, 2] (corners x, y in pixels, clockwise), `scores` FP32
  [lines], `text` BYTES [lines], `confidence` FP32 [lines]; lines from top to bottom, left to right.
- Characters: Chinese, Japanese, Latin and more, `dictionary.txt`.
"""


def build(*, unary: bool = False) -> SampleModel:
    """Make it; `unary`: both answers in one, for callers without a stream. Raises CliError."""
    onnx = onnx_library()
    detector, recogniser = (_file(f"models/PP-OCRv6_{kind}_small.onnx") for kind in ("det", "rec"))
    card = _CARD.format(origin=origin("rapidocr"))
    recognition = onnx.load(str(recogniser))
    files: dict[str, bytes | Path] = {
        "det.onnx": renamed(onnx.load(str(detector)), output="map"),
        "rec.onnx": best_classes(recognition),
        "dictionary.txt": characters(recognition),
        CONFIG_FILE: (_CONFIG + ("" if unary else _STREAMED)).encode(),
        CARD_FILE: card.encode(),
    }
    return SampleModel(
        description="Text in images: lines found, then read (PP-OCRv6 small, Apache-2.0)",
        card=card,
        files=files,
        inputs=(("image", "BYTES", (1,)),),
        outputs=(
            ("boxes", "FP32", (-1, 4, 2)),
            ("scores", "FP32", (-1,)),
            ("text", "BYTES", (-1,)),
            ("confidence", "FP32", (-1,)),
        ),
        labels={"license": "Apache-2.0", "origin": origin("rapidocr")},
    )


def _file(path: str) -> Path:
    return package_file("rapidocr", path, distribution="rapidocr")


def renamed(model: Any, *, output: str) -> bytes:
    """A network whose only output has another name."""
    onnx = onnx_library()
    graph = model.graph
    (old,) = (each.name for each in graph.output)
    graph.node.append(onnx.helper.make_node("Identity", [old], [output]))
    graph.output[0].name = output
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def best_classes(model: Any) -> bytes:
    """A recogniser that answers `class` INT64 and `probability` FP32 [rows, steps]: kilobytes, not megabytes a row."""
    onnx = onnx_library()
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = model.graph
    (scores,) = (each.name for each in graph.output)
    graph.node.append(helper.make_node("ArgMax", [scores], ["class"], axis=2, keepdims=0))
    graph.node.append(helper.make_node("ReduceMax", [scores], ["probability"], axes=[2], keepdims=0))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("class", kinds.INT64, ["rows", "steps"]))
    graph.output.append(helper.make_tensor_value_info("probability", kinds.FLOAT, ["rows", "steps"]))
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def characters(model: Any) -> bytes:
    """The recogniser's dictionary, one character a line. Raises CliError."""
    found = {entry.key: entry.value for entry in model.metadata_props}.get("character", "")
    if not found:
        raise CliError("the recogniser carries no dictionary", "another version of rapidocr may", reason="NOT_ONNX")
    return str(found).encode()
