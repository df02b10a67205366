"""Steps to read text in an image: what a detector takes and gives, crops for a recogniser, and its classes as text.

The detector is one of "differentiable binarization" (Liao et al., Real-time Scene Text Detection with Differentiable
Binarization, AAAI 2020): its answer is a map of how likely each pixel lies in the shrunken core of a line of text. The
recogniser is trained with CTC (Graves et al., 2006). Written from the papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.pipelines.steps.base import BuiltIn, Options, imaging, lines, tensor
from mlmesh_inference.pipelines.steps.boxes import (
    clockwise,
    components,
    expanded,
    labelling,
    least_rectangle,
    reading_order,
)
from mlmesh_inference.tensors import Array, Signature
from mlmesh_runtime.errors import InvalidInput

_ORDERS: Final = ("BGR", "RGB")


class DetectInputStep(BuiltIn):
    """mlmesh.text-input: an image as the detector takes it.

    `pixels` UINT8 [height, width, 3] -> `x` FP32 [1, 3, h, w], both sides multiples of 32.

    Options: side_min (the shorter side is at least so long, 736), side_max (the longer at most, 2048), mean and std (of
    values 0 to 1), order (BGR or RGB).
    """

    def __init__(self, options: Options) -> None:
        self._pillow = imaging()
        self._side_min = options.integer("side_min", 736, low=32, high=4096)
        self._side_max = options.integer("side_max", 2048, low=self._side_min, high=4096)
        self._mean, self._std = _normalisation(options)
        self._flip = options.choice("order", "BGR", *_ORDERS) == "BGR"
        options.finish()
        self.signature = Signature(
            inputs=(tensor("pixels", "UINT8", -1, -1, 3),), outputs=(tensor("x", "FP32", 1, 3, -1, -1),)
        )

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        pixels = inputs["pixels"]
        height, width = pixels.shape[:2]
        scale = max(1.0, self._side_min / min(height, width))
        scale = min(scale, self._side_max / max(height, width))
        size = tuple(min(max(round(side * scale / 32), 1) * 32, 4096) for side in (width, height))
        if size != (width, height):
            image = self._pillow.fromarray(pixels)
            pixels = np.asarray(image.resize(size, self._pillow.Resampling.BILINEAR))
        return {"x": _network_input(pixels, self._mean, self._std, flip=self._flip)[None]}


class BoxesStep(BuiltIn):
    """mlmesh.text-boxes: a detector's map to boxes of lines of text, in the order in which people read.

    `map` FP32 [1, 1, h, w], `pixels` UINT8 [height, width, 3], the image -> `boxes` FP32 [count, 4, 2], corners x, y in
    pixels of the image, clockwise from the upper left; `scores` FP32 [count].

    Options: threshold (of a pixel, 0.3), score_min (mean of a box, 0.5), unclip (how far the core is grown back: by
    area x unclip / circumference, section 3.4 of the paper; 1.6), boxes_max (the largest are kept, 200).
    """

    def __init__(self, options: Options) -> None:
        labelling()
        self._threshold = options.number("threshold", 0.3, low=0.01, high=0.99)
        self._score_min = options.number("score_min", 0.5, low=0, high=1)
        self._unclip = options.number("unclip", 1.6, low=0, high=10)
        self._boxes_max = options.integer("boxes_max", 200, low=1, high=2000)
        options.finish()
        self.signature = Signature(
            inputs=(tensor("map", "FP32", 1, 1, -1, -1), tensor("pixels", "UINT8", -1, -1, 3)),
            outputs=(tensor("boxes", "FP32", -1, 4, 2), tensor("scores", "FP32", -1)),
        )

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        chances = inputs["map"][0, 0]
        height, width = inputs["pixels"].shape[:2]
        scale = np.array([width / chances.shape[1], height / chances.shape[0]])
        found, scores = [], []
        for outline, score in components(chances, self._threshold, count_max=self._boxes_max):
            corners = least_rectangle(outline)
            if score < self._score_min or min(_sides(corners)) < 3:
                continue
            corners = clockwise(expanded(corners, self._unclip)) * scale
            found.append(np.clip(corners, 0, [width, height]))
            scores.append(score)
        boxes = np.array(found, np.float32).reshape(-1, 4, 2)
        order = reading_order(boxes)
        return {"boxes": boxes[order], "scores": np.array(scores, np.float32)[order]}


class CropsStep(BuiltIn):
    """mlmesh.text-crops: what lies in the boxes, straightened, as the recogniser takes it.

    `pixels` UINT8 [height, width, 3], `boxes` FP32 [count, 4, 2] -> `x` FP32 [count, 3, h, w], narrow ones filled up
    with 0.

    Options: height (48), width_min (320), width_max (2048), multiple (64, of the width: requests of similar widths
    share batches), mean, std, order as for mlmesh.text-input.
    """

    def __init__(self, options: Options) -> None:
        self._pillow = imaging()
        self._height = options.integer("height", 48, low=8, high=512)
        self._width_min = options.integer("width_min", 320, low=8, high=4096)
        self._width_max = options.integer("width_max", 2048, low=self._width_min, high=8192)
        self._multiple = options.integer("multiple", 64, low=1, high=1024)
        self._mean, self._std = _normalisation(options)
        self._flip = options.choice("order", "BGR", *_ORDERS) == "BGR"
        options.finish()
        self.signature = Signature(
            inputs=(tensor("pixels", "UINT8", -1, -1, 3), tensor("boxes", "FP32", -1, 4, 2)),
            outputs=(tensor("x", "FP32", -1, 3, self._height, -1),),
        )

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        image = self._pillow.fromarray(inputs["pixels"])
        crops = [self._crop(image, box.astype(np.float64)) for box in inputs["boxes"]]
        widest = max([self._width_min, *(crop.shape[2] for crop in crops)])
        width = min(-(-widest // self._multiple) * self._multiple, self._width_max)
        result = np.zeros((len(crops), 3, self._height, width), np.float32)
        for place, crop in enumerate(crops):
            result[place, :, :, : crop.shape[2]] = crop
        return {"x": result}

    def _crop(self, image: Any, box: Array) -> Array:
        (wide, high) = (max(1, round(side)) for side in _sides(box))
        if wide > image.width + image.height or high > image.width + image.height:
            raise InvalidInput("a box is larger than its image", field="inputs[boxes]")
        how = self._pillow.Transform.PERSPECTIVE, _perspective(box, wide, high), self._pillow.Resampling.BICUBIC
        crop = image.transform((wide, high), *how)
        if high >= 1.5 * wide:
            # A line that runs from top to bottom is read from the side.
            crop = crop.transpose(self._pillow.Transpose.ROTATE_90)
            wide, high = high, wide
        width = min(max(1, -(-self._height * wide // high)), self._width_max)
        crop = crop.resize((width, self._height), self._pillow.Resampling.BILINEAR)
        return _network_input(np.asarray(crop), self._mean, self._std, flip=self._flip)


class CtcStep(BuiltIn):
    """mlmesh.ctc: classes of a recogniser to text, the best path: repeats are one, blanks nothing (Graves, 3.2).

    `class` INT64 and `probability` FP32 [count, steps] -> `text` BYTES, `confidence` FP32 [count]: the mean probability
    of its characters, 0 for no text.

    Options: dictionary (a file, dictionary.txt: one character a line; class 0 is the blank, the last is the space).
    """

    def __init__(self, options: Options) -> None:
        path = options.needed("dictionary", "dictionary.txt")
        options.finish()
        self._characters = ["", *lines(path), " "]
        self.signature = Signature(
            inputs=(tensor("class", "INT64", -1, -1), tensor("probability", "FP32", -1, -1)),
            outputs=(tensor("text", "BYTES", -1), tensor("confidence", "FP32", -1)),
        )

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        classes, chances = inputs["class"], inputs["probability"]
        if classes.size and not 0 <= classes.min() <= classes.max() < len(self._characters):
            raise EngineError(f"class {classes.max()} of {len(self._characters)}: the dictionary is another model's")
        kept = classes != 0
        kept[:, 1:] &= classes[:, 1:] != classes[:, :-1]
        texts, confidence = np.empty(len(classes), object), np.zeros(len(classes), np.float32)
        for row, keep in enumerate(kept):
            texts[row] = "".join(self._characters[index] for index in classes[row, keep]).encode()
            confidence[row] = chances[row, keep].mean() if keep.any() else 0.0
        return {"text": texts, "confidence": confidence}


def _normalisation(options: Options) -> tuple[Array, Array]:
    mean = options.numbers("mean", (0.5, 0.5, 0.5), low=-10, high=10)
    std = options.numbers("std", (0.5, 0.5, 0.5), low=1e-3, high=10)
    return np.array(mean, np.float32), np.array(std, np.float32)


def _network_input(pixels: Array, mean: Array, std: Array, *, flip: bool) -> Array:
    """UINT8 [height, width, 3] to FP32 [3, height, width]."""
    values = pixels[:, :, ::-1] if flip else pixels
    return ((values.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)


def _sides(box: Array) -> tuple[float, float]:
    """Width and height of a box, the longer of opposite sides."""
    lengths = np.linalg.norm(box - np.roll(box, -1, axis=0), axis=1)
    return float(max(lengths[0], lengths[2])), float(max(lengths[1], lengths[3]))


def _perspective(box: Array, wide: int, high: int) -> list[float]:
    """The eight coefficients of the projection that takes a rectangle of this size to a box's corners.

    x' = (a x + b y + c) / (g x + h y + 1), y' = (d x + e y + f) / (g x + h y + 1): two equations a corner. Raises
    InvalidInput for corners of which three lie on a line.
    """
    equations, values = [], []
    for (x, y), (to_x, to_y) in zip([(0, 0), (wide, 0), (wide, high), (0, high)], box, strict=True):
        equations += [
            [x, y, 1, 0, 0, 0, -to_x * x, -to_x * y],
            [0, 0, 0, x, y, 1, -to_y * x, -to_y * y],
        ]
        values += [to_x, to_y]
    try:
        found: list[float] = np.linalg.solve(np.array(equations, np.float64), np.array(values, np.float64)).tolist()
    except np.linalg.LinAlgError as error:
        raise InvalidInput("the corners of a box lie on a line", field="inputs[boxes]") from error
    return found
