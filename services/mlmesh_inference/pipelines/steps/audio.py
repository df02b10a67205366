"""Steps for sound: a file to frames, and what a detector says of frames to stretches of speech."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

import numpy as np

from mlmesh_inference.pipelines.steps.base import BuiltIn, Options, tensor
from mlmesh_inference.tensors import Array, Signature
from mlmesh_runtime.errors import InvalidInput

SECONDS_MAX: Final = 600
RATE_MAX: Final = 192_000

_FIELD: Final = "inputs[audio]"
_CHUNK: Final = struct.Struct("<4sI")
_FORM: Final = struct.Struct("<HHIIHH")
_PCM: Final = 0x0001
_EXTENSIBLE: Final = 0xFFFE
_WIDTHS: Final = {8: "u1", 16: "<i2", 32: "<i4"}


def read_wav(data: object, *, rate: int, seconds_max: int) -> Array:
    """Samples of a WAV file of PCM, channels mixed, FP32 [samples] from -1 to 1. Raises InvalidInput.

    A file of another rate is refused unless its rate is a multiple: samples between are then averaged over.
    """
    if not isinstance(data, bytes):
        raise InvalidInput("sound is BYTES: a WAV file", field=_FIELD)
    kind, channels, own, bits, sound = _parts(data)
    if kind != _PCM or bits not in _WIDTHS or not 0 < channels <= 8 or not 0 < own <= RATE_MAX or own % rate:
        text = f"expected PCM of 8, 16 or 32 bits at {rate} Hz or a multiple, got kind {kind}, {bits} bits at {own} Hz"
        raise InvalidInput(text, field=_FIELD)
    width = bits // 8
    count = len(sound) // (width * channels)
    if count > seconds_max * own:
        raise InvalidInput(f"expected at most {seconds_max} s of sound", field=_FIELD, reason="SHAPE_MISMATCH")
    values = np.frombuffer(sound, _WIDTHS[bits], count * channels).astype(np.float32)
    samples = values.reshape(-1, channels).mean(axis=1)
    samples = (samples - 128) / 128 if width == 1 else samples / (1 << (bits - 1))
    every = own // rate
    mixed: Array = samples[: count // every * every].reshape(-1, every).mean(axis=1)
    return mixed


def _parts(data: bytes) -> tuple[int, int, int, int, memoryview]:
    """(kind, channels, rate, bits, bytes of the sound) of a WAV file (Microsoft and IBM, Multimedia Programming
    Interface 1.0, 1991); a last chunk that promises more than there is ends with the file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise InvalidInput("it is not a WAV file", field=_FIELD)
    form: tuple[int, int, int, int] | None = None
    place = 12
    while place + 8 <= len(data):
        name, size = _CHUNK.unpack_from(data, place)
        body = place + 8
        if name == b"fmt " and size >= _FORM.size and body + _FORM.size <= len(data):
            kind, channels, rate, _, _, bits = _FORM.unpack_from(data, body)
            if kind == _EXTENSIBLE and size >= 26 and body + 26 <= len(data):
                kind = int.from_bytes(data[body + 24 : body + 26], "little")
            form = (kind, channels, rate, bits)
        elif name == b"data" and form is not None:
            return *form, memoryview(data)[body : body + size]
        # Chunks begin at even places.
        place = body + size + size % 2
    raise InvalidInput("the WAV file has no sound in it", field=_FIELD)


class FramesStep(BuiltIn):
    """mlmesh.audio-frames: a WAV file to frames, each with the end of the one before it.

    `audio` BYTES of one element -> `frames` FP32 [count, context + frame], the last one filled up with 0.
    Options: rate (16000), frame (512), context (64) samples, seconds_max (600).
    """

    def __init__(self, options: Options) -> None:
        self._rate = options.integer("rate", 16_000, low=1000, high=RATE_MAX)
        self._frame = options.integer("frame", 512, low=1, high=1 << 16)
        self._context = options.integer("context", 64, low=0, high=self._frame)
        self._seconds_max = options.integer("seconds_max", SECONDS_MAX, low=1, high=36_000)
        options.finish()
        self.signature = Signature(
            inputs=(tensor("audio", "BYTES"),), outputs=(tensor("frames", "FP32", -1, self._context + self._frame),)
        )

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        files = inputs["audio"].ravel()
        if len(files) != 1:
            raise InvalidInput(f"expected one file, got {len(files)}", field="inputs[audio]", reason="SHAPE_MISMATCH")
        samples = read_wav(files[0], rate=self._rate, seconds_max=self._seconds_max)
        count = -(-len(samples) // self._frame)
        padded = np.zeros(self._context + count * self._frame, np.float32)
        padded[self._context : self._context + len(samples)] = samples
        starts = np.arange(count)[:, None] * self._frame
        return {"frames": padded[starts + np.arange(self._context + self._frame)]}


class SpeechStep(BuiltIn):
    """mlmesh.speech: how likely each frame is speech, to the stretches that are.

    `probability` FP32 [frames] -> `segments` FP32 [count, 2], begin and end in seconds. A stretch begins above
    `threshold` (0.5) and ends when it was below `threshold` - 0.15 for `silence_ms` (100); shorter than `speech_ms`
    (250) it is none. Other options: rate (16000), frame (512).
    """

    def __init__(self, options: Options) -> None:
        rate = options.integer("rate", 16_000, low=1000, high=RATE_MAX)
        self._seconds = options.integer("frame", 512, low=1, high=1 << 16) / rate
        self._threshold = options.number("threshold", 0.5, low=0.16, high=0.99)
        self._silence_s = options.integer("silence_ms", 100, high=10_000) / 1000
        self._speech_s = options.integer("speech_ms", 250, high=10_000) / 1000
        options.finish()
        self.signature = Signature(
            inputs=(tensor("probability", "FP32", -1),), outputs=(tensor("segments", "FP32", -1, 2),)
        )

    def compute(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """See BuiltIn."""
        found: list[tuple[float, float]] = []
        begin = quiet = -1.0
        chances = inputs["probability"].tolist()
        for place, chance in enumerate(chances):
            now = place * self._seconds
            if chance >= self._threshold:
                begin, quiet = (now if begin < 0 else begin), -1.0
            elif begin >= 0 and chance < self._threshold - 0.15:
                quiet = now if quiet < 0 else quiet
                if now - quiet >= self._silence_s:
                    found.append((begin, quiet))
                    begin = quiet = -1.0
        if begin >= 0:
            found.append((begin, quiet if quiet >= 0 else len(chances) * self._seconds))
        kept = [each for each in found if each[1] - each[0] >= self._speech_s]
        return {"segments": np.array(kept, np.float32).reshape(-1, 2)}
