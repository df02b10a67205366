"""A classifier of images that training made, with what stands before and behind it: a PNG in, the class out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mlmesh_cli.errors import CliError
from mlmesh_cli.sample_models.base import CARD_FILE, CONFIG_FILE, SampleModel

_CONFIG = """\
platform: "ensemble"
max_batch_size: 32
input [ {{ name: "image" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [
  {{ name: "class" data_type: TYPE_INT64 dims: [ -1 ] }},
  {{ name: "confidence" data_type: TYPE_FP32 dims: [ -1 ] }},
  {{ name: "label" data_type: TYPE_STRING dims: [ -1 ] }}
]
ensemble_scheduling {{
  step [
    {{
      model_name: "mlmesh.image" model_version: -1
      input_map {{ key: "image" value: "image" }}
      output_map {{ key: "pixels" value: "pixels" }}
    }},
    {{
      model_name: "network.onnx" model_version: -1
      input_map {{ key: "{input}" value: "pixels" }}
      output_map {{ key: "{output}" value: "logits" }}
    }},
    {{
      model_name: "mlmesh.classes" model_version: -1
      input_map {{ key: "scores" value: "logits" }}
      output_map {{ key: "class" value: "class" }}
      output_map {{ key: "confidence" value: "confidence" }}
      output_map {{ key: "label" value: "label" }}
    }}
  ]
}}
parameters [ {{ key: "mlmesh.classes.k" value: {{ string_value: "{k}" }} }} ]
"""

_CARD = """\
# Classes of images

A PNG or JPEG file to its classes, best first. Made of {origin}, a model of this platform's own training, and the
statistics of the images that it was trained on: files are brought to their size, channels and range of values.

- Input `image` BYTES [batch, 1]. Outputs `class` INT64, `confidence` FP32, `label` BYTES [batch, {k}].
"""


def build(folder: Path, origin: str, signature: tuple[str, str], *, labels: Mapping[str, str]) -> SampleModel:
    """Make it of a trained version's files.

    Args:
        folder: with model.onnx, statistics.json and labels.txt. origin: name of the version.
        signature: names of the network's input and of its output with the scores.
        labels: of the version that it is made of.

    Raises:
        CliError: the version is not of images.
    """
    try:
        kind = json.loads((folder / "statistics.json").read_bytes()).get("kind")
        classes = len((folder / "labels.txt").read_text().split("\n"))
    except (OSError, ValueError):
        kind, classes = "", 0
    if kind != "image":
        raise CliError(
            f"{origin} does not carry the statistics of images that training saves",
            "train one: `mlmesh train --recipe cnn --dataset mnist`",
            reason="NOT_IMAGES",
        )
    k = min(3, classes)
    card = _CARD.format(origin=origin, k=k)
    return SampleModel(
        description=f"Classes of images, a PNG or JPEG file in, made of {origin}",
        card=card,
        files={
            "network.onnx": folder / "model.onnx",
            "statistics.json": folder / "statistics.json",
            "labels.txt": folder / "labels.txt",
            CONFIG_FILE: _CONFIG.format(input=signature[0], output=signature[1], k=k).encode(),
            CARD_FILE: card.encode(),
        },
        inputs=(("image", "BYTES", (-1, 1)),),
        outputs=(("class", "INT64", (-1, -1)), ("confidence", "FP32", (-1, -1)), ("label", "BYTES", (-1, -1))),
        labels={"origin": origin, **{name: labels[name] for name in ("dataset", "recipe") if name in labels}},
    )
