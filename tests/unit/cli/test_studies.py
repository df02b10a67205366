"""`mlmesh studies`: what a person writes becomes a spec; trials and progress are readable at 80 columns."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import grpc
import pytest
from rich.console import Console

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.errors import CliError
from mlmesh_cli.render import studies as view
from mlmesh_cli.studies import dimensions, trials_in_all
from mlmesh_cli.study_progress import StudyProgress
from tests.support.cli import NOW, at
from tests.unit.cli.conftest import FakeMesh, abort, text_of

RATE = pb.HyperparameterSpec(name="learning_rate", min_value=1e-6, max_value=1, log_scale=True)
KNOWN = {"learning_rate": RATE, "dropout": pb.HyperparameterSpec(name="dropout", max_value=0.9)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate", pb.SearchDimension(name="learning_rate", log_scale=True)),
        ("dropout", pb.SearchDimension(name="dropout")),
        ("other", pb.SearchDimension(name="other")),
        (
            "learning_rate=1e-4..1e-1:log",
            pb.SearchDimension(name="learning_rate", min_value=1e-4, max_value=0.1, log_scale=True),
        ),
        (
            "learning_rate=1e-4..1e-1",
            pb.SearchDimension(name="learning_rate", min_value=1e-4, max_value=0.1, log_scale=True),
        ),
        ("learning_rate=0.1..0.2:linear", pb.SearchDimension(name="learning_rate", min_value=0.1, max_value=0.2)),
        ("dropout=0..0.5:0.1", pb.SearchDimension(name="dropout", min_value=0, max_value=0.5, step=0.1)),
        ("dropout=-1..1", pb.SearchDimension(name="dropout", min_value=-1, max_value=1)),
        ("width=32, 64,128", pb.SearchDimension(name="width", values=[32, 64, 128])),
        ("width=32", pb.SearchDimension(name="width", values=[32])),
    ],
)
def test_what_is_searched_is_written_as_a_person_would(text: str, expected: pb.SearchDimension) -> None:
    assert dimensions([text], KNOWN) == [expected]


@pytest.mark.parametrize("text", ["", "=1..2", "x=", "x=a", "x=1..", "x=1..2:often", "x=1,,2", "x=1..2..3"])
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(CliError) as raised:
        dimensions([text], KNOWN)
    assert raised.value.exit_code == 2
    assert repr(text) in raised.value.problem
    assert "learning_rate=1e-4..1e-1:log" in raised.value.hint


def test_the_bar_knows_how_many_trials_a_grid_has() -> None:
    assert trials_in_all(pb.StudySpec()) == 20
    spec = pb.StudySpec(sampler=pb.SAMPLER_GRID, dimensions=dimensions(["a=1,2,3", "b=0..1:0.25"], KNOWN))
    assert trials_in_all(spec) == 15
    spec.trials_max = 4
    assert trials_in_all(spec) == 4


def study(**fields: Any) -> pb.Study:
    made = pb.Study(name="studies/mlp-1", state=pb.STUDY_STATE_RUNNING, **fields)
    made.spec.job.recipe, made.spec.job.dataset, made.spec.metric = "mlp", "digits", "validation_accuracy"
    made.spec.dimensions.extend(dimensions(["learning_rate", "width=8,16"], KNOWN))
    made.spec.trials_max = 40
    made.create_time.CopyFrom(at(-60))
    return made


def trial(number: int, state: pb.TrialState.ValueType = pb.TRIAL_STATE_COMPLETE, **fields: Any) -> pb.Trial:
    point = {"learning_rate": 0.000123456 * (number + 1), "width": 16.0}
    return pb.Trial(
        number=number, state=state, hyperparameters=point, job=f"jobs/{number}", **{"value": 0.9, "epoch": 3, **fields}
    )


def test_trials_fit_80_columns_and_the_best_is_marked() -> None:
    known = study(best_trial=trial(1))
    lines = text_of(view.trials_table([trial(0), trial(1), trial(2, pb.TRIAL_STATE_RUNNING)], known), width=80)
    rows = [line.split() for line in lines.splitlines()]
    assert ["0", "complete", "3", "0.9000", "0.0001235", "16"] in rows
    assert [view.BEST, "1", "complete", "3", "0.9000", "0.0002469", "16"] in rows
    assert "val acc" in lines
    assert "…" not in lines


def test_many_hyperparameters_share_a_column() -> None:
    known = study()
    known.spec.dimensions.extend(dimensions(["a", "b"], {}))
    text = text_of(view.trials_table([trial(0)], known), width=80)
    assert "learning_rate 0.0001235, width 16" in text


def test_a_live_table_shows_what_runs_the_best_and_the_latest() -> None:
    trials = [trial(number) for number in range(30)]
    trials[4] = trial(4, pb.TRIAL_STATE_RUNNING)
    assert [each.number for each in view.shown(trials, 7, 5)] == [4, 7, 27, 28, 29]
    assert len(view.shown(trials[:3], None, 5)) == 3


def test_a_study_says_where_it_stands() -> None:
    known = study(
        best_trial=trial(3, value=0.97531),
        counts=pb.TrialCounts(complete=4, pruned=2, failed=1),
        model_version="models/m/versions/2",
    )
    known.state = pb.STUDY_STATE_SUCCEEDED
    known.end_time.CopyFrom(at(0))
    text = text_of(view.study_view(known), width=80)
    for wanted in (
        "studies/mlp-1 succeeded after 1 min",
        "4 complete, 2 pruned, 1 failed",
        "trial 3",
        "0.9753",
        "jobs/3",
    ):
        assert wanted in text
    assert "registered as models/m/versions/2" in text
    listed = text_of(view.studies_table([known], NOW), width=80)
    for wanted in ("mlp-1", "mlp on digits", "succeeded", "7/40", "0.9753", "m/2", "1 min ago"):
        assert wanted in listed


def events() -> list[pb.WatchStudyResponse]:
    running = study(counts=pb.TrialCounts(running=1))
    ended = study(counts=pb.TrialCounts(complete=1), best_trial=trial(0))
    ended.state = pb.STUDY_STATE_SUCCEEDED
    return [
        pb.WatchStudyResponse(sequence=1, study=study()),
        pb.WatchStudyResponse(sequence=2, trial=trial(0, pb.TRIAL_STATE_RUNNING)),
        pb.WatchStudyResponse(sequence=3, study=running),
        pb.WatchStudyResponse(sequence=4, trial=trial(0)),
        pb.WatchStudyResponse(sequence=5, study=ended),
    ]


def test_progress_draws_a_table_and_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None, emoji=False)
    with StudyProgress(console, "studies/mlp-1") as progress:
        for event in events():
            progress.update(event)
    text = stream.getvalue()
    assert "0.9000" in text
    assert "1/1" in text
    assert "succeeded: 1 complete" in text
    assert max(len(line) for line in re.sub(r"\x1b\[[0-9?]*[a-zA-Z]|\r", "", text).splitlines()) <= 80


def test_run_sends_the_study_and_shows_its_end(mesh: FakeMesh) -> None:
    recipe = pb.Recipe(name="mlp", hyperparameters=[RATE])
    mesh.training["ListRecipes"] = lambda _request, _context: pb.ListRecipesResponse(recipes=[recipe])
    mesh.training["CreateStudy"] = lambda request, _context: pb.CreateStudyResponse(study=study())
    mesh.training["WatchStudy"] = lambda _request, _context: iter(events())
    result = mesh.run(
        "studies", "run", "-r", "mlp", "-d", "digits", "-s", "learning_rate", "--search", "width=32,64",
        "--set", "epochs=3",
        "--sampler", "random", "--pruner", "hyperband", "--direction", "maximize", "-n", "12", "-p", "2", "--seed", "4",
        "--model", "models/searched", "--alias", "best",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "succeeded" in result.stdout
    asked = mesh.training.requests["CreateStudy"][0].spec
    assert asked.dimensions == dimensions(["learning_rate", "width=32,64"], KNOWN)
    assert (asked.sampler, asked.pruner) == (pb.SAMPLER_RANDOM, pb.PRUNER_HYPERBAND)
    assert (asked.direction, asked.trials_max, asked.parallel_max) == (pb.DIRECTION_MAXIMIZE, 12, 2)
    assert (asked.seed, asked.job.seed, dict(asked.job.hyperparameters)) == (4, 4, {"epochs": 3.0})
    assert asked.job.publication == pb.Publication(model="models/searched", aliases=["best"])


def test_run_takes_a_file_and_json_is_one_event_a_line(mesh: FakeMesh, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        "job: {recipe: cnn, dataset: mnist}\ndimensions: [{name: width, values: [8, 16]}]\nsampler: SAMPLER_GRID\n"
    )
    mesh.training["CreateStudy"] = lambda request, _context: pb.CreateStudyResponse(study=study())
    mesh.training["WatchStudy"] = lambda _request, _context: iter(events())
    result = mesh.run("studies", "run", "--study", str(path), "--no-publish", "-o", "json")
    assert [json.loads(line)["sequence"] for line in result.stdout.splitlines()] == [str(n) for n in range(1, 6)]
    asked = mesh.training.requests["CreateStudy"][0].spec
    assert (asked.job.recipe, asked.sampler, asked.job.HasField("publication")) == ("cnn", pb.SAMPLER_GRID, False)
    path.write_text("job: {recpe: cnn}")
    result = mesh.run("studies", "run", "--study", str(path))
    assert result.exit_code == 1
    assert "recpe" in result.stderr


def test_a_failed_study_is_an_error(mesh: FakeMesh) -> None:
    failed = study(error="no trial succeeded")
    failed.state = pb.STUDY_STATE_FAILED
    mesh.training["WatchStudy"] = lambda _request, _context: iter([pb.WatchStudyResponse(sequence=1, study=failed)])
    result = mesh.run("studies", "watch", "mlp-1")
    assert result.exit_code == 1
    assert "no trial succeeded" in result.stderr
    assert mesh.training.requests["WatchStudy"][0].name == "studies/mlp-1"


def test_list_get_stop_and_trials(mesh: FakeMesh) -> None:
    mesh.training["ListStudies"] = lambda _request, _context: pb.ListStudiesResponse(studies=[study()])
    mesh.training["GetStudy"] = lambda _request, _context: pb.GetStudyResponse(study=study(best_trial=trial(1)))
    mesh.training["StopStudy"] = lambda _request, _context: pb.StopStudyResponse(study=study())

    def trials(request: pb.ListTrialsRequest, _context: Any) -> pb.ListTrialsResponse:
        if request.page_token:
            return pb.ListTrialsResponse(trials=[trial(1)])
        return pb.ListTrialsResponse(trials=[trial(0)], next_page_token="next")

    mesh.training["ListTrials"] = trials
    assert "mlp on digits" in mesh.run("studies", "list", "-n", "3").stdout
    assert "trial 1" in mesh.run("studies", "get", "studies/mlp-1").stdout
    assert "running" in mesh.run("studies", "stop", "mlp-1").stdout
    shown = mesh.run("studies", "trials", "mlp-1").stdout
    assert view.BEST in shown
    listed = json.loads(mesh.run("studies", "trials", "mlp-1", "-o", "json").stdout)
    assert [each["number"] for each in listed["trials"]] == [0, 1]


def test_a_study_that_is_not_there_says_where_to_look(mesh: FakeMesh) -> None:
    def missing(_request: Any, context: Any) -> None:
        abort(context, grpc.StatusCode.NOT_FOUND, "no study 'studies/x'", reason="STUDY_NOT_FOUND")

    mesh.training["GetStudy"] = missing
    result = mesh.run("studies", "get", "x")
    assert result.exit_code == 1
    assert "mlmesh studies list" in result.stderr
