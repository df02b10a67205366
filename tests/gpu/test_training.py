"""The fitting on a GPU: NCCL in a group of one, mixed precision, the same bits again. Skipped visibly without one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from mlmesh_training.options import FitOptions, Precision, Strategy  # noqa: E402
from mlmesh_training.trainer.fitting import sharing  # noqa: E402
from mlmesh_training.trainer.fitting.loop import LOOK_STEPS_GPU, Fit  # noqa: E402
from mlmesh_training.trainer.fitting.pausing import Asked, PauseRequested  # noqa: E402
from mlmesh_training.trainer.fitting.ranks import Ranks, device, settle  # noqa: E402
from mlmesh_training.trainer.fitting.worker import joined  # noqa: E402
from tests.support.fitting import DIGITS, Listener, Memory, digits, run, same, task  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]
RANDOM = {"batch_norm": 1.0, "dropout": 0.2, "noise": 0.1}


@pytest.fixture
def alone() -> Iterator[Ranks]:
    before = torch.are_deterministic_algorithms_enabled()
    settle(1)
    yield Ranks(device=device(local_rank=0, local_world=1))
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A process group of this process alone, over NCCL."""
    settle(1)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    with joined(tmp_path, collective_s=60.0) as ranks:
        yield ranks


@pytest.mark.parametrize("precision", list(Precision))
def test_from_every_checkpoint_it_ends_with_the_same_bits(alone: Ranks, precision: Precision) -> None:
    assert alone.device.type == "cuda"
    asked = task(fit=FitOptions(checkpoint_steps=7, precision=precision, clip_norm=1.0), **RANDOM)
    fit, listener, memory = run(asked, alone)
    assert [report for report in listener.curve() if report[2] > 0.2]
    for state in memory.states.values():
        again, _, _ = run(asked, alone, state=state)
        assert same(cpu(again.state()), cpu(fit.state()))


def test_it_learns_what_the_cpu_learns(alone: Ranks) -> None:
    for expected, found in zip(run(task())[1].curve(), run(task(), alone)[1].curve(), strict=True):
        assert found == pytest.approx(expected, abs=1e-3)


def test_the_fitted_module_is_on_the_cpu(alone: Ranks) -> None:
    fit, _, _ = run(task(epochs=1.0), alone)
    assert {each.device.type for each in fit.finished().state_dict().values()} == {"cpu"}


def test_a_pause_is_seen_at_the_next_look(alone: Ranks) -> None:
    pause, memory = Asked(), Memory()
    pause.value = True
    with pytest.raises(PauseRequested):
        Fit(task(batch_size=8.0), DIGITS, digits(), alone).run(memory, Listener(), pause=pause)
    assert max(memory.states) == LOOK_STEPS_GPU


@pytest.mark.parametrize("strategy", list(Strategy))
def test_ddp_and_fsdp2_over_nccl_learn_what_one_process_does(
    group: Ranks, strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of one: `sharing.share` would leave the model whole."""
    expected = run(task(), Ranks(device=group.device))[1].curve()
    spread = sharing.Copied if strategy is Strategy.DDP else sharing.Sharded
    monkeypatch.setattr(sharing, "share", lambda model, _strategy, ranks: spread(model.to(ranks.device), ranks))
    fit, listener, memory = run(task(fit=FitOptions(checkpoint_steps=5)), group)
    for one, found in zip(expected, listener.curve(), strict=True):
        assert found == pytest.approx(one, abs=1e-4)
    again, _, _ = run(task(fit=FitOptions(checkpoint_steps=5)), group, state=memory.states[15])
    assert same(cpu(again.state()), cpu(fit.state()))


def cpu(value: object) -> object:
    """A state with all of its tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: cpu(each) for name, each in value.items()}
    return [cpu(each) for each in value] if isinstance(value, list | tuple) else value
