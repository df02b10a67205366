"""The fitting loop in one process: it goes on from any step as if it had never stopped, whatever its options."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from mlmesh_training.jobs import Checkpoint, Metrics  # noqa: E402
from mlmesh_training.options import Direction, EarlyStopping, FitOptions, Precision, Schedule  # noqa: E402
from mlmesh_training.trainer.definition import Loaded, Part  # noqa: E402
from mlmesh_training.trainer.fitting.batches import Plan, share  # noqa: E402
from mlmesh_training.trainer.fitting.loop import Fit  # noqa: E402
from mlmesh_training.trainer.fitting.pausing import Asked, PauseRequested  # noqa: E402
from mlmesh_training.trainer.fitting.schedules import factor  # noqa: E402
from mlmesh_training.trainer.reporter import PermanentError  # noqa: E402
from tests.support.fitting import DIGITS, Listener, Memory, digits, run, same, task  # noqa: E402

RANDOM = {"batch_norm": 1.0, "dropout": 0.2, "noise": 0.1}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "options",
    [
        FitOptions(checkpoint_steps=4),
        FitOptions(checkpoint_steps=3, accumulation_steps=2, clip_norm=0.5, schedule=Schedule.COSINE),
        FitOptions(checkpoint_steps=5, precision=Precision.BF16, schedule=Schedule.LINEAR, restore_best=True),
        FitOptions(
            checkpoint_steps=5,
            precision=Precision.FP16,
            clip_norm=1.0,
            early_stopping=EarlyStopping(patience=1, min_delta=9.0),
        ),
    ],
    ids=["plain", "accumulated", "bf16", "fp16"],
)
def test_from_every_checkpoint_it_ends_as_if_it_had_never_stopped(options: FitOptions) -> None:
    asked = task(fit=options, **RANDOM)
    fit, listener, memory = run(asked)
    last = max(memory.states)
    assert len(memory.states) > 3
    assert any(state["position"] for state in memory.states.values()), "some are from within an epoch"
    for step, state in memory.states.items():
        torch.rand(3)  # whatever came between has no part in it
        again, heard, kept = run(asked, state=state)
        assert same(again.state(), fit.state())
        if step < last:
            assert same(kept.states[last], memory.states[last])
            assert heard.curve() == listener.curve()[-len(heard.curve()) :]


def test_a_pause_writes_a_checkpoint_at_the_next_step_and_changes_nothing() -> None:
    asked = task(**RANDOM)
    fit, _, _ = run(asked)

    class At(Listener):
        def send(self, report: object) -> None:
            super().send(report)  # type: ignore[arg-type]
            pause.value = pause.value or isinstance(report, Checkpoint)

    for early in (True, False):
        pause, memory = Asked(), Memory()
        pause.value = early
        paused = Fit(asked, DIGITS, digits())
        with pytest.raises(PauseRequested):
            paused.run(memory, At(), pause=pause)
        assert max(memory.states) == (1 if early else 12)
        again, _, _ = run(asked, state=memory.states[max(memory.states)])
        assert same(again.state(), fit.state())


def test_a_pause_after_the_last_step_has_nothing_to_stop() -> None:
    pause = Asked()

    class Late(Listener):
        def send(self, report: object) -> None:
            pause.value = isinstance(report, Metrics) and "validation_loss" in report.values

    fit = Fit(task(epochs=1.0), DIGITS, digits())
    fit.run(Memory(), Late(), pause=pause)
    assert fit.done


def test_early_stopping_ends_it_and_the_best_weights_are_restored() -> None:
    stopping = EarlyStopping(metric="validation_accuracy", direction=Direction.MAXIMIZE, patience=2, min_delta=0.0)
    asked = task(fit=FitOptions(early_stopping=stopping, restore_best=True), epochs=40.0, learning_rate=0.05)
    fit, listener, memory = run(asked)
    accuracies = [accuracy for _, _, accuracy in listener.curve()]
    best = accuracies.index(max(accuracies))
    assert len(accuracies) == best + 3 < 40
    assert "validation_accuracy has not improved for 2 epochs" in listener.lines()[-1]
    assert same(memory.states[max(memory.states)]["best"], fit.best)
    validation = digits().validation
    model = fit.finished()
    with torch.no_grad():
        right = model(*validation.inputs).argmax(1) == validation.targets
    assert float(right.double().mean()) == max(accuracies)


def test_checkpoints_come_at_the_end_of_each_epoch_or_every_so_many_steps_and_at_the_end() -> None:
    assert list(run(task())[2].states) == [11, 22, 33]
    assert list(run(task(fit=FitOptions(checkpoint_steps=8)))[2].states) == [8, 16, 24, 32, 33]
    assert list(run(task(fit=FitOptions(checkpoint_steps=1000)))[2].states) == [33]
    assert list(run(task(fit=FitOptions(accumulation_steps=4)))[2].states) == [3, 6, 9]


def test_accumulated_batches_are_one_large_batch() -> None:
    """Without batch normalisation; the last, smaller one counts by its examples."""
    large = run(task(batch_size=64.0))[1].curve()
    small = run(task(batch_size=16.0, fit=FitOptions(accumulation_steps=4)))[1].curve()
    for expected, found in zip(large, small, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


def test_gradients_are_clipped() -> None:
    def moved(clip: float) -> float:
        settings = {"epochs": 1.0, "batch_size": 323.0, "weight_decay": 0.0}
        asked = task(fit=FitOptions(clip_norm=clip, schedule=Schedule.CONSTANT), **settings)
        fit = Fit(asked, DIGITS, digits())
        fit.run(Memory(), Listener())
        states = fit.state()["optimizer"]["state"].values()
        # After one step AdamW's first moment is a tenth of the gradient.
        return math.sqrt(sum(float((state["exp_avg"] * 10).square().sum()) for state in states))

    assert moved(0.0) > 0.1
    assert moved(0.1) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
def test_mixed_precision_learns_about_the_same(precision: Precision) -> None:
    exact = run(task())[1].curve()[-1]
    mixed = run(task(fit=FitOptions(precision=precision)))[1].curve()[-1]
    assert mixed != exact
    assert mixed[1] == pytest.approx(exact[1], rel=0.1)


def test_a_scale_that_overflows_skips_the_step_and_shrinks() -> None:
    fit = Fit(task(fit=FitOptions(precision=Precision.FP16)), DIGITS, digits())
    fit._scaler.load_state_dict({**fit._scaler.state_dict(), "scale": 2.0**60})
    memory = Memory()
    fit.run(memory, Listener())
    assert fit._scaler.get_scale() < 2.0**40
    assert memory.states[33]["scaler"]["scale"] == fit._scaler.get_scale()
    assert all(torch.isfinite(each).all() for each in fit.shared.plain.parameters())


def test_regressors_have_errors_in_the_unit_of_the_target() -> None:
    class Line(type(DIGITS)):  # type: ignore[misc]
        def build(self, settings: object, loaded: Loaded) -> object:
            return torch.nn.Sequential(torch.nn.Linear(64, 1), torch.nn.Flatten(0))

        def loss(self, outputs: object, targets: object, settings: object) -> object:
            return torch.nn.functional.l1_loss(outputs, targets)

    known = digits()

    def part(of: Part) -> Part:
        return Part(inputs=of.inputs, targets=of.inputs[0].sum(1) / 10)

    loaded = Loaded(train=part(known.train), validation=part(known.validation), test=part(known.test), target_std=4.0)
    listener = Listener()
    fit = Fit(task(), Line(), loaded)
    fit.run(Memory(), listener)
    values = [report.values for report in listener.reports if isinstance(report, Metrics)][-1]
    assert {"train_loss", "train_error", "validation_loss", "validation_error"} <= set(values)
    answers = fit.outputs(loaded.validation)
    squared = float((answers - loaded.validation.targets).square().mean())
    assert values["validation_loss"] == pytest.approx(squared, rel=1e-5)
    assert values["validation_error"] == pytest.approx(4.0 * math.sqrt(squared), rel=1e-5)


def test_a_loss_that_leaves_the_numbers_ends_the_job_for_good() -> None:
    fit = Fit(task(), DIGITS, digits())
    with torch.no_grad():
        next(fit.shared.plain.parameters()).fill_(float("inf"))
    with pytest.raises(PermanentError, match="lower learning_rate"):
        fit.run(Memory(), Listener())


def test_a_state_of_other_processes_or_of_another_format_does_not_fit() -> None:
    state = run(task(epochs=1.0))[2].states[11]
    for change in ({"world": 2}, {"format": 1}):
        with pytest.raises(ValueError, match="format, processes, strategy"):
            Fit(task(), DIGITS, digits()).restore({**state, **change})


@pytest.mark.parametrize("kind", [Schedule.COSINE, Schedule.LINEAR])
def test_schedules_rise_in_a_line_and_fall_to_nearly_nothing(kind: Schedule) -> None:
    of = factor(kind, steps=100, warmup_share=0.1)
    rates = [of(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == max(rates) == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.0 < rates[-1] < 0.02
    assert factor(kind, steps=1, warmup_share=0.0)(0) == 1.0
    assert {factor(Schedule.CONSTANT, steps=9, warmup_share=0.5)(step) for step in range(9)} == {1.0}


@pytest.mark.parametrize("examples", [2, 3, 4, 5, 31, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_batch_is_shared_whole_evenly_and_with_enough_for_batch_normalisation(examples: int, world: int) -> None:
    rows = torch.arange(examples)
    shares = [share(rows, rank=rank, world=world) for rank in range(world)]
    counted = [each for each in shares if each.counted]
    assert torch.cat([each.rows for each in counted]).tolist() == rows.tolist()
    assert max(each.counted for each in counted) - min(each.counted for each in counted) <= 1
    assert all(len(each.rows) >= 2 for each in shares)
    assert sum(each.counted for each in shares) == examples


def test_an_epoch_s_order_is_that_of_its_seed_and_number() -> None:
    plan = Plan(examples=65, batch=16, accumulation=3)
    order = plan.order(seed=1, epoch=2)
    assert len(order) == plan.steps == 2
    assert [len(rows) for batches in order for rows in batches] == [16, 16, 16, 16], "one alone teaches nothing"
    assert same(order, plan.order(seed=1, epoch=2))
    assert not same(order, plan.order(seed=1, epoch=3))
    assert not same(order, plan.order(seed=2, epoch=2))
