"""`mlmesh models sample`, and `mlmesh infer` with images, texts and sounds: real registry, real inference process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mlmesh.registry.v1 import registry_pb2
from mlmesh_cli.app import app
from mlmesh_cli.media import stretches
from tests.support import sample_files
from tests.support.publish import Publisher
from tests.support.registry_process import running
from tests.support.server import Process, spawn

WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Platform:
    """Runs `mlmesh` against a registry and an inference process."""

    registry: str
    inference: str
    process: Process
    folder: Path

    def run(self, *arguments: str, code: int = 0) -> str:
        """What a command prints."""
        env = {
            "MLMESH_REGISTRY_TARGET": self.registry,
            "MLMESH_INFERENCE_TARGET": self.inference,
            "MLMESH_STATE_DIR": str(self.folder / "none"),
            "COLUMNS": "120",
        }
        result = CliRunner().invoke(app, [*arguments], env=env)
        assert result.exit_code == code, (arguments, result.exit_code, result.stdout, result.stderr, result.exception)
        return result.stdout if code == 0 else result.stderr

    def json(self, *arguments: str) -> Any:
        """The JSON that a command prints."""
        return json.loads(self.run(*arguments, "-o", "json"))

    def ready(self, model: str) -> None:
        """Wait until the inference process serves it."""
        self.process.wait_for(
            lambda line: line.get("event") == "model ready" and line.get("model") == model, timeout_s=WAIT_S
        )


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    root = tmp_path_factory.mktemp("samples")
    with running(root / "registry") as (_, registry):
        env = {
            "MLMESH_LISTEN": "127.0.0.1:0",
            "MLMESH_DATA_DIR": str(root / "inference"),
            "MLMESH_REGISTRY_TARGET": registry,
            "MLMESH_SERVE": "*@stable",
        }
        with spawn("-m", "mlmesh_inference", env=env) as process:
            yield Platform(registry, process.listening(), process, root)


def test_text_in_an_image(platform: Platform) -> None:
    version = platform.json("models", "sample", "ocr")
    assert version["labels"]["license"] == "Apache-2.0"
    assert version["labels"]["origin"].startswith("rapidocr ")
    assert {file["path"] for file in version["artifacts"]} == {
        *("det.onnx", "rec.onnx", "dictionary.txt", "config.pbtxt", "README.md"),
    }
    platform.ready("ocr")
    image = platform.folder / "page.png"
    image.write_bytes(sample_files.text_png(["Total: 42.00", "Thank you"]))
    shown = platform.run("infer", "ocr", "--image", str(image))
    assert "page.png  version 1" in shown
    assert shown.index("2 lines of text found") < shown.index("Total: 42.00") < shown.index("Thank you")
    answers = platform.json("infer", "ocr", "--image", str(image))["answers"][0]["answers"]
    assert [sorted(answer) for answer in answers] == [["boxes", "scores"], ["confidence", "text"]]


def test_speech_in_a_sound(platform: Platform) -> None:
    platform.run("models", "sample", "voice", "--alias", "stable", "--alias", "tried")
    platform.ready("voice")
    sound, quiet = platform.folder / "call.wav", platform.folder / "quiet.wav"
    sound.write_bytes(sample_files.wav_bytes(sample_files.speech()))
    quiet.write_bytes(sample_files.wav_bytes(sample_files.no_speech()))
    shown = platform.run("infer", "voice", "--audio", str(sound), "--audio", str(quiet))
    heard, nothing = shown.split("quiet.wav")
    assert "speech from 0." in heard
    assert "2.21 s of sound in 69 requests" in heard
    assert "no speech" in nothing


def test_a_digit_in_an_image_of_a_trained_version(platform: Platform) -> None:
    refused = platform.run("models", "sample", "mnist-image", code=1)
    assert "not found" in refused.lower() or "no versions" in refused

    async def publish() -> None:
        files = dict(sample_files.trained_digits())
        signature = registry_pb2.ModelSignature(
            inputs=[registry_pb2.TensorSpec(name="image", datatype="FP32", shape=[-1, 1, 28, 28])],
            outputs=[registry_pb2.TensorSpec(name="logits", datatype="FP32", shape=[-1, 10])],
        )
        async with Publisher(platform.registry) as publisher:
            await publisher.publish("mnist", files.pop("model.onnx"), signature=signature, files=files)

    asyncio.run(publish())
    made = platform.json("models", "sample", "mnist-image", "--of", "mnist/1")
    assert made["description"] == "Classes of images, a PNG or JPEG file in, made of models/mnist/versions/1"
    platform.ready("mnist-image")
    data, digit = sample_files.digit_png(40)
    image = platform.folder / "digit.png"
    image.write_bytes(data)
    assert sample_files.WORDS[digit] in platform.run("infer", "mnist-image", "--image", str(image)).split("\n")[1]


def test_a_text(platform: Platform) -> None:
    platform.run("models", "sample", "minilm", "--model", "sentences")
    platform.ready("sentences")
    shown = platform.run("infer", "sentences", "--text", "a cat on a mat", "--text", "the stock market")
    assert shown.count("embedding [1, 384] [") == 2


def test_what_cannot_be_sent_or_made_is_said(platform: Platform) -> None:
    assert "choose one of minilm, mnist-image, ocr, voice" in platform.run("models", "sample", "nothing", code=2)
    assert "--of is for mnist-image" in platform.run("models", "sample", "voice", "--of", "mnist", code=2)
    assert "--unary is for ocr" in platform.run("models", "sample", "voice", "--unary", code=2)
    platform.run("models", "sample", "voice")
    platform.ready("voice")
    wrong = platform.folder / "wrong.wav"
    wrong.write_bytes(b"RIFF")
    assert "no WAV file" in platform.run("infer", "voice", "--audio", str(wrong), code=1)
    assert "does not take an image or a text" in platform.run("infer", "voice", "--text", "hello", code=1)


def test_stretches_of_speech_have_short_gaps() -> None:
    assert stretches([0.1, 0.9, 0.2, 0.9, 0.1, 0.1, 0.1, 0.1, 0.8], 0.04) == [
        pytest.approx((0.04, 0.16)),
        pytest.approx((0.32, 0.36)),
    ]
    assert stretches([], 0.04) == []
