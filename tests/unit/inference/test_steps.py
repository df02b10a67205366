"""Built-in steps: images, texts, boxes, characters, sound; what they refuse."""

from __future__ import annotations

import io
import json
import struct
import wave
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.pipelines.steps.base import BuiltIn
from mlmesh_inference.pipelines.steps.boxes import clockwise, expanded, hull, least_rectangle, reading_order
from mlmesh_inference.pipelines.steps.kinds import STEPS, build_step
from mlmesh_inference.tensors import Array
from mlmesh_runtime.errors import InvalidInput
from tests.support.pipelines import texts


def step(name: str, folder: Path | None = None, **options: str) -> BuiltIn:
    values = {f"mlmesh.{name}.{option}": value for option, value in options.items()}
    return build_step(f"mlmesh.{name}", values, folder or Path("/nonexistent"))


def png(array: Array, mode: str = "") -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array.astype(np.uint8))
    (image.convert(mode) if mode else image).save(file, "PNG")
    return file.getvalue()


STATISTICS = {"kind": "image", "shape": [1, 4, 4], "mean": 60.0, "std": 20.0, "value_max": 255.0}


def saved(folder: Path, **changes: Any) -> Path:
    (folder / "statistics.json").write_text(json.dumps({**STATISTICS, **changes}))
    return folder


def test_an_image_becomes_what_training_saw(tmp_path: Path) -> None:
    pixels = np.arange(16).reshape(4, 4) * 10
    it = step("image", saved(tmp_path))
    assert [each.shape for each in it.signature.outputs] == [(-1, 1, 4, 4)]
    found = it.run({"image": texts(png(pixels), png(pixels, "RGB"))}, ["pixels"])[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.broadcast_to(pixels, (2, 1, 4, 4)), atol=1)


def test_values_ranges_and_normalisation_are_the_saved_ones(tmp_path: Path) -> None:
    pixels = np.full((4, 4), 102)
    small = step("image", saved(tmp_path, value_max=16.0)).run({"image": texts(png(pixels))}, ["pixels"])[0]
    np.testing.assert_allclose(small, np.full((1, 1, 4, 4), 6.4), rtol=1e-5)
    both = step("image", saved(tmp_path), normalise="statistics").run({"image": texts(png(pixels))}, ["pixels"])[0]
    np.testing.assert_allclose(both, np.full((1, 1, 4, 4), (102 - 60) / 20), rtol=1e-5)
    inverted = step("image", saved(tmp_path), invert="true").run({"image": texts(png(pixels))}, ["pixels"])[0]
    np.testing.assert_allclose(inverted, np.full((1, 1, 4, 4), 153))


def test_sizes_and_channels_are_brought_to_what_the_network_takes(tmp_path: Path) -> None:
    colours = np.zeros((8, 6, 3))
    colours[..., 2] = 255
    it = step("image", None, height="4", width="4", mean="0,0,1", std="1,1,0.5", normalise="statistics")
    found = it.run({"image": texts(png(colours))}, ["pixels"])[0]
    assert found.shape == (1, 3, 4, 4)
    np.testing.assert_allclose(found[0, :, 0, 0], [0, 0, 0])
    clear = np.zeros((4, 4, 4))
    shown = step("image", saved(tmp_path)).run({"image": texts(png(clear))}, ["pixels"])[0]
    np.testing.assert_allclose(shown, np.full((1, 1, 4, 4), 255))  # what shines through is white


