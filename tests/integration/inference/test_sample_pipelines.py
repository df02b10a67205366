"""Real models with what stands before and behind them, asked by NVIDIA's client on every transport.

A network that tells MNIST's digits (PNG in, class out), MiniLM (text in, vector out), PP-OCRv6 (image in; boxes, then
text out), Silero's voice activity (sound in, a sequence with implicit state).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.support import sample_files
from tests.support.oip_server import TRANSPORTS, OipServer, oip_server_beside, usable
from tests.support.registry_source import MemoryRegistry

WAIT_S = 60.0
LINES = ["Hello, mesh 2026!", "gRPC serves models", "42 boxes"]
TEXTS = ["A cat sits on the mat.", "The feline is resting on a rug.", "Stocks fell sharply today.", "kurz", "ü 漢字 !"]


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OipServer]:
    transport = usable(request.param)
    root = tmp_path_factory.mktemp("samples")
    registry = asyncio.run(_registry(root))
    with oip_server_beside(root, registry=registry, transport=transport) as running:
        yield running


async def _registry(root: Path) -> MemoryRegistry:
    registry = MemoryRegistry()
    for name in ("minilm", "ocr", "ocr-unary", "voice"):
        await registry.publish_files(name, 1, sample_files.sample(name))
    await registry.publish_files("mnist-image", 1, sample_files.digits_sample(root))
    return registry


@pytest.fixture
def client(server: OipServer) -> Iterator[Any]:
    with triton.InferenceServerClient(server.address) as opened:
        yield opened


def tensor(name: str, array: np.ndarray[Any, Any]) -> Any:
    made = triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


def column(values: Sequence[bytes]) -> np.ndarray[Any, Any]:
    array = np.empty((len(values), 1), object)
    array[:, 0] = values
    return array


def streamed(client: Any, send: Callable[[], None], count: int) -> list[tuple[Any, Any]]:
    """(result, error) of a stream's first answers."""
    answers: list[tuple[Any, Any]] = []
    enough = threading.Event()

    def take(result: Any, error: Any) -> None:
        answers.append((result, error))
        if len(answers) >= count:
            enough.set()

    client.start_stream(take)
    try:
        send()
        assert enough.wait(WAIT_S), answers
    finally:
        client.stop_stream()
    return answers


def test_a_digit_as_a_png_comes_back_as_its_class(client: Any) -> None:
    metadata = client.get_model_metadata("mnist-image", as_json=True)
    assert metadata["platform"] == "ensemble"
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": ["-1", "1"]}]
    digits = [sample_files.digit_png(index, size=56) for index in range(40, 5000, 487)]
    result = client.infer("mnist-image", [tensor("image", column([data for data, _ in digits]))])
    found = result.as_numpy("class")
    assert found.shape == (len(digits), 3)
    right = [int(row[0]) == digit for row, (_, digit) in zip(found, digits, strict=True)]
    assert sum(right) >= len(digits) - 1
    assert [label.decode() for label in result.as_numpy("label")[:, 0]] == [sample_files.WORDS[row[0]] for row in found]
    sure = result.as_numpy("confidence")
    assert ((sure[:, 0] >= sure[:, 1]) & (sure[:, 1] >= sure[:, 2])).all()


def test_a_damaged_image_is_the_callers_fault_and_its_neighbours_are_answered(client: Any) -> None:
    good, _ = sample_files.digit_png(40)
    with pytest.raises(InferenceServerException, match="neither a PNG nor a JPEG") as refused:
        client.infer("mnist-image", [tensor("image", column([good, b"no image"]))])
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert client.infer("mnist-image", [tensor("image", column([good]))]).as_numpy("class").shape == (1, 3)


@pytest.fixture(scope="module")
def reference() -> np.ndarray[Any, Any]:
    """Embeddings by the training's own encoder, in torch, each text by itself."""
    import torch
    from tokenizers import Tokenizer

    from mlmesh_training.trainer import encoder

    folder = encoder.model_folder()
    network = encoder.Encoder.pretrained(folder, frozen=6).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    vectors = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            pooled = encoder.pooled(network(ids, torch.ones_like(ids)), torch.ones_like(ids))[0]
        vectors.append((pooled / pooled.norm()).numpy())
    return np.stack(vectors)


