"""The policy that chooses an engine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mlmesh_inference.engines.base import Availability, EngineOptions
from mlmesh_inference.engines.selection import (
    MARGIN,
    REFERENCE,
    SelectionError,
    Trial,
    Wish,
    candidates,
    choose,
    chosen,
    why,
)
from mlmesh_inference.engines.verdicts import VerdictStore, verdict_key


class Kind:
    def __init__(self, name: str, *precisions: str, declared_only: bool = False) -> None:
        self.name = name
        self.precisions = precisions or ("fp32",)
        self.declared_only = declared_only

    def probe(self) -> Availability:
        raise NotImplementedError

    def build(self, model: Path, options: EngineOptions) -> Any:
        raise NotImplementedError


KINDS = [
    Kind("tensorrt"),
    Kind("onnxruntime-cuda"),
    Kind(REFERENCE),
    Kind("openvino", "fp32", "bf16"),
    Kind("torch", "fp32", "bf16"),
    Kind("torch-compiled", "fp32", "bf16", declared_only=True),
]
ABSENT = ("tensorrt", "onnxruntime-cuda")
FOUND = {kind.name: Availability(available=kind.name not in ABSENT, reason="") for kind in KINDS}


def tried(wish: Wish) -> list[tuple[str, str]]:
    return [(each.engine, each.precision) for each in candidates(KINDS, FOUND, wish).tried]


def test_auto_tries_what_is_there_in_fp32() -> None:
    assert tried(Wish()) == [(REFERENCE, "fp32"), ("openvino", "fp32"), ("torch", "fp32")]
    passed = {each.engine: each for each in candidates(KINDS, FOUND, Wish()).passed_over}
    assert passed.keys() == {"tensorrt", "onnxruntime-cuda", "torch-compiled"}
    assert "declares it" in passed["torch-compiled"].reason


def test_a_lower_precision_is_tried_only_where_it_is_declared_and_the_reference_stays() -> None:
    assert tried(Wish(precision="bf16")) == [(REFERENCE, "fp32"), ("openvino", "bf16"), ("torch", "bf16")]
    assert tried(Wish(precision="fp16")) == [(REFERENCE, "fp32")]


def test_a_declared_engine_is_tried_against_the_reference() -> None:
    assert tried(Wish(engine="torch-compiled")) == [(REFERENCE, "fp32"), ("torch-compiled", "fp32")]
    assert tried(Wish(engine="onnxruntime")) == [(REFERENCE, "fp32")]


def test_an_engine_that_nobody_knows_is_refused() -> None:
    with pytest.raises(SelectionError, match="engine 'fastest' is declared; there are tensorrt, onnxruntime-cuda"):
        tried(Wish(engine="fastest"))


def test_what_a_model_says_goes_before_what_the_process_says() -> None:
    wish = Wish.of(engine="", precision="", tolerance="", default_engine="openvino", default_precision="bf16")
    assert wish == Wish(engine="openvino", precision="bf16")
    wish = Wish.of(
        engine="auto", precision="FP32", tolerance="0.5", default_engine="openvino", default_precision="bf16"
    )
    assert wish == Wish(precision="fp32", tolerance=0.5)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp12", ""), ("", "much"), ("", "nan"), ("", "-1"), ("", "2")])
def test_what_makes_no_sense_is_refused(precision: str, tolerance: str) -> None:
    with pytest.raises(SelectionError):
        Wish.of(engine="", precision=precision, tolerance=tolerance)


def trial(engine: str, *times: float, precision: str = "fp32", accepted: bool = True) -> Trial:
    rows = (1, 2, 4, 8, 16)
    batch_times = tuple(zip(rows, times, strict=False))
    return Trial(engine=engine, precision=precision, reason="said", accepted=accepted, batch_times=batch_times)


def winner(trials: list[Trial], wish: Wish = Wish(), preferred: int = 8) -> str:  # noqa: B008
    found = chosen(choose(trials, wish, preferred))
    return found.engine if found else ""


def test_the_fastest_wins() -> None:
    assert winner([trial(REFERENCE, 4, 4), trial("openvino", 2, 2), trial("torch", 3, 3)]) == "openvino"
    assert winner([trial(REFERENCE, 1, 1), trial("openvino", 2, 2)]) == REFERENCE


def test_a_change_takes_more_than_noise() -> None:
    assert winner([trial(REFERENCE, 1.0), trial("openvino", 1 / (MARGIN - 0.01))]) == REFERENCE
    assert winner([trial(REFERENCE, 1.0), trial("openvino", 1 / (MARGIN + 0.01))]) == "openvino"


def test_batches_above_the_usual_do_not_count() -> None:
    slow_when_large = trial("openvino", 0.5, 0.5, 0.5, 0.5, 99)
    assert winner([trial(REFERENCE, 1, 1, 1, 1, 1), slow_when_large]) == "openvino"
    assert winner([trial(REFERENCE, 1, 1, 1, 1, 1), slow_when_large], preferred=16) == REFERENCE


def test_what_is_outside_tolerance_does_not_serve_however_fast() -> None:
    trials = choose([trial(REFERENCE, 1), trial("openvino", 0.1, accepted=False)], Wish(), 8)
    assert chosen(trials) is trials[0]
    assert why(trials).startswith("said; the fastest that answers as it should; openvino (fp32): said")


def test_a_declared_engine_serves_also_when_it_is_slower_and_none_does_when_it_is_refused() -> None:
    wish = Wish(engine="torch")
    assert winner([trial(REFERENCE, 1), trial("torch", 5)], wish) == "torch"
    assert winner([trial(REFERENCE, 1), trial("torch", 5, accepted=False)], wish) == ""


def test_without_times_the_reference_stays() -> None:
    assert winner([trial(REFERENCE), trial("openvino")]) == REFERENCE
    assert winner([trial(REFERENCE), trial("openvino")], Wish(engine="openvino")) == "openvino"


def test_trials_survive_the_disk(tmp_path: Path) -> None:
    store = VerdictStore(tmp_path / "verdicts")
    trials = (trial(REFERENCE, 1, 2), Trial(engine="torch", precision="bf16", reason="no", error_max=math.inf))
    key = verdict_key({"model": "abc"})
    assert store.get(key) is None
    store.put(key, trials)
    kept = store.get(key)
    assert kept is not None
    assert kept[0] == trials[0]
    assert kept[1].error_max == 1e308
    assert store.get(verdict_key({"model": "abd"})) is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"engine": "x"}]', "[]", "null"])
def test_a_verdict_that_cannot_be_read_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text(text)
    assert VerdictStore(tmp_path).get("k") is None


def test_old_verdicts_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlmesh_inference.engines.verdicts.FILES_MAX", 3)
    store = VerdictStore(tmp_path)
    for number in range(6):
        store.put(f"k{number}", (trial(REFERENCE),))
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_a_trial_is_plain_json() -> None:
    one = trial(REFERENCE, 0.5)
    assert Trial.from_json(json.loads(json.dumps(one.to_json()))) == one