def huge_png(width: int, height: int) -> bytes:
    """A header that promises much, and a body of a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "neither a PNG nor a JPEG"),
        (b"GIF89a" + bytes(100), "neither a PNG nor a JPEG"),
        (png(np.zeros((4, 4)))[:45], "damaged"),
        (huge_png(5_000, 5_000), "5000 x 5000 pixels, at most 16000000"),
        (huge_png(10_000, 10_000), "pixels, at most 16000000"),
        (huge_png(100_000, 100_000), "too many pixels, at most 16000000"),
        (huge_png(100, 100), "damaged"),
        ("text", "an image is BYTES"),
    ],
)
@pytest.mark.parametrize("name", ["image", "decode"])
def test_what_is_no_image_or_too_large_is_refused(name: str, data: object, text: str) -> None:
    array = np.empty(1, object)
    array[0] = data
    with pytest.raises(InvalidInput, match=text):
        step(name).run({"image": array}, ["pixels"])


def test_a_damaged_image_is_told_by_its_place() -> None:
    good = png(np.zeros((4, 4)))
    with pytest.raises(InvalidInput) as refused:
        step("image").run({"image": texts(good, b"x", good)}, ["pixels"])
    assert refused.value.field == "inputs[image][1]"


@pytest.mark.parametrize(
    "changes", [{"shape": [2, 4, 4]}, {"shape": [1, 0, 4]}, {"mean": "x"}, {"std": None}, {"value_max": float("nan")}]
)
def test_statistics_that_are_none_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not hold the statistics of images"):
        step("image", saved(tmp_path, **changes))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {word: number for number, word in enumerate(["[UNK]", "one", "two", "three", "[PAD]"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(pad_id=4, pad_token="[PAD]")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_texts_become_tokens_cut_and_padded_to_the_longest(vocabulary: Path) -> None:
    it = step("tokenize", vocabulary, tokens_max="3")
    ids, mask = it.run({"text": texts("two one two three", "three", "ö")}, ["input_ids", "attention_mask"])
    assert ids.tolist() == [[2, 1, 2], [3, 4, 4], [0, 4, 4]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_lengths_are_padded_to_a_multiple_so_that_requests_share_batches(vocabulary: Path) -> None:
    it = step("tokenize", vocabulary, tokens_max="6", multiple="4")
    lengths = [it.run({"text": texts(" ".join(["one"] * count))}, ["input_ids"])[0].shape[1] for count in (1, 4, 5, 9)]
    assert lengths == [4, 4, 6, 6]
    assert it.run({"text": texts()}, ["input_ids"])[0].shape == (0, 0)


@pytest.mark.parametrize(("text", "why"), [(b"\xff", "UTF-8"), ("one " * 20, "at most 10 characters")])
def test_texts_that_are_none_or_too_long_are_refused(text: str | bytes, why: str, vocabulary: Path) -> None:
    with pytest.raises(InvalidInput, match=why):
        step("tokenize", vocabulary, chars_max="10").run({"text": texts(text)}, ["input_ids"])


def test_the_mean_is_over_the_tokens_of_each_text() -> None:
    hidden = np.array([[[3, 4], [0, 0], [9, 9]], [[1, 0], [0, 1], [0, 0]]], np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    plain = step("mean-pool", normalise="false").run({"hidden": hidden, "attention_mask": mask}, ["embedding"])[0]
    np.testing.assert_allclose(plain, [[1.5, 2.0], [1 / 3, 1 / 3]], rtol=1e-6)
    unit = step("mean-pool").run({"hidden": hidden, "attention_mask": mask}, ["embedding"])[0]
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0.5**0.5, 0.5**0.5]], rtol=1e-6)
    none = step("mean-pool").run({"hidden": hidden, "attention_mask": mask * 0}, ["embedding"])[0]
    assert not none.any()


def test_scores_become_the_best_classes(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("ant\nbee\n")
    scores = np.log(np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], np.float32))
    found = step("classes", tmp_path, k="2").run({"scores": scores}, ["class", "confidence", "label"])
    assert found[0].tolist() == [[1, 2], [0, 2]]
    np.testing.assert_allclose(found[1], [[0.5, 0.3], [0.6, 0.3]], rtol=1e-5)
    assert found[2].tolist() == [[b"bee", b"2"], [b"ant", b"2"]]


def test_boxes_are_found_grown_and_put_into_reading_order() -> None:
    chances = np.zeros((1, 1, 64, 128), np.float32)
    chances[0, 0, 40:46, 60:100] = 0.9  # below
    chances[0, 0, 10:16, 70:110] = 0.8  # above, right
    chances[0, 0, 11:17, 10:50] = 0.9  # above, left
    chances[0, 0, 60:62, 0:2] = 0.9  # too small
    chances[0, 0, 50:56, 0:40] = 0.4  # not sure enough
    pixels = np.zeros((128, 256, 3), np.uint8)
    boxes, scores = step("text-boxes").run({"map": chances, "pixels": pixels}, ["boxes", "scores"])
    assert boxes.shape == (3, 4, 2)
    np.testing.assert_allclose(scores, [0.9, 0.8, 0.9], rtol=1e-5)
    by = 6 * 40 * 1.6 / (2 * 46) * 2  # the image is twice as large as the map
    left = [[20 - by, 22 - by], [100 + by, 22 - by], [100 + by, 34 + by], [20 - by, 34 + by]]
    np.testing.assert_allclose(boxes[0], left, atol=1e-3)
    assert boxes[1, 0, 0] > 120
    assert boxes[2, 0, 1] > 60


def test_no_text_gives_no_boxes_no_crops_and_no_characters(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    boxes, scores = step("text-boxes").run(
        {"map": np.zeros((1, 1, 32, 32), np.float32), "pixels": pixels}, ["boxes", "scores"]
    )
    assert (boxes.shape, scores.shape) == ((0, 4, 2), (0,))
    (crops,) = step("text-crops").run({"pixels": pixels, "boxes": boxes}, ["x"])
    assert crops.shape == (0, 3, 48, 320)
    (tmp_path / "dictionary.txt").write_text("a\nb")
    nothing = {"class": np.zeros((0, 5), np.int64), "probability": np.zeros((0, 5), np.float32)}
    assert [array.shape for array in step("ctc", tmp_path).run(nothing, ["text", "confidence"])] == [(0,), (0,)]


def test_a_turned_rectangle_is_found_and_straightened() -> None:
    angle = np.radians(30)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = np.array([[-20, -5], [20, -5], [20, 5], [-20, 5]]) @ turn.T + 50
    inside = np.random.default_rng(0).uniform(-1, 1, (200, 2)) * [20, 5] @ turn.T + 50
    found = clockwise(least_rectangle(np.concatenate([inside, corners])))
    np.testing.assert_allclose(found, corners, atol=1e-6)
    grown = expanded(found, 1.0)
    np.testing.assert_allclose(np.linalg.norm(grown[1] - grown[0]), 40 + 2 * 4, atol=1e-6)
    # Left half dark, right half bright, along the box: the crop has the same halves, side by side.
    y, x = np.mgrid[0:100, 0:100]
    along = (x - 50) * np.cos(angle) + (y - 50) * np.sin(angle)
    pixels = np.repeat(np.where(along > 0, 255, 0)[..., None], 3, axis=2).astype(np.uint8)
    boxes = found[None].astype(np.float32)
    (crop,) = step("text-crops", None, width_min="8", multiple="1").run({"pixels": pixels, "boxes": boxes}, ["x"])
    assert crop.shape == (1, 3, 48, 192)
    assert (crop[0, 0, :, :80].max(), crop[0, 0, :, 112:].min()) == (-1.0, 1.0)


def test_the_hull_of_a_square_with_points_inside() -> None:
    points = np.array([[0, 0], [2, 0], [2, 2], [0, 2], [1, 1], [1, 0]], np.float64)
    assert sorted(map(tuple, hull(points).tolist())) == [(0, 0), (0, 2), (2, 0), (2, 2)]


def test_reading_order_of_lines_that_are_not_quite_level() -> None:
    def box(x: float, y: float) -> list[list[float]]:
        return [[x, y], [x + 10, y], [x + 10, y + 10], [x, y + 10]]

    boxes = np.array([box(50, 3), box(0, 20), box(0, 0), box(25, 22)])
    assert reading_order(boxes).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("height", [1, 20])
def test_a_crop_of_one_pixel_or_a_column_does_not_fail(height: int) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    box = np.array([[[5, 5], [6, 5], [6, 5 + height], [5, 5 + height]]], np.float32)
    (crop,) = step("text-crops").run({"pixels": pixels, "boxes": box}, ["x"])
    assert crop.shape[2] == 48


def test_corners_on_a_line_or_far_outside_are_refused() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    for corners in ([[0, 0]] * 4, [[0, 0], [1e9, 0], [1e9, 5], [0, 5]]):
        with pytest.raises(InvalidInput):
            step("text-crops").run({"pixels": pixels, "boxes": np.array([corners], np.float32)}, ["x"])


def test_classes_become_text_repeats_are_one_and_blanks_nothing(tmp_path: Path) -> None:
    (tmp_path / "dictionary.txt").write_text("a\nb\n \nü")
    classes = np.array([[1, 1, 0, 1, 4, 5], [0, 0, 0, 0, 0, 0], [2, 2, 2, 2, 0, 2]])
    chances = np.array([[0.5, 0.1, 1, 0.7, 0.9, 0.9], [1] * 6, [0.4, 1, 1, 1, 1, 0.6]], np.float32)
    text, sure = step("ctc", tmp_path).run({"class": classes, "probability": chances}, ["text", "confidence"])
    assert text.tolist() == ["aaü ".encode(), b"", b"bb"]
    np.testing.assert_allclose(sure, [0.75, 0, 0.5], rtol=1e-6)
    with pytest.raises(EngineError, match="another model's"):
        step("ctc", tmp_path).run({"class": np.array([[99]]), "probability": np.ones((1, 1))}, ["text"])


def wav(samples: Array, rate: int = 16_000, channels: int = 1, width: int = 2) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes(samples.astype({1: "u1", 2: "<i2", 4: "<i4"}[width]).tobytes())
    return file.getvalue()


def test_sound_becomes_frames_that_begin_with_the_end_of_the_one_before() -> None:
    samples = np.arange(10) * 1024
    it = step("audio-frames", None, rate="16000", frame="4", context="2")
    (frames,) = it.run({"audio": texts(wav(samples))}, ["frames"])
    want = [[0, 0, 0, 1, 2, 3], [2, 3, 4, 5, 6, 7], [6, 7, 8, 9, 0, 0]]
    np.testing.assert_allclose(frames, np.array(want) / 32)
    assert it.run({"audio": texts(wav(samples[:0]))}, ["frames"])[0].shape == (0, 6)


def test_channels_are_mixed_and_higher_rates_averaged() -> None:
    stereo = np.array([[0, 2048], [2048, 4096], [8192, 8192], [0, 0]])
    it = step("audio-frames", None, rate="8000", frame="2", context="0")
    (frames,) = it.run({"audio": texts(wav(stereo, 16_000, 2))}, ["frames"])
    np.testing.assert_allclose(frames, [[2048 / 32768, 4096 / 32768]])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"RIFF", "not a WAV"),
        (b"RIFF\0\0\0\0WAVE", "no sound in it"),
        (wav(np.zeros(9))[:30], "no sound in it"),
        (wav(np.zeros(9), 11_025), "at 11025 Hz"),
        (wav(np.zeros(40_000), 16_000), "at most 1 s"),
        (b"", "not a WAV"),
    ],
)
def test_sound_that_is_none_or_too_long_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(InvalidInput, match=why):
        step("audio-frames", None, seconds_max="1").run({"audio": texts(data)}, ["frames"])


def test_stretches_of_speech_outlive_short_gaps_and_blips_are_none() -> None:
    chances = np.array([0, 0.9, 0.9, 0.4, 0.9, 0, 0, 0, 0.9, 0, 0, 0, 0.9, 0.9, 0.9], np.float32)
    it = step("speech", None, rate="1000", frame="100", silence_ms="200", speech_ms="200")
    np.testing.assert_allclose(it.run({"probability": chances}, ["segments"])[0], [[0.1, 0.5], [1.2, 1.5]], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("nothing", {}, "there is no built-in step 'mlmesh.nothing'; there are mlmesh.audio-frames"),
        ("classes", {"kk": "1"}, "step 'mlmesh.classes' has no option 'kk'"),
        ("classes", {"k": "many"}, "parameter mlmesh.classes.k: expected a number from 1 to 1000; got 'many'"),
        ("classes", {"softmax": "yes"}, "expected one of true, false"),
        ("classes", {"labels": "../labels.txt"}, "outside of the version"),
        ("classes", {"labels": "other.txt"}, "the version has no file 'other.txt'"),
        ("tokenize", {}, "the version has no file 'tokenizer.json'"),
        ("ctc", {}, "the version has no file 'dictionary.txt'"),
        ("image", {"mean": "1,2"}, "expected 3 numbers"),
        ("image", {"std": "nan"}, "expected 3 numbers"),
        ("image", {"channels": "2"}, "expected 1 or 3"),
        ("text-crops", {"order": "GRB"}, "expected one of BGR, RGB"),
        ("text-input", {"side_max": "100"}, "a number from 736 to 4096"),
    ],
)
def test_options_that_are_wrong_are_refused_by_name(
    name: str, options: dict[str, str], text: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=text):
        step(name, tmp_path, **options)


def test_every_step_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "pipelines.md").read_text()
    assert [name for name in STEPS if f"`{name}`" not in page] == []
