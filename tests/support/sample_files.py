"""Sample models as the command makes them, and what to send them: digits, drawn text, spoken vowels."""

from __future__ import annotations

import functools
import io
import json
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw, ImageFont

from mlmesh_cli.sample_models import minilm, mnist, ocr, voice
from mlmesh_cli.sample_models.base import SampleModel
from mlmesh_cli.samples import Samples, load
from mlmesh_inference.tensors import Array

RATE = 16_000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def files_of(sample: SampleModel) -> dict[str, bytes]:
    """The bytes of a sample's files."""
    return {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in sample.files.items()}


@functools.cache
def sample(name: str) -> Mapping[str, bytes]:
    """The files of a sample that comes whole in a package; "ocr-unary" is ocr with one answer."""
    makers = {"minilm": minilm.build, "ocr": ocr.build, "voice": voice.build}
    return files_of(ocr.build(unary=True) if name == "ocr-unary" else makers[name]())


@functools.cache
def digits() -> Samples:
    """The images of MNIST; reading them takes a moment."""
    return load("mnist")


@functools.cache
def trained_digits() -> Mapping[str, bytes]:
    """What training leaves of a network that tells MNIST's digits: model.onnx, statistics.json, labels.txt.

    Its convolution is random and only its last layer is fitted, by least squares: seconds of training become one.
    """
    data = digits()
    chosen = np.random.default_rng(0).permutation(len(data.labels))[:3000]
    images, labels = data.images[chosen], data.labels[chosen]
    mean, std = float(images.mean()), float(images.std())
    weights = np.random.default_rng(1).normal(0, 0.3, (24, 1, 5, 5)).astype(np.float32)
    features = onnxruntime.InferenceSession(_network(weights, mean, std, None)).run(None, {"image": images})[0]
    wide = np.concatenate([features, np.ones((len(features), 1), np.float32)], axis=1)
    targets = np.eye(10, dtype=np.float32)[labels]
    penalty = 50.0 * np.eye(wide.shape[1], dtype=np.float32)
    last = np.linalg.solve(wide.T @ wide + penalty, wide.T @ targets).astype(np.float32)
    statistics = {"kind": "image", "shape": [1, 28, 28], "mean": mean, "std": std, "value_max": 255.0}
    return {
        "model.onnx": _network(weights, mean, std, 10 * last),
        "statistics.json": json.dumps(statistics).encode(),
        "labels.txt": "\n".join(WORDS).encode(),
    }


def _network(weights: Array, mean: float, std: float, last: Array | None) -> bytes:
    """image [N,1,28,28], raw values -> logits [N,10]; without a last layer, its features."""
    constants = {
        "mean": np.array(mean, np.float32),
        "std": np.array(std, np.float32),
        "weights": weights,
        **({} if last is None else {"matrix": last[:-1], "bias": last[-1]}),
    }
    nodes = [
        helper.make_node("Sub", ["image", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "weights"], ["filtered"]),
        helper.make_node("Relu", ["filtered"], ["kept"]),
        helper.make_node("MaxPool", ["kept"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
    ]
    if last is not None:
        nodes += [
            helper.make_node("MatMul", ["features", "matrix"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["logits"]),
        ]
    name, size = ("features", 24 * 36) if last is None else ("logits", 10)
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 28, 28])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])],
        [numpy_helper.from_array(value, constant) for constant, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def digits_sample(folder: Path) -> dict[str, bytes]:
    """mnist-image, made of the trained digits."""
    for name, data in trained_digits().items():
        (folder / name).write_bytes(data)
    return files_of(mnist.build(folder, "models/mnist/versions/1", ("image", "logits"), labels={"dataset": "mnist"}))


def digit_png(index: int, *, size: int = 28) -> tuple[bytes, int]:
    """A digit of MNIST as a PNG file, and which it is."""
    data = digits()
    image = Image.fromarray(data.images[index, 0].astype(np.uint8))
    file = io.BytesIO()
    image.resize((size, size)).save(file, "PNG")
    return file.getvalue(), int(data.labels[index])


def text_png(lines: Sequence[str], *, size: tuple[int, int] = (480, 320), points: int = 30, kind: str = "PNG") -> bytes:
    """Lines of text, black on white, in Pillow's own font."""
    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(points)
    for place, line in enumerate(lines):
        draw.text((24, 24 + place * 2 * points), line, fill="black", font=font)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


_FORMANTS = {
    "a": ((730, 90), (1090, 110), (2440, 170), (3400, 250)),
    "e": ((530, 80), (1840, 100), (2480, 170), (3500, 250)),
    "i": ((270, 60), (2290, 100), (3010, 170), (3600, 250)),
    "o": ((570, 80), (840, 90), (2410, 170), (3400, 250)),
    "u": ((300, 60), (870, 90), (2240, 170), (3400, 250)),
}
"""Resonances of a man's vowels and their widths, Hz (Peterson and Barney, 1952)."""


@functools.cache
def speech() -> Array:
    """Two seconds of vowels as throat and mouth make them (Klatt, 1980: pulses through resonators), FP32 at 16 kHz."""
    random = np.random.default_rng(0)
    pieces = []
    for vowel, pitch in zip("aeiou" * 2, np.linspace(140, 100, 10), strict=True):
        count = int(0.18 * RATE)
        time = np.arange(count) / RATE
        turns = np.cumsum(pitch * (1 + 0.02 * np.sin(2 * np.pi * 5 * time))) / RATE
        pulses = np.convolve(np.diff(np.floor(turns), prepend=0.0), np.hanning(40))[:count]
        sound = pulses - np.convolve(pulses, np.ones(160) / 160, "same") + 0.01 * random.normal(size=count)
        for frequency, width in _FORMANTS[vowel]:
            sound = _resonated(sound, frequency, width)
        fade = np.minimum(1, np.minimum(time / 0.03, (0.18 - time) / 0.05))
        pieces += [0.4 * sound * fade / np.abs(sound * fade).max(), np.zeros(int(0.04 * RATE))]
    return np.concatenate(pieces).astype(np.float32)


def _resonated(sound: Array, frequency: float, width: float) -> Array:
    """A sound through a resonator of two poles."""
    radius, angle = np.exp(-np.pi * width / RATE), 2 * np.pi * frequency / RATE
    first, second, gain = 2 * radius * np.cos(angle), -radius * radius, 1 - radius
    result = np.zeros(len(sound))
    one = two = 0.0
    for place, value in enumerate(sound.tolist()):
        one, two = gain * value + first * one + second * two, one
        result[place] = one
    return result


def no_speech() -> Array:
    """A second each of silence, of a tone and of noise."""
    time = np.arange(RATE) / RATE
    tone = 0.3 * np.sin(2 * np.pi * 440 * time)
    noise = 0.1 * np.random.default_rng(0).normal(size=RATE)
    return np.concatenate([np.zeros(RATE), tone, noise]).astype(np.float32)


def frames(samples: Array, size: int = 512) -> Array:
    """[count, size], the rest left out."""
    return samples[: len(samples) // size * size].reshape(-1, size)


def wav_bytes(samples: Array) -> bytes:
    """A WAV file of 16 bit PCM."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, RATE, 0, "NONE", ""))
        out.writeframes((samples * 32767).astype("<i2").tobytes())
    return file.getvalue()
