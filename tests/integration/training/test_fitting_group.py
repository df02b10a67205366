"""Three real processes that fit together over gloo, by DDP and by FSDP2, against one process and against themselves."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mlmesh_training.options import Strategy  # noqa: E402
from tests.support import fitting_group  # noqa: E402
from tests.support.fitting import run, task  # noqa: E402
from tests.support.fitting_group import CURVES, RESUMED  # noqa: E402

pytestmark = pytest.mark.timeout(400)
BOTH = pytest.mark.parametrize("strategy", list(Strategy))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """All scenarios, run once by three processes."""
    return fitting_group.found()


@BOTH
@pytest.mark.parametrize("name", list(CURVES))
def test_three_processes_learn_what_one_does(found: dict[str, Any], strategy: Strategy, name: str) -> None:
    """Nothing at random in it, and a last batch of three examples that three processes cannot share evenly."""
    torch.set_num_threads(1)
    fit, listener, _ = run(task(**CURVES[name]))
    together = found[f"{strategy} {name}"]
    assert len(together["curve"]) == len(listener.curve())
    for expected, got in zip(listener.curve(), together["curve"], strict=True):
        assert got == pytest.approx(expected, abs=1e-5)
    assert together["lines"] == listener.lines()
    assert (together["best"] is None) == (fit.best is None)
    for weight, expected in (fit.best or {}).items():
        torch.testing.assert_close(together["best"][weight], expected, atol=1e-4, rtol=1e-4)


@BOTH
@pytest.mark.parametrize("name", list(RESUMED))
def test_from_every_checkpoint_they_end_with_the_same_bits(
    found: dict[str, Any], strategy: Strategy, name: str
) -> None:
    alike = found[f"{strategy} {name}"]["alike"]
    assert alike
    assert all(alike.values()), alike


@BOTH
def test_one_that_is_asked_to_pause_pauses_all_at_the_same_step(found: dict[str, Any], strategy: Strategy) -> None:
    assert found[f"{strategy} paused"] == {"stopped": True, "step": 11, "alike": True}


@BOTH
def test_running_statistics_are_the_same_everywhere(found: dict[str, Any], strategy: Strategy) -> None:
    assert found[f"{strategy} statistics"]


def test_fsdp2_shards_the_weights_and_ddp_does_not(found: dict[str, Any]) -> None:
    assert found["DDP sharded"] == 1.0
    assert found["FSDP2 sharded"] == pytest.approx(1 / 3, abs=0.05)


def test_ddp_and_fsdp2_learn_the_same(found: dict[str, Any]) -> None:
    """They add up in different orders, which grows: the first epoch is near enough to tell."""
    for name in ("random", "bf16"):
        assert found[f"DDP {name}"]["curve"][0] == pytest.approx(found[f"FSDP2 {name}"]["curve"][0], abs=2e-2)
