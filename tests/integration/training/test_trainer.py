"""The training process's own code, with real torch, real data and real ONNX: what it leaves is right and repeatable."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from mlmesh_training import datasets, documents, export, recipes
from mlmesh_training.backends.base import Died, Report, TrainingTask
from mlmesh_training.backends.reports import read_report, report_line
from mlmesh_training.backends.results import read_result
from mlmesh_training.jobs import Checkpoint, Evaluation, JobPhase, LogLine, Metrics
from mlmesh_training.trainer import checkpoint, data, images, run, sources
from mlmesh_training.trainer.fitting.loop import Fit
from mlmesh_training.trainer.reporter import PermanentError, Reporter
from tests.support.training import spec

torch = pytest.importorskip("torch")


class Killed(Exception):  # noqa: N818 - not an error of ours
    """Stands for the end of the process."""


class Listener(Reporter):
    """Takes reports as the service would read them from the pipe; dies at a report that the test names."""

    def __init__(self, die_at: Report | None = None, die_at_step: int = 0) -> None:
        super().__init__(io.BytesIO())
        self.reports: list[Report | Died] = []
        self._die_at = die_at
        self._die_at_step = die_at_step

    def send(self, report: Report | Died) -> None:
        self.reports.append(read_report(report_line(report)))
        late = isinstance(report, Metrics) and 0 < self._die_at_step <= report.progress.step
        if report == self._die_at or late:
            raise Killed

    def of(self, kind: type) -> list[Report | Died]:
        return [report for report in self.reports if isinstance(report, kind)]


def put_task(folder: Path, recipe: str = "cnn", dataset: str = "digits", **hyperparameters: Any) -> Path:
    values = recipes.resolve(spec(recipe=recipe, dataset=dataset, hyperparameters=hyperparameters))
    folder.mkdir(exist_ok=True)
    task = TrainingTask(uid=folder.name, recipe=recipe, dataset=dataset, hyperparameters=values, seed=7)
    (folder / "task.json").write_text(documents.dumps(documents.task_document(task)))
    return folder


SMALL: dict[str, Any] = {"epochs": 4.0, "width": 8.0, "dropout": 0.2, "batch_size": 32.0, "shift": 1.0}
STEPS_AN_EPOCH = 41
PLOTS = ("learning_curves", "confusion_matrix", "reliability")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Listener]:
    """A training from start to end."""
    folder = put_task(tmp_path_factory.mktemp("jobs") / "undisturbed", **SMALL)
    listener = Listener()
    run.train(folder, listener, threads=1)
    return folder, listener


def test_it_reports_phases_figures_checkpoints_and_measures_in_order(undisturbed: tuple[Path, Listener]) -> None:
    folder, listener = undisturbed
    assert listener.of(JobPhase) == [JobPhase.TRAINING, JobPhase.EVALUATING, JobPhase.EXPORTING]
    epochs = [r for r in listener.of(Metrics) if isinstance(r, Metrics) and "validation_loss" in r.values]
    assert [r.progress.epoch for r in epochs] == [1, 2, 3, 4]
    names = {"train_loss", "train_accuracy", "learning_rate", "examples_per_second"}
    assert set(epochs[-1].values) == names | {"validation_loss", "validation_accuracy"}
    assert all(set(r.values) >= names for r in listener.of(Metrics) if isinstance(r, Metrics))
    assert epochs[-1].progress.step == epochs[-1].progress.steps
    # An epoch's last figures are of all of it, also where the epoch was shorter than the time between two reports.
    assert all(report.values["train_loss"] > 0.0 for report in epochs)
    assert epochs[-1].values["train_loss"] < epochs[0].values["train_loss"] / 2
    assert [r.progress.epoch for r in listener.of(Checkpoint) if isinstance(r, Checkpoint)] == [1, 2, 3, 4]
    assert len(list(folder.glob("checkpoint-*.pt"))) == checkpoint.KEPT


def test_the_model_is_good_and_its_measures_are_those_of_scikit_learn(undisturbed: tuple[Path, Listener]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    folder, _ = undisturbed
    found = read_result(folder).evaluation
    assert found.accuracy > 0.9
    loaded = sources.images("digits")
    test = data.split(loaded.classes, seed=7).test
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits, probabilities = session.run(None, {"image": loaded.pixels[test].astype(np.float32)})
    right, answers = loaded.classes[test], logits.argmax(1)
    assert found.examples == len(test)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(right, answers))
    assert found.precision == pytest.approx(metrics.precision_score(right, answers, average="macro", zero_division=0))
    assert found.recall == pytest.approx(metrics.recall_score(right, answers, average="macro"))
    assert found.f1 == pytest.approx(metrics.f1_score(right, answers, average="macro"))
    assert found.loss == pytest.approx(metrics.log_loss(right, probabilities), rel=1e-3)
    assert np.array(found.confusion).tolist() == metrics.confusion_matrix(right, answers).tolist()
    assert found.export_max_abs_diff < 1e-4


def test_measures_of_classes_that_never_occur_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    from mlmesh_training.evaluate import evaluate

    right = np.array([0, 0, 1, 1, 3], dtype=np.int64)
    logits = np.eye(4, dtype=np.float32)[[0, 1, 1, 1, 0]] * 1000
    found = evaluate(logits, right, ("a", "b", "c", "d"))
    labels = {"labels": [0, 1, 2, 3], "average": "macro", "zero_division": 0}
    assert found.precision == pytest.approx(metrics.precision_score(right, logits.argmax(1), **labels))
    assert found.recall == pytest.approx(metrics.recall_score(right, logits.argmax(1), **labels))
    assert found.f1 == pytest.approx(metrics.f1_score(right, logits.argmax(1), **labels))
    assert np.isfinite(found.loss)


def test_the_exported_model_takes_raw_images_in_batches_of_any_size(undisturbed: tuple[Path, Listener]) -> None:
    folder, _ = undisturbed
    model = read_result(folder)
    (image,), (logits, probabilities) = model.inputs, model.outputs
    assert (image.name, image.datatype, image.shape) == ("image", "FP32", (-1, 1, 8, 8))
    assert (logits.name, logits.datatype, logits.shape) == ("logits", "FP32", (-1, 10))
    assert (probabilities.name, probabilities.shape) == ("probabilities", (-1, 10))
    proto = onnx.load(folder / "model.onnx")
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", export.OPSET)]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    pixels = sources.images("digits").pixels[:129].astype(np.float32)
    whole = session.run(["logits"], {"image": pixels})[0]
    for size in (1, 2, 64, 129):
        part = session.run(["logits"], {"image": pixels[:size]})[0]
        np.testing.assert_allclose(part, whole[:size], atol=1e-4)
    assert model.labels["input_range"] == "0..16"
    assert model.labels["hyperparameters.epochs"] == "4"


def test_the_exported_model_says_nothing_of_the_machine_that_made_it(undisturbed: tuple[Path, Listener]) -> None:
    folder, _ = undisturbed
    raw = (folder / "model.onnx").read_bytes()
    for secret in (str(Path.home()), str(Path(run.__file__).parent), "site-packages", ".py"):
        assert secret.encode() not in raw


@pytest.mark.parametrize("at", ["first epoch", "third epoch", "evaluation", "export"])
def test_killed_anywhere_it_goes_on_and_leaves_the_very_same_model(
    undisturbed: tuple[Path, Listener], tmp_path: Path, at: str
) -> None:
    complete, _ = undisturbed
    folder = put_task(tmp_path / "killed", **SMALL)
    dying = {
        "first epoch": Listener(die_at_step=1),
        "third epoch": Listener(die_at_step=2 * STEPS_AN_EPOCH + 1),
        "evaluation": Listener(die_at=JobPhase.EVALUATING),
        "export": Listener(die_at=JobPhase.EXPORTING),
    }[at]
    with pytest.raises(Killed):
        run.train(folder, dying, threads=1)
    assert not (folder / "result.json").exists()
    torch.rand(3)  # whatever came between has no part in it
    again = Listener()
    run.train(folder, again, threads=1)
    resumed = [r for r in again.of(LogLine) if isinstance(r, LogLine) and "resumed" in r.message]
    assert bool(resumed) == (at != "first epoch")
    again_measured, measured = read_result(folder).evaluation, read_result(complete).evaluation
    assert dataclasses.replace(again_measured, latency=()) == dataclasses.replace(measured, latency=())
    same = ["model.onnx", "statistics.json", "training.json", *(f"plots/{name}.png" for name in PLOTS)]
    for path in same:
        assert (folder / path).read_bytes() == (complete / path).read_bytes(), path


def test_another_seed_gives_another_model_and_another_split(tmp_path: Path) -> None:
    task = run.read_task(put_task(tmp_path / "seed", **SMALL))
    models, tests = [], []
    for seed in (7, 7, 8):
        chosen = dataclasses.replace(task, seed=seed)
        definition, loaded = run.load(tmp_path, chosen)
        tests.append(loaded.test.inputs[0])
        models.append(torch.cat([p.flatten() for p in Fit(chosen, definition, loaded).shared.plain.parameters()]))
    assert torch.equal(models[0], models[1])
    assert torch.equal(tests[0], tests[1])
    assert not torch.equal(models[0], models[2])
    assert not torch.equal(tests[0], tests[2])


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    folder = put_task(tmp_path / "torn", **SMALL)
    with pytest.raises(Killed):
        run.train(folder, Listener(die_at=JobPhase.EVALUATING), threads=1)
    newest = next(checkpoint.stored(folder))
    raw = bytearray(newest.path.read_bytes())
    if damage == "flipped":
        raw[len(raw) // 2] ^= 1
    newest.path.write_bytes({"cut": bytes(raw[: len(raw) // 2]), "flipped": bytes(raw), "empty": b""}[damage])
    listener = Listener(die_at_step=1)
    with pytest.raises(Killed):
        run.train(folder, listener, threads=1)
    messages = [report.message for report in listener.of(LogLine) if isinstance(report, LogLine)]
    assert any("torn" in message for message in messages)
    assert "resumed after epoch 3" in messages


def test_a_checkpoint_of_another_network_is_passed_over(tmp_path: Path) -> None:
    folder = put_task(tmp_path / "other", **SMALL)
    with pytest.raises(Killed):
        run.train(folder, Listener(die_at=JobPhase.EVALUATING), threads=1)
    put_task(folder, **{**SMALL, "width": 4.0})
    listener = Listener(die_at_step=1)
    with pytest.raises(Killed):
        run.train(folder, listener, threads=1)
    messages = [report.message for report in listener.of(LogLine) if isinstance(report, LogLine)]
    assert len([message for message in messages if "does not fit" in message]) == 2
    assert not any("resumed" in message for message in messages)


def test_half_written_files_are_swept(tmp_path: Path) -> None:
    folder = put_task(tmp_path / "swept", **SMALL)
    (folder / f"checkpoint-00000009-{'0' * 64}.part").write_bytes(b"half")
    with pytest.raises(Killed):
        run.train(folder, Listener(die_at=JobPhase.TRAINING), threads=1)
    assert list(folder.glob("*.part")) == []


def test_a_model_that_answers_differently_is_not_exported(tmp_path: Path) -> None:
    task = run.read_task(put_task(tmp_path / "differs", recipe="mlp", epochs=1.0))
    definition, loaded = run.load(tmp_path, task)
    serving = definition.serving(definition.build(task.hyperparameters, loaded).eval()).eval()
    cases = export.cases(serving, [each[:50] for each in loaded.test.inputs], input_names=definition.input_names)
    logits, probabilities = cases[0].outputs
    cases[0] = dataclasses.replace(cases[0], outputs=(logits + np.float32(0.01), probabilities))
    with pytest.raises(export.ExportError, match="differ"):
        export.export(
            serving,
            cases,
            tmp_path / "never-written.onnx",
            input_names=definition.input_names,
            output_names=definition.output_names,
        )
    assert not (tmp_path / "never-written.onnx").exists()


def test_named_data_sets_are_what_they_are_said_to_be() -> None:
    for recipe in recipes.RECIPES.values():
        definition = run.definition_of(recipe.name)
        settings = {each.name: each.default for each in recipe.hyperparameters}
        for name in recipe.datasets:
            known = datasets.DATASETS[name]
            assert known.kind is recipe.dataset_kind
            loaded = definition.load(name, "", seed=3, settings=settings)
            assert abs(len(loaded.train) - known.training_examples) <= 3, name
            assert loaded.labels == known.classes
            assert len(loaded.fingerprint) == 64
            if known.example_shape:
                assert tuple(loaded.train.inputs[0].shape[1:]) == known.example_shape


def test_splits_are_disjoint_whole_stratified_and_seeded() -> None:
    classes = sources.images("mnist").classes
    split = data.split(classes, seed=1)
    parts = (split.train, split.validation, split.test)
    assert sorted(np.concatenate(parts).tolist()) == list(range(5000))
    for part, each in zip(parts, (360, 40, 100), strict=True):
        assert np.bincount(classes[part]).tolist() == [each] * 10
    assert np.array_equal(data.split(classes, seed=1).test, split.test)
    assert not np.array_equal(data.split(classes, seed=2).test, split.test)


def test_a_missing_data_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(datasets.DATASETS["mnist"], package="no_such_package", distribution="no-such-package")
    monkeypatch.setattr(sources, "DATASETS", {"mnist": missing})
    with pytest.raises(PermanentError, match="no-such-package"):
        images.cnn.load("mnist", "", seed=1, settings={})


def test_evaluations_are_kept_with_the_version(undisturbed: tuple[Path, Listener]) -> None:
    folder, listener = undisturbed
    model = read_result(folder)
    assert [file.path for file in model.files] == [
        "model.onnx",
        "evaluation.json",
        "statistics.json",
        "training.json",
        *(f"plots/{name}.png" for name in PLOTS),
        "weights.safetensors",
        "labels.txt",
    ]
    stored = documents.read_evaluation(json.loads((folder / "evaluation.json").read_bytes()))
    assert stored == model.evaluation
    measured = listener.of(Evaluation)[0]
    assert isinstance(measured, Evaluation)
    assert measured.accuracy == stored.accuracy


@pytest.mark.parametrize("recipe", ["cnn", "mlp"])
@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_every_recipe_trains_on_every_data_set_it_names(recipe: str, dataset: str, tmp_path: Path) -> None:
    folder = put_task(tmp_path / "short", recipe=recipe, dataset=dataset, epochs=1.0, width=8.0, batch_size=16.0)
    listener = Listener(die_at=JobPhase.EVALUATING)
    with pytest.raises(Killed):
        run.train(folder, listener, threads=1)
    figures = [r for r in listener.of(Metrics) if isinstance(r, Metrics)][-1]
    assert figures.values["validation_accuracy"] > 0.2
