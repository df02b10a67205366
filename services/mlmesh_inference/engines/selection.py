"""Which engine serves a model, and why: the policy, as values and functions.

`auto` tries every engine that is available, lets none through that does not answer as ONNX Runtime in FP32 does, and
takes the fastest. A declared engine or precision narrows what is tried; a precision below the file's own is tried only
where it was declared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from mlmesh_inference.engines.base import PRECISIONS, Availability, EngineKind

REFERENCE: Final = "onnxruntime-cpu"
MARGIN: Final = 1.05
"""How much faster another engine must be than the reference, which serves already: less is noise."""
ALIASES: Final = {"onnxruntime": ("onnxruntime-cpu", "onnxruntime-cuda")}
"""Names that stand for several engines; every other one is an engine's own."""


class SelectionError(Exception):
    """What was declared cannot be had. The text is for whoever declared it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was declared for a model, or for the process. "" and None leave it open.

    Attributes:
        engine: of the engines' names, or of ALIASES. precision: of PRECISIONS.
        tolerance: largest difference from the reference, relative to an output's largest magnitude.
    """

    engine: str = ""
    precision: str = ""
    tolerance: float | None = None

    @classmethod
    def of(
        cls, *, engine: str, precision: str, tolerance: str, default_engine: str = "", default_precision: str = ""
    ) -> Wish:
        """From what the model says and, where it says nothing, the process. Raises SelectionError."""
        engine = engine or default_engine
        precision = (precision or default_precision).lower()
        if precision and precision not in PRECISIONS:
            raise SelectionError(f"precision {precision[:32]!r} is none of {', '.join(PRECISIONS)}")
        return cls(engine="" if engine == "auto" else engine, precision=precision, tolerance=parse_tolerance(tolerance))

    def allows(self, engine: str) -> bool:
        """Whether an engine may serve."""
        return not self.engine or engine == self.engine or engine in ALIASES.get(self.engine, ())


