"""What a person writes on a command line, as fields of a JobSpec. What was not said stays as it was."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlmesh.training.v1 import training_pb2 as pb
from mlmesh_cli.errors import usage_error

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate("KMGT", 1)},
    **{f"{unit}i": 1024**power for power, unit in enumerate("KMGT", 1)},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """Options of `mlmesh train` beside recipe, data and publication; None where nothing was said."""

    seed: int | None = None
    retries: int | None = None
    priority: int | None = None
    time_limit: str | None = None
    cpus: float | None = None
    memory: str | None = None
    gpus: int | None = None
    processes: int | None = None
    nodes: int | None = None
    strategy: str | None = None
    precision: str | None = None
    schedule: str | None = None
    warmup: float | None = None
    accumulate: int | None = None
    clip_norm: float | None = None
    early_stopping: int | None = None
    stop_metric: str | None = None
    checkpoint_steps: int | None = None
    best: bool | None = None
    labels: Sequence[str] = ()


def apply(spec: pb.JobSpec, wishes: Wishes) -> None:
    """Writes what was said into a spec. Raises CliError (exit code 2) for texts that mean nothing."""
    for field, value in (("seed", wishes.seed), ("retries_max", wishes.retries), ("priority", wishes.priority)):
        if value is not None:
            setattr(spec, field, value)
    if wishes.time_limit is not None:
        spec.time_limit.FromNanoseconds(round(seconds("--time-limit", wishes.time_limit) * 1e9))
    if wishes.cpus is not None:
        spec.resources.cpus = wishes.cpus
    if wishes.memory is not None:
        spec.resources.memory_bytes = quantity("--memory", wishes.memory)
    if wishes.gpus is not None:
        spec.resources.gpus = wishes.gpus
    if wishes.processes is not None:
        spec.distribution.processes = wishes.processes
    if wishes.nodes is not None:
        spec.distribution.nodes = wishes.nodes
    if wishes.strategy is not None:
        spec.distribution.strategy = pb.Strategy.Value(f"STRATEGY_{wishes.strategy.upper()}")
    _apply_fit(spec, wishes)
    spec.labels.update(pairs("--label", wishes.labels))


def _apply_fit(spec: pb.JobSpec, wishes: Wishes) -> None:
    if wishes.precision is not None:
        spec.fit.precision = pb.Precision.Value(f"PRECISION_{wishes.precision.upper()}")
    if wishes.schedule is not None:
        spec.fit.schedule = pb.Schedule.Value(f"SCHEDULE_{wishes.schedule.upper().replace('-', '_')}")
    for field, value in (
        ("warmup_share", wishes.warmup),
        ("accumulation_steps", wishes.accumulate),
        ("clip_norm", wishes.clip_norm),
        ("checkpoint_steps", wishes.checkpoint_steps),
        ("restore_best", wishes.best),
    ):
        if value is not None:
            setattr(spec.fit, field, value)
    if wishes.early_stopping is not None:
        spec.fit.early_stopping.patience = wishes.early_stopping
    if wishes.stop_metric is not None:
        spec.fit.early_stopping.metric = wishes.stop_metric


def seconds(option: str, text: str) -> float:
    """A length of time: "90", "90s", "15m", "2h", "1.5d". Raises CliError (exit code 2)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|d)?", text.strip())
    if found is None or not float(found[1]):
        raise usage_error(f"{option} wants a length of time, not {text!r}", f"such as {option} 90s or {option} 2h")
    return float(found[1]) * _SECONDS[found[2] or ""]


def quantity(option: str, text: str) -> int:
    """Bytes: "4Gi", "512M", "1000000"; a B at the end is allowed. Raises CliError (exit code 2)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", text.strip())
    if found is None:
        raise usage_error(f"{option} wants bytes, not {text!r}", f"such as {option} 4Gi or {option} 512M")
    return int(float(found[1]) * _BYTES[found[2] or ""])


def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Labels from "name=value" texts. Raises CliError (exit code 2)."""
    result = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise usage_error(f"{option} wants NAME=VALUE, not {text!r}", f"such as {option} team=vision")
        result[name.strip()] = value
    return result
