"""Early stopping, GPUs handed to a process, and the semaphores of killed jobs: what needs no torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlmesh_training.backends import process
from mlmesh_training.options import Direction, EarlyStopping
from mlmesh_training.trainer.__main__ import visible_gpus
from mlmesh_training.trainer.fitting.watching import Watch
from mlmesh_training.trainer.reporter import PermanentError


def watched(options: EarlyStopping | None, values: list[float]) -> tuple[Watch, list[bool], int | None]:
    """The watch after these values, which of them were the best so far, and the epoch that ended the fitting."""
    watch, best, ended = Watch.of(options), [], None
    for epoch, value in enumerate(values, start=1):
        best.append(watch.see(epoch, {(options or EarlyStopping()).metric: value, "other": 0.0}))
        if watch.over and ended is None:
            ended = epoch
    return watch, best, ended


def test_it_ends_after_so_many_epochs_without_an_improvement() -> None:
    watch, best, ended = watched(EarlyStopping(patience=2), [3.0, 2.0, 2.0, 2.5, 1.0])
    assert best == [True, True, False, False, True]
    assert ended == 4
    assert (watch.best, watch.best_epoch) == (1.0, 5)


def test_small_improvements_do_not_count_but_add_up_and_the_best_is_still_known() -> None:
    options = EarlyStopping(metric="validation_accuracy", direction=Direction.MAXIMIZE, patience=2, min_delta=0.05)
    watch, best, ended = watched(options, [0.50, 0.53, 0.56, 0.58, 0.59])
    # 0.56 is better than 0.50 by enough, though each step was too small.
    assert ended == 5
    assert best == [True] * 5
    assert watch.best == 0.59


def test_without_options_it_only_knows_the_best() -> None:
    watch, _, ended = watched(None, [1.0, 2.0, 2.0, 2.0, 2.0])
    assert ended is None
    assert watch.best_epoch == 1


def test_it_goes_on_from_what_it_had_seen() -> None:
    options = EarlyStopping(patience=3, min_delta=0.1)
    values = [1.0, 0.95, 0.92, 0.85, 0.84, 0.83, 0.82]
    straight, _, ended = watched(options, values)
    for cut in range(1, len(values)):
        first, _, _ = watched(options, values[:cut])
        second = Watch.of(options)
        second.restore(first.state())
        for epoch, value in enumerate(values[cut:], start=cut + 1):
            second.see(epoch, {"validation_loss": value})
        assert second.state() == straight.state()
    assert ended == 7


def test_a_figure_that_is_not_measured_is_named() -> None:
    with pytest.raises(PermanentError, match="'f1', which is not measured; there are validation_loss"):
        Watch.of(EarlyStopping(metric="f1")).see(1, {"validation_loss": 1.0})


@pytest.mark.parametrize(
    ("gpus", "environ", "expected"),
    [
        ((), {}, ""),
        ((), {"CUDA_VISIBLE_DEVICES": "3,5"}, ""),
        ((0, 2), {}, "0,2"),
        ((1,), {"CUDA_VISIBLE_DEVICES": "3, 5"}, "5"),
        ((0, 1), {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, "GPU-a,GPU-b"),
    ],
)
def test_a_process_sees_the_gpus_of_its_job(gpus: tuple[int, ...], environ: dict[str, str], expected: str) -> None:
    assert visible_gpus(gpus, environ) == expected


def test_semaphores_of_a_killed_job_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_SEMAPHORES", tmp_path)
    mine, other = tmp_path / "sem.mlmesh-cnn-1-a8x", tmp_path / "sem.mlmesh-cnn-12-a8x"
    for path in (mine, other):
        path.touch()
    assert process.semaphore_prefix("cnn-1") == "/mlmesh-cnn-1"
    process.sweep_semaphores("cnn-1")
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
