"""How large batches should be and how many instances there should be, decided by what was measured at warm-up.

The reason says what was seen, for whoever wonders why a model does not batch:

    8 rows: 1.7x the throughput of 1; 16 adds 2 %
    1 row: batching loses, 8 rows give 0.9x the throughput
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

WORTH: Final = 1.05
"""More rows, or more instances, are chosen when they bring at least this much: less is within the noise of measuring,
and costs latency or memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What was decided.

    Attributes:
        rows: at which a batch is full; 1 means that batching does not pay.
        instances: engine runs at once.
        reason: why, for a person.
        seconds: median time of a batch by its rows, with that many instances at work; for `Batcher`.
    """

    rows: int
    instances: int
    reason: str
    seconds: Mapping[int, float]


def decide(measured: Mapping[int, Mapping[int, float]], *, latency_max_s: float = 0.0) -> Tuning:
    """Choose rows and instances.

    Args:
        measured: by instances: median seconds of a batch by its rows, while that many instances run at the same time.
            At least one of each; engines without a batch dimension measure one row.
        latency_max_s: batches that take longer are not considered (one row always is); 0 sets no bound.

    Raises ValueError when nothing was measured, or a time is not above 0.
    """
    choices: dict[int, tuple[int, float]] = {}
    for instances, seconds in measured.items():
        if instances < 1 or not seconds or any(rows < 1 or time <= 0 for rows, time in seconds.items()):
            raise ValueError(f"expected times above 0 of batches of 1 row and more; got {dict(seconds)}")
        choices[instances] = _rows(seconds, latency_max_s)
    if not choices:
        raise ValueError("expected measurements of at least one number of instances; got none")
    best: int | None = None
    for instances in sorted(choices):
        if best is None or instances * choices[instances][1] >= best * choices[best][1] * WORTH:
            best = instances
    assert best is not None  # noqa: S101  there is a choice
    rows = choices[best][0]
    reason = _reason(measured[best], rows)
    if len(choices) > 1:
        reason += "; " + _instances_reason(choices, best)
    return Tuning(rows=rows, instances=best, reason=reason, seconds=dict(measured[best]))


def _rows(seconds: Mapping[int, float], latency_max_s: float) -> tuple[int, float]:
    """The fewest rows that come close to the best throughput, and rows a second of one instance with them."""
    least = min(seconds)
    allowed = {rows: rows / time for rows, time in seconds.items() if rows == least or not 0 < latency_max_s < time}
    most = max(allowed.values())
    rows = min(rows for rows, rate in allowed.items() if rate * WORTH >= most)
    return rows, allowed[rows]


def _reason(seconds: Mapping[int, float], rows: int) -> str:
    least = min(seconds)
    rates = {size: size / time for size, time in seconds.items()}
    larger = sorted(size for size in rates if size > rows)
    named = f"{rows} row{'s' if rows > 1 else ''}"
    if len(rates) == 1:
        return f"{named}: nothing else was measured"
    if rows == least:
        size = max(larger, key=lambda one: rates[one])
        gain = rates[size] / rates[rows]
        verdict = "batching loses" if gain < 1 else "batching does not pay"
        return f"{named}: {verdict}, {size} rows give {gain:.1f}x the throughput"
    text = f"{named}: {rates[rows] / rates[least]:.1f}x the throughput of {least}"
    if larger:
        gain = rates[larger[0]] / rates[rows] - 1
        text += f"; {larger[0]} adds {gain:.0%}" if gain >= 0 else f"; {larger[0]} loses {-gain:.0%}"
    return text.replace("%", " %")


def _instances_reason(choices: Mapping[int, tuple[int, float]], best: int) -> str:
    rates = {instances: instances * rate for instances, (_, rate) in choices.items()}
    others = ", ".join(f"{count}: {rates[count] / rates[best]:.2f}x" for count in sorted(rates) if count != best)
    return f"{best} instance{'s' if best > 1 else ''} (of {others})"
