from __future__ import annotations

import pytest

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.errors import CliError
from mlmesh_cli.specs import Wishes, apply, pairs, quantity, seconds


def test_what_is_said_becomes_a_spec_and_what_is_not_stays() -> None:
    spec = pb.JobSpec(recipe="cnn", seed=3, priority=7, labels={"a": "b"})
    apply(
        spec,
        Wishes(
            priority=-5,
            time_limit="1.5h",
            cpus=2.5,
            memory="4Gi",
            gpus=1,
            processes=4,
            strategy="fsdp2",
            precision="bf16",
            schedule="one-cycle",
            accumulate=2,
            clip_norm=1.0,
            early_stopping=5,
            stop_metric="validation_accuracy",
            checkpoint_steps=100,
            best=True,
            labels=["team=vision", "why=a=b"],
        ),
    )
    assert (spec.seed, spec.priority, spec.time_limit.seconds) == (3, -5, 5400)
    assert spec.resources == pb.Resources(cpus=2.5, memory_bytes=4 << 30, gpus=1)
    assert spec.distribution == pb.Distribution(processes=4, strategy=pb.STRATEGY_FSDP2)
    assert spec.fit == pb.FitOptions(
        precision=pb.PRECISION_BF16,
        schedule=pb.SCHEDULE_ONE_CYCLE,
        accumulation_steps=2,
        clip_norm=1.0,
        early_stopping=pb.EarlyStopping(metric="validation_accuracy", patience=5),
        checkpoint_steps=100,
        restore_best=True,
    )
    assert dict(spec.labels) == {"a": "b", "team": "vision", "why": "a=b"}


def test_nothing_said_leaves_a_spec_as_it_is() -> None:
    spec = pb.JobSpec(recipe="cnn", dataset="mnist")
    before = spec.SerializeToString()
    apply(spec, Wishes())
    assert spec.SerializeToString() == before


@pytest.mark.parametrize(("text", "value"), [("90", 90), ("90s", 90), ("15m", 900), ("2 h", 7200), ("0.5d", 43200)])
def test_lengths_of_time(text: str, value: float) -> None:
    assert seconds("--time-limit", text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("512M", 512_000_000), ("4Gi", 4 << 30), ("1.5GiB", 3 << 29), ("2 TB", 2 * 10**12)]
)
def test_bytes(text: str, value: int) -> None:
    assert quantity("--memory", text) == value


@pytest.mark.parametrize("text", ["", "x", "-1", "1w", "0", "1h30m", "inf"])
def test_what_is_no_length_of_time_is_named(text: str) -> None:
    with pytest.raises(CliError, match="--time-limit"):
        seconds("--time-limit", text)


@pytest.mark.parametrize("text", ["", "x", "-1", "4Qi", "1 2"])
def test_what_is_no_amount_is_named(text: str) -> None:
    with pytest.raises(CliError, match="--memory"):
        quantity("--memory", text)


@pytest.mark.parametrize("text", ["team", "=x", " =x"])
def test_what_is_no_label_is_named(text: str) -> None:
    with pytest.raises(CliError, match="--label"):
        pairs("--label", [text])