def parse_tolerance(text: str) -> float | None:
    """Read the parameter `mlmesh.tolerance`. Raises SelectionError."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise SelectionError(f"tolerance {text[:32]!r} is no number from 0 to 1")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An engine and the precision to ask it for."""

    engine: str
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """How one engine did.

    Attributes:
        precision: read back from it; what it was asked for where it was not built.
        accepted: whether it answers as the reference. chosen: whether it serves.
        error_max: largest absolute difference from the reference over all batches tried.
        batch_times: rows and the median time of a batch, in seconds, one at a time.
        loaded_times: the same while `instances` batches run at once, the lower quartile; empty where not measured.
    """

    engine: str
    precision: str
    reason: str
    accepted: bool = False
    chosen: bool = False
    error_max: float = 0.0
    batch_times: tuple[tuple[int, float], ...] = ()
    loaded_times: tuple[tuple[int, float], ...] = ()
    instances: int = 1

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "engine": self.engine,
            "precision": self.precision,
            "reason": self.reason,
            "accepted": self.accepted,
            "chosen": self.chosen,
            "error_max": self.error_max if math.isfinite(self.error_max) else 1e308,
            "batch_times": [list(pair) for pair in self.batch_times],
            "loaded_times": [list(pair) for pair in self.loaded_times],
            "instances": self.instances,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """Read `to_json`, which another process may have written. Raises KeyError, TypeError, ValueError."""
        return cls(
            engine=str(data["engine"])[:64],
            precision=str(data["precision"])[:32],
            reason=str(data["reason"])[:2000],
            accepted=bool(data["accepted"]),
            chosen=bool(data["chosen"]),
            error_max=float(data["error_max"]),
            batch_times=tuple((int(rows), float(seconds)) for rows, seconds in data["batch_times"]),
            loaded_times=tuple((int(rows), float(seconds)) for rows, seconds in data["loaded_times"]),
            instances=int(data["instances"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What to try, and what not, with the reason."""

    tried: tuple[Candidate, ...]
    passed_over: tuple[Trial, ...]


def candidates(kinds: Sequence[EngineKind], found: Mapping[str, Availability], wish: Wish) -> Candidates:
    """What to try of the engines there are, in their order. Raises SelectionError for an engine nobody knows.

    The reference is always among them, to compare with. It is in FP32 even where another precision is declared, because
    that is a permission: a model that is not faster, or not close enough, in BF16 is served in FP32.
    """
    if wish.engine and not any(wish.allows(kind.name) for kind in kinds):
        names = ", ".join(kind.name for kind in kinds)
        raise SelectionError(f"engine {wish.engine[:64]!r} is declared; there are {names}")
    tried: list[Candidate] = []
    passed: list[Trial] = []
    for kind in kinds:
        precision = "fp32" if kind.name == REFERENCE else wish.precision or "fp32"
        why = _passed_over(kind, found[kind.name], wish, precision)
        if why:
            passed.append(Trial(engine=kind.name, precision=precision, reason=why))
        else:
            tried.append(Candidate(engine=kind.name, precision=precision))
    return Candidates(tried=tuple(tried), passed_over=tuple(passed))


def _passed_over(kind: EngineKind, found: Availability, wish: Wish, precision: str) -> str:
    if not found.available:
        return found.reason or "it cannot run here"
    if kind.name == REFERENCE:
        return ""
    if not wish.allows(kind.name):
        return f"{wish.engine} is declared"
    if precision not in kind.precisions:
        return f"it does not compute in {precision}, which is declared"
    if getattr(kind, "declared_only", False) and wish.engine != kind.name:
        return "tried only where a model declares it: compiling takes long"
    return ""


def speed(trial: Trial, reference: Trial, rows_preferred: int) -> float | None:
    """How many times the reference's speed: geometric mean over the batches that come up, of one row to the usual.

    Under load, as many batches at once as will serve, where that was measured. None when they have no sizes in common.
    """
    loaded = bool(trial.loaded_times and reference.loaded_times)
    times = dict(trial.loaded_times if loaded else trial.batch_times)
    others = dict(reference.loaded_times if loaded else reference.batch_times)
    shared = [rows for rows in times if rows in others and rows <= rows_preferred]
    if not shared:
        return None
    return math.exp(sum(math.log(max(others[rows], 1e-9) / max(times[rows], 1e-9)) for rows in shared) / len(shared))


def choose(trials: Sequence[Trial], wish: Wish, rows_preferred: int) -> tuple[Trial, ...]:
    """The same trials, with one of them chosen and the reasons said. None is chosen when none is accepted.

    The fastest wins, by a margin over the reference. Where nothing was timed the first that is accepted wins.
    """
    allowed = [trial for trial in trials if trial.accepted and wish.allows(trial.engine)]
    if not allowed:
        return tuple(trials)
    reference = next((trial for trial in trials if trial.engine == REFERENCE and trial.accepted), None)
    speeds = {id(trial): speed(trial, reference, rows_preferred) if reference else None for trial in allowed}

    def rank(trial: Trial) -> float:
        known = speeds[id(trial)]
        if trial is reference:
            return MARGIN
        return known if known is not None else 0.0

    best = max(allowed, key=rank)
    return tuple(_told(trial, trial is best, wish, speeds.get(id(trial))) for trial in trials)


def _told(trial: Trial, chosen: bool, wish: Wish, times: float | None) -> Trial:
    if not trial.accepted:
        return trial
    parts = [trial.reason]
    if trial.engine != REFERENCE and times is not None:
        parts.append(f"{times:.2f} times as fast as {REFERENCE}")
    if chosen:
        parts.append(f"{wish.engine} is declared" if wish.engine else "the fastest that answers as it should")
    elif not wish.allows(trial.engine):
        parts.append(f"{wish.engine} is declared")
    elif times is not None and 1 <= times < MARGIN and trial.engine != REFERENCE:
        parts.append(f"a change takes {MARGIN}")
    return replace(trial, chosen=chosen, reason="; ".join(part for part in parts if part))


def chosen(trials: Sequence[Trial]) -> Trial | None:
    """The one that serves."""
    return next((trial for trial in trials if trial.chosen), None)


def why(trials: Sequence[Trial]) -> str:
    """One line a person reads: the winner's reason, and the others'."""
    winner = chosen(trials)
    others = "; ".join(f"{trial.engine} ({trial.precision}): {trial.reason}" for trial in trials if trial is not winner)
    first = winner.reason if winner else "no engine can serve it"
    return f"{first}; {others}" if others else first
