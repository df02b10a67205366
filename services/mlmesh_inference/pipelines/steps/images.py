"""Steps for images: decode, resize, normalise. PNG and JPEG, by Pillow."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.pipelines.steps.base import BuiltIn, Options, imaging, tensor
from mlmesh_inference.tensors import Array, Signature
from mlmesh_runtime.errors import InvalidInput

PIXELS_MAX: Final = 16_000_000
"""Most pixels of an image, read from its header: a small file can decode to gigabytes."""
FORMATS: Final = ("PNG", "JPEG")

_UNKNOWN: Final = {"shape": (3, 224, 224), "value_max": 1.0}


def decode(data: object, *, place: int, pixels_max: int, mode: str) -> Any:
    """An image (PIL.Image) in a mode, "L" or "RGB". Raises InvalidInput for what is no image, or too large a one.

    Only the header is looked at before the pixels are known to be few enough, and only these formats are tried.
    """
    field = f"inputs[image][{place}]"
    pillow = imaging()
    bombs = (pillow.DecompressionBombError, pillow.DecompressionBombWarning)
    if not isinstance(data, bytes):
        raise InvalidInput("an image is BYTES: a PNG or JPEG file", field=field)
    try:
        image = pillow.open(io.BytesIO(data), formats=FORMATS)
    except bombs as error:
        # Pillow's own bound, which a process may have lowered or made an error.
        text = f"the image has too many pixels, at most {pixels_max} are allowed"
        raise InvalidInput(text, field=field, reason="SHAPE_MISMATCH") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidInput("it is neither a PNG nor a JPEG file", field=field) from error
    width, height = image.size
    if width * height > pixels_max or not width * height:
        text = f"the image has {width} x {height} pixels, at most {pixels_max} are allowed"
        raise InvalidInput(text, field=field, reason="SHAPE_MISMATCH")
    try:
        if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
            # What shines through is white paper.
            image = image.convert("RGBA")
            image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
        return image.convert(mode)
    except (OSError, ValueError, SyntaxError, MemoryError, *bombs) as error:
        raise InvalidInput("the image's data is damaged", field=field) from error


def statistics(path: Path) -> dict[str, Any]:
    """What training saved of the images it saw: "shape" [channels, height, width], "mean", "std", "value_max"."""
    try:
        found = json.loads(path.read_bytes())
        channels, height, width = found["shape"]
        for name in ("mean", "std", "value_max"):
            if not math.isfinite(float(found[name])):
                raise ValueError(name)
        if channels not in (1, 3) or not 0 < height <= 4096 or not 0 < width <= 4096:
            raise ValueError("shape")
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{path.name} does not hold the statistics of images: {error}") from error
    return dict(found)


class ImageStep(BuiltIn):
    """mlmesh.image: files to one tensor.

    `image` BYTES of any shape, a file an element -> `pixels` FP32 [count, channels, height, width].

    Options: statistics (a file; statistics.json where the version has it) says channels, height, width, value_max (what
    the file's 255 becomes), mean and std, unless options of these names do; normalise: none (the network does it
    itself, as those of our training), or statistics ((x - mean) / std); invert: black becomes white; pixels_max.
    """

    def __init__(self, options: Options) -> None:
        imaging()
        path = options.file("statistics", "statistics.json")
        saved: Mapping[str, Any] = _UNKNOWN if path is None else statistics(path)
        self._channels = options.integer("channels", saved["shape"][0], low=1, high=3)
        self._height = options.integer("height", saved["shape"][1], low=1, high=4096)
        self._width = options.integer("width", saved["shape"][2], low=1, high=4096)
        top = options.number("value_max", float(saved["value_max"]), low=1e-3, high=1e6)
        mean = options.numbers("mean", [float(saved.get("mean", 0))] * self._channels, low=-1e6, high=1e6)
        std = options.numbers("std", [float(saved.get("std", 1))] * self._channels, low=0, high=1e6)
        normalise = options.choice("normalise", "none", "none", "statistics") == "statistics"
        self._invert = options.flag("invert", default=False)
        self._pixels_max = options.integer("pixels_max", PIXELS_MAX, low=1, high=1 << 28)
        options.finish()
        if self._channels == 2:
            raise EngineError(f"parameter {options.step}.channels: expected 1 or 3; got 2")
        scale: Array = np.full(self._channels, top / 255, np.float32)
        shift: Array = np.zeros(self._channels, np.float32)
        if normalise:
            spread = np.maximum(np.array(std, np.float32), np.float32(1e-6))
            scale = scale / spread
            shift = -np.array(mean, np.float32) / spread
        self._scale = scale.reshape(-1, 1, 1)
        self._shift = shift.reshape(-1, 1, 1)
        self.signature = Signature(
            inputs=(tensor("image", "BYTES"),),
            outputs=(tensor("pixels", "FP32", -1, self._channels, self._height, self._width),),
        )

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        files = inputs["image"].ravel()
        pixels = np.empty((len(files), self._channels, self._height, self._width), np.float32)
        for place, data in enumerate(files):
            image = decode(data, place=place, pixels_max=self._pixels_max, mode="L" if self._channels == 1 else "RGB")
            if image.size != (self._width, self._height):
                image = image.resize((self._width, self._height))
            array = np.asarray(image, np.float32)
            array = array[None] if self._channels == 1 else array.transpose(2, 0, 1)
            if self._invert:
                array = 255 - array
            pixels[place] = array * self._scale + self._shift
        return {"pixels": pixels}


class DecodeStep(BuiltIn):
    """mlmesh.decode: one file to its pixels as they are.

    `image` BYTES of one element -> `pixels` UINT8 [height, width, 3]. Options: pixels_max.
    """

    def __init__(self, options: Options) -> None:
        imaging()
        self._pixels_max = options.integer("pixels_max", PIXELS_MAX, low=1, high=1 << 28)
        options.finish()
        self.signature = Signature(inputs=(tensor("image", "BYTES"),), outputs=(tensor("pixels", "UINT8", -1, -1, 3),))

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        files = inputs["image"].ravel()
        if len(files) != 1:
            raise InvalidInput(f"expected one image, got {len(files)}", field="inputs[image]", reason="SHAPE_MISMATCH")
        image = decode(files[0], place=0, pixels_max=self._pixels_max, mode="RGB")
        return {"pixels": np.asarray(image, np.uint8)}
