"""Damaged images, sounds and boxes: a step answers, or says what is wrong with the request, and never anything else."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mlmesh_inference.pipelines.steps.base import BuiltIn
from mlmesh_inference.pipelines.steps.kinds import build_step
from mlmesh_inference.tensors import object_array
from mlmesh_runtime.errors import InvalidInput
from tests.support.sample_files import text_png, wav_bytes

NOWHERE = Path("/nonexistent")
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def encoded(kind: str, mode: str) -> bytes:
    """A small image with structure."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (23, 17, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


SEEDS = {
    "png": encoded("PNG", "RGB"),
    "palette": encoded("PNG", "P"),
    "jpeg": encoded("JPEG", "RGB"),
    "grey": encoded("JPEG", "L"),
    "page": text_png(["x"], size=(64, 32), points=12),
    "wav": wav_bytes(np.sin(np.arange(4000) / 9).astype(np.float32)),
}


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    """Bytes changed, cut out, repeated or put in, lengths in headers among them."""
    data = bytearray(SEEDS[name])
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(data) - 1)) if data else 0
        how = draw(st.sampled_from(["byte", "cut", "word", "repeat", "end"]))
        if how == "byte" and data:
            data[place] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[place : place + draw(st.integers(1, 64))]
        elif how == "word":
            word = draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 65535]))
            data[place : place + 4] = struct.pack(draw(st.sampled_from([">I", "<I"])), word)
        elif how == "repeat":
            data[place:place] = data[place : place + draw(st.integers(1, 128))]
        else:
            del data[place:]
    return bytes(data)


IMAGE = build_step("mlmesh.image", {}, NOWHERE)
DECODE = build_step("mlmesh.decode", {}, NOWHERE)
FRAMES = build_step("mlmesh.audio-frames", {}, NOWHERE)


def asked(step: BuiltIn, name: str, data: bytes) -> Any:
    """What a step makes of it; None where it is refused."""
    try:
        return step.run({name: object_array([data], (1,))}, [step.signature.outputs[0].name])[0]
    except InvalidInput as error:
        return None if error.field and len(error.message) < 300 else error


@pytest.mark.parametrize("name", ["png", "palette", "jpeg", "grey", "page"])
@FEW
@given(data=st.data())
def test_damaged_images(name: str, data: st.DataObject) -> None:
    file = data.draw(damaged(name))
    pixels = asked(IMAGE, "image", file)
    assert pixels is None or (pixels.shape == (1, 3, 224, 224) and np.isfinite(pixels).all())
    whole = asked(DECODE, "image", file)
    assert whole is None or (whole.dtype == np.uint8 and whole.shape[2] == 3)


@FEW
@given(data=st.data())
def test_damaged_sound(data: st.DataObject) -> None:
    frames = asked(FRAMES, "audio", data.draw(damaged("wav")))
    assert frames is None or (frames.shape[1] == 576 and np.abs(frames).max(initial=0) <= 1)


@FEW
@given(
    corners=st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 8), max_size=4),
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
)
def test_boxes_of_any_kind(corners: list[tuple[float, ...]], size: tuple[int, int]) -> None:
    crops = build_step("mlmesh.text-crops", {}, NOWHERE)
    boxes = np.array(corners, np.float32).reshape(-1, 4, 2)
    pixels = np.zeros((*size, 3), np.uint8)
    try:
        (found,) = crops.run({"pixels": pixels, "boxes": boxes}, ["x"])
    except InvalidInput:
        return
    assert found.shape[:3] == (len(boxes), 3, 48)
    assert found.shape[3] <= 2048