def test_a_text_comes_back_as_the_encoders_vector(reference: np.ndarray[Any, Any], client: Any) -> None:
    def embedded(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        found: np.ndarray[Any, Any] = client.infer(
            "minilm", [tensor("text", column([text.encode() for text in texts]))]
        ).as_numpy("embedding")
        return found

    steps = client.get_model_config("minilm").config.ensemble_scheduling.step
    assert [step.model_name for step in steps] == ["mlmesh.tokenize", "encoder.onnx", "mlmesh.mean-pool"]
    together = embedded(TEXTS)
    np.testing.assert_allclose(together, reference, atol=2e-5)
    np.testing.assert_allclose(embedded(TEXTS[3:4]), reference[3:4], atol=2e-5)
    (statistics,) = client.get_inference_statistics("minilm", "1").model_stats
    assert statistics.inference_count >= len(TEXTS) + 1
    likeness = together @ together.T
    assert likeness[0, 1] > 0.5
    assert likeness[0, 2] < 0.2


def test_texts_that_are_none_are_refused(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="a text must be UTF-8"):
        client.infer("minilm", [tensor("text", column([b"\xff\xfe"]))])
    long = "word " * 3000
    found = client.infer("minilm", [tensor("text", column([long.encode()]))]).as_numpy("embedding")
    np.testing.assert_allclose(np.linalg.norm(found), 1.0, atol=1e-5)


def test_the_lines_of_an_image_come_before_what_stands_in_them(client: Any) -> None:
    image = np.array([sample_files.text_png(LINES)], object)

    def send() -> None:
        client.async_stream_infer("ocr", [tensor("image", image)], request_id="page", enable_empty_final_response=True)

    (boxes, no_error), (text, _), (last, _) = streamed(client, send, 3)
    assert no_error is None
    found = boxes.as_numpy("boxes")
    assert found.shape == (3, 4, 2)
    # Each line was drawn at x 24, 60 pixels below the one before.
    for place, corners in enumerate(found):
        assert 10 < corners[0, 0] < 30
        assert corners[0, 1] < 24 + 60 * place + 15 < corners[2, 1]
    assert boxes.as_numpy("scores").min() > 0.5
    assert boxes.as_numpy("text") is None
    assert [line.decode() for line in text.as_numpy("text")] == LINES
    assert text.as_numpy("confidence").min() > 0.9
    assert last.get_response().parameters["triton_final_response"].bool_param
    assert {each.get_response().id for each in (boxes, text, last)} == {"page"}


def test_only_the_boxes_can_be_asked_for(client: Any) -> None:
    image = np.array([sample_files.text_png(LINES, kind="JPEG")], object)
    wanted = [triton.InferRequestedOutput("boxes")]

    def send() -> None:
        client.async_stream_infer("ocr", [tensor("image", image)], outputs=wanted, enable_empty_final_response=True)

    answers = streamed(client, send, 2)
    assert [[output.name for output in result.get_response().outputs] for result, _ in answers] == [["boxes"], []]


def test_an_image_without_text_and_one_that_is_none(client: Any) -> None:
    def ask(data: bytes) -> Any:
        return client.infer("ocr-unary", [tensor("image", np.array([data], object))])

    with pytest.raises(InferenceServerException) as refused:
        client.infer("ocr", [tensor("image", np.array([b""], object))])
    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"
    assert refused.value.message() == "ModelInfer RPC doesn't support models with decoupled transaction policy"
    empty = ask(sample_files.text_png([]))
    assert (empty.as_numpy("boxes").shape, empty.as_numpy("text").shape) == ((0, 4, 2), (0,))
    with pytest.raises(InferenceServerException, match="neither a PNG nor a JPEG"):
        ask(b"no image")
    assert ask(sample_files.text_png(LINES[2:], size=(320, 120))).as_numpy("text").tolist() == [b"42 boxes"]


def test_an_error_on_a_stream_stands_in_its_place(client: Any) -> None:
    good = np.array([sample_files.text_png(LINES[2:], size=(320, 120))], object)

    def send() -> None:
        for name, data in (("bad", np.array([b"x"], object)), ("good", good)):
            client.async_stream_infer("ocr", [tensor("image", data)], request_id=name)

    answers = streamed(client, send, 3)
    errors = [str(error) for _, error in answers if error is not None]
    assert len(errors) == 1
    assert "neither a PNG nor a JPEG" in errors[0]
    texts = [result.as_numpy("text") for result, error in answers if error is None]
    assert [text.tolist() for text in texts if text is not None] == [[b"42 boxes"]]


def chances(client: Any, sounds: dict[Any, np.ndarray[Any, Any]]) -> dict[Any, list[float]]:
    """How likely each frame is speech; the sounds are sent side by side over one stream, a sequence each."""
    parts = {name: sample_files.frames(sound) for name, sound in sounds.items()}
    longest = max(map(len, parts.values()))

    def send() -> None:
        for place in range(longest):
            for name, frames in parts.items():
                if place < len(frames):
                    client.async_stream_infer(
                        "voice",
                        [tensor("audio", frames[place : place + 1])],
                        request_id=f"{name}/{place}",
                        sequence_id=name,
                        sequence_start=place == 0,
                        sequence_end=place == len(frames) - 1,
                    )

    answers = streamed(client, send, sum(map(len, parts.values())))
    assert [error for _, error in answers if error is not None] == []
    found = {result.get_response().id: float(result.as_numpy("speech")[0, 0]) for result, _ in answers}
    return {name: [found[f"{name}/{place}"] for place in range(len(frames))] for name, frames in parts.items()}


def test_voice_activity_follows_each_callers_sound(client: Any, server: OipServer) -> None:
    speech, other = sample_files.speech(), sample_files.no_speech()
    found = chances(client, {1: speech, "other": other})
    assert np.mean(np.array(found[1]) > 0.5) > 0.6
    assert max(found["other"]) < 0.3
    # The network as its package has it, one frame at a time by itself, says the same.
    np.testing.assert_allclose(found[1], silero(speech), atol=1e-4)
    np.testing.assert_allclose(found["other"], silero(other), atol=1e-4)
    runner: Any = server.catalog.resolve("voice", "").runner
    assert (runner.sequences, runner.state_bytes) == (0, 0)


def silero(sound: np.ndarray[Any, Any]) -> list[float]:
    """What the package's own file says, with its state kept here."""
    import onnxruntime

    from mlmesh_cli.sample_models.base import package_file

    path = package_file("silero_vad", "data/silero_vad_16k_op15.onnx", distribution="silero-vad")
    session = onnxruntime.InferenceSession(str(path))
    state, context, found = np.zeros((2, 1, 128), np.float32), np.zeros((1, 64), np.float32), []
    for frame in sample_files.frames(sound):
        inputs = {"input": np.concatenate([context, frame[None]], axis=1), "state": state, "sr": np.array(16_000)}
        chance, state = session.run(None, inputs)
        context = frame[None, -64:]
        found.append(float(chance[0, 0]))
    return found


def test_a_sequence_that_did_not_begin_is_refused(client: Any) -> None:
    frame = np.zeros((1, 512), np.float32)
    with pytest.raises(InferenceServerException, match="must specify the START flag on the first request") as refused:
        client.infer("voice", [tensor("audio", frame)], sequence_id=99)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match="must specify a non-zero or non-empty correlation ID"):
        client.infer("voice", [tensor("audio", frame)])
    with pytest.raises(InferenceServerException, match="batch-size 1"):
        client.infer("voice", [tensor("audio", np.zeros((2, 512), np.float32))], sequence_id=1, sequence_start=True)


def test_requests_of_many_callers_go_through_one_graph(client: Any, server: OipServer) -> None:
    digits = [sample_files.digit_png(index) for index in range(0, 4870, 487)]
    done: list[tuple[int, int]] = []
    enough = threading.Event()

    def take(digit: int) -> Callable[[Any, Any], None]:
        def keep(result: Any, error: Any) -> None:
            done.append((digit, -1 if error else int(result.as_numpy("class")[0, 0])))
            if len(done) == 3 * len(digits):
                enough.set()

        return keep

    for _ in range(3):
        for data, digit in digits:
            client.async_infer("mnist-image", [tensor("image", column([data]))], take(digit))
    assert enough.wait(WAIT_S)
    assert sum(found == digit for digit, found in done) >= 27
    assert server.catalog.resolve("mnist-image", "").runner.depth == 0
