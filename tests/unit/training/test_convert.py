"""What was asked comes back as it was asked, over the wire and out of the ledger."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_runtime.errors import InvalidInput
from mlmesh_training import convert, documents
from mlmesh_training.backends.base import TrainingTask
from mlmesh_training.jobs import (
    Attempt,
    Calibration,
    CalibrationBin,
    Evaluation,
    JobSpec,
    JobState,
    Latency,
    Publication,
    RegressionErrors,
)
from mlmesh_training.options import (
    Direction,
    Distillation,
    Distribution,
    EarlyStopping,
    FitOptions,
    MixedPrecision,
    Optimization,
    Precision,
    Pruning,
    Quantization,
    Resources,
    Schedule,
    Strategy,
)
from tests.support.training import START, evaluation, job, optimization, spec

share = st.floats(0.01, 0.9)
techniques = st.one_of(
    st.builds(Quantization, calibration_examples=st.integers(1, 1000), method=st.sampled_from(["minmax", "entropy"])),
    st.builds(MixedPrecision, precision=st.sampled_from([Precision.FP16, Precision.BF16])),
    st.builds(Pruning, sparsity=share, two_four=st.booleans(), epochs=st.integers(1, 9)),
    st.builds(Distillation, temperature=st.floats(0.5, 9), teacher_share=share),
)
fits = st.builds(
    FitOptions,
    precision=st.sampled_from(Precision),
    schedule=st.sampled_from(Schedule),
    warmup_share=share,
    accumulation_steps=st.integers(1, 99),
    clip_norm=st.floats(0, 10),
    early_stopping=st.none()
    | st.builds(
        EarlyStopping,
        metric=st.sampled_from(["validation_loss", "validation_accuracy"]),
        patience=st.integers(1, 99),
        min_delta=st.floats(0, 1),
        direction=st.sampled_from(Direction),
    ),
    checkpoint_steps=st.integers(0, 99),
    restore_best=st.booleans(),
)
specs = st.builds(
    JobSpec,
    recipe=st.just("cnn"),
    dataset=st.sampled_from(["digits", "models/houses/versions/3"]),
    hyperparameters=st.dictionaries(st.sampled_from(["epochs", "width"]), st.integers(1, 99).map(float)),
    seed=st.integers(0, 2**32 - 1),
    retries_max=st.integers(-1, 100),
    publication=st.none() | st.just(Publication(model="models/m", aliases=("a", "b"), description="d")),
    priority=st.integers(-100, 100),
    resources=st.builds(Resources, cpus=st.floats(0, 64), memory_bytes=st.integers(0, 1 << 40), gpus=st.integers(0, 8)),
    distribution=st.builds(
        Distribution, processes=st.integers(1, 64), strategy=st.sampled_from(Strategy), nodes=st.integers(1, 9)
    ),
    fit=fits,
    time_limit_s=st.just(0.0) | st.integers(1, 10**9).map(lambda millis: millis / 1000),
    optimization=st.none()
    | st.builds(Optimization, source=st.just("models/m/aliases/stable"), technique=techniques, quality_drop_max=share),
    labels=st.dictionaries(st.sampled_from("ab"), st.text(max_size=9)),
)


@given(specs)
def test_a_spec_comes_back_over_the_wire_and_out_of_the_ledger(asked: JobSpec) -> None:
    wire = pb.JobSpec.FromString(convert.spec_message(asked).SerializeToString())
    assert convert.spec(wire) == asked
    text = documents.dumps(documents.spec_document(asked))
    assert documents.read_spec(json.loads(text)) == asked


@given(fits, techniques)
def test_a_task_comes_back_as_it_was_written(fit: FitOptions, technique: Any) -> None:
    task = TrainingTask(
        uid="a",
        recipe="cnn",
        dataset="",
        dataset_version="models/houses/versions/3",
        hyperparameters={"epochs": 2.0},
        seed=7,
        fit=fit,
        distribution=Distribution(processes=4, strategy=Strategy.FSDP2, nodes=2),
        optimization=Optimization(source="models/m/versions/1", technique=technique),
        attempt=3,
        threads=2,
        gpus=(1, 0),
    )
    assert documents.read_task(json.loads(documents.dumps(documents.task_document(task)))) == task


def test_what_is_not_set_takes_its_default_and_what_is_default_is_not_shown() -> None:
    bare = pb.JobSpec(recipe="cnn", dataset="digits")
    assert convert.spec(bare) == JobSpec(recipe="cnn", dataset="digits")
    assert convert.spec_message(convert.spec(bare)) == bare
    asked = pb.JobSpec(recipe="cnn", dataset="digits", fit=pb.FitOptions(early_stopping=pb.EarlyStopping()))
    stopping = convert.spec(asked).fit.early_stopping
    assert stopping == EarlyStopping(metric="validation_loss", patience=3, direction=Direction.MINIMIZE)
    asked.fit.early_stopping.metric = "validation_accuracy"
    found = convert.spec(asked).fit.early_stopping
    assert found is not None
    assert found.direction is Direction.MAXIMIZE
    asked.optimization.source = "models/m/versions/1"
    asked.optimization.quantization.SetInParent()
    made = convert.spec(asked).optimization
    assert made is not None
    assert (made.technique, made.quality_drop_max) == (Quantization(calibration_examples=256, method="minmax"), 0.01)


def test_a_document_of_a_spec_without_new_fields_is_what_it_was_before_there_were_any() -> None:
    # Request ids are compared by it: one that was sent before an upgrade must still be known after it.
    assert set(documents.spec_document(spec())) == {
        *("recipe", "dataset", "hyperparameters", "seed", "retries_max", "publication")
    }


def test_a_job_is_shown_with_all_that_is_known() -> None:
    measured = Evaluation(
        loss=0.5,
        examples=8,
        calibration=Calibration(
            expected_error=0.1,
            max_error=0.2,
            brier=0.3,
            bins=(CalibrationBin(examples=8, confidence=0.9, accuracy=0.8),),
        ),
        latency=(Latency(batch_size=1, median_s=0.001, p95_s=0.002, requests=100),),
        regression=RegressionErrors(mean_absolute_error=1.0, root_mean_squared_error=2.0, r2=0.9),
    )
    known = job(
        history=(Attempt(number=1, start_time=START, end_time=START, reason="SIGKILL", charged=True),),
        run_s=1.5,
        study="studies/s",
        resources=Resources(cpus=2.0, memory_bytes=3, gpus=1),
        queue_position=4,
        optimization=optimization(),
        resolved_dataset="models/d/versions/1",
        evaluation=measured,
    )
    assert documents.read_job(json.loads(documents.dumps(documents.job_document(known)))) == known
    shown = convert.job(known)
    (attempt,) = shown.attempt_history
    assert (attempt.number, attempt.reason, attempt.charged) == (1, "SIGKILL", True)
    assert shown.run_duration == Duration(seconds=1, nanos=500_000_000)
    assert (shown.study, shown.queue_position, shown.resolved_dataset) == ("studies/s", 4, "models/d/versions/1")
    assert shown.resources == pb.Resources(cpus=2.0, memory_bytes=3, gpus=1)
    assert (shown.optimization.technique, shown.optimization.after.accuracy) == ("int8", 0.7)
    assert shown.evaluation.calibration.bins[0].confidence == 0.9
    assert shown.evaluation.latency[0].p95.ToMilliseconds() == 2
    assert shown.evaluation.regression.r2 == 0.9
    assert not convert.evaluation(evaluation()).HasField("regression")


def test_states_to_look_for() -> None:
    assert convert.states([pb.JOB_STATE_PAUSED, pb.JOB_STATE_PAUSED]) == {JobState.PAUSED}
    with pytest.raises(InvalidInput, match="states"):
        convert.states([pb.JOB_STATE_UNSPECIFIED])
