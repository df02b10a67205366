"""Which sampled requests get spans of their batch: TraceSetting's terms, for all models and for one.

A trace begins with the caller: what its trace context samples gets a server span. Of those, a model's `rate` takes one
in so many, and `count` how many more; level OFF takes none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from mlmesh_runtime.errors import InvalidInput, Unsupported

MODELS_MAX: Final = 1000
"""Most models with settings of their own."""
_NUMBER_MAX: Final = (1 << 32) - 1
_FIXED: Final = {"trace_mode": "opentelemetry", "trace_file": "", "log_frequency": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What is recorded: `on`; one in `rate` sampled requests; `count` more of them, -1 for no end."""

    on: bool = True
    rate: int = 1
    count: int = -1


@dataclass(slots=True)
class _Counters:
    """What was seen since the settings were made."""

    seen: int = 0
    recorded: int = 0


@dataclass(slots=True)
class _Own:
    """A model's own settings; what is None follows the settings of all."""

    on: bool | None = None
    rate: int | None = None
    count: int | None = None
    counters: _Counters = field(default_factory=_Counters)


class TraceSettings:
    """The settings of a process. Event loop only.

    Args:
        exporting: whether spans go anywhere at all: without that, the level is OFF and stays so.
    """

    def __init__(self, *, exporting: bool = True) -> None:
        self._exporting = exporting
        self._start = Sampling(on=exporting)
        self._all = self._start
        self._counters = _Counters()
        self._models: dict[str, _Own] = {}

    def admits(self, model: str) -> bool:
        """Whether a sampled request of a model gets spans of its batch; counts it."""
        own = self._models.get(model)
        sampling = self.sampling(model)
        counters = self._counters if own is None else own.counters
        if not sampling.on or counters.recorded == sampling.count:
            return False
        counters.seen += 1
        if (counters.seen - 1) % sampling.rate:
            return False
        counters.recorded += 1
        return True

    def sampling(self, model: str = "") -> Sampling:
        """What holds for a model, or for those without settings of their own."""
        own = self._models.get(model)
        if own is None:
            return self._all
        return Sampling(
            on=self._all.on if own.on is None else own.on,
            rate=self._all.rate if own.rate is None else own.rate,
            count=self._all.count if own.count is None else own.count,
        )

    def shown(self, model: str = "") -> dict[str, list[str]]:
        """The protocol's settings, as they hold."""
        sampling = self.sampling(model)
        own = self._models.get(model)
        recorded = (self._counters if own is None else own.counters).recorded
        left = sampling.count if sampling.count < 0 else max(0, sampling.count - recorded)
        return {
            "trace_level": ["TIMESTAMPS" if sampling.on else "OFF"],
            "trace_rate": [str(sampling.rate)],
            "trace_count": [str(left)],
            **{name: [value] for name, value in _FIXED.items()},
        }

    def update(self, model: str, settings: Mapping[str, Sequence[str]]) -> None:
        """Change settings, of a model or of all ("") ; an empty value goes back to those of all, or of the start.

        All or nothing. Raises InvalidInput, Unsupported for what cannot be set here.
        """
        read = {name: _read(name, values) for name, values in settings.items()}
        if read.get("trace_level") and not self._exporting:
            raise Unsupported("trace_level: this process exports no traces (OTEL_EXPORTER_OTLP_ENDPOINT)")
        changes = {_FIELDS[name]: value for name, value in read.items() if name in _FIELDS}
        if not changes:
            return
        if not model:
            back = {name: getattr(self._start, name) for name, value in changes.items() if value is None}
            self._all = replace(self._all, **{**changes, **back})
            self._counters = _Counters()
            return
        if model not in self._models and len(self._models) >= MODELS_MAX:
            raise InvalidInput(f"{MODELS_MAX} models have trace settings of their own already", field="model_name")
        own = self._models.setdefault(model, _Own())
        for name, value in changes.items():
            setattr(own, name, value)
        own.counters = _Counters()
        if own.on is own.rate is own.count is None:
            del self._models[model]


_FIELDS: Final = {"trace_level": "on", "trace_rate": "rate", "trace_count": "count"}


def _read(name: str, values: Sequence[str]) -> bool | int | None:
    """A setting's value; None to go back."""
    if name == "trace_file":
        raise Unsupported("trace file location can not be updated through network protocol")
    if name not in _FIELDS and name not in _FIXED:
        raise InvalidInput(f"unknown trace setting '{name[:64]}'", field=f"settings[{name[:64]}]")
    if not values:
        return None
    if name in _FIXED:
        if list(values) != [_FIXED[name]]:
            raise Unsupported(f"{name}: only '{_FIXED[name]}' is supported")
        return None
    if name == "trace_level":
        return _level(values)
    if len(values) != 1:
        raise InvalidInput(f"expect only 1 value for '{name}', got {len(values)}", field=f"settings[{name}]")
    return _number(name, values[0], lowest=-1 if name == "trace_count" else 1)


def _level(values: Sequence[str]) -> bool:
    for value in values:
        if value == "TENSORS":
            raise Unsupported("trace_level TENSORS is not supported: values of requests are in no trace")
        if value not in {"OFF", "TIMESTAMPS"}:
            raise InvalidInput(f"unknown trace level '{value[:64]}'", field="settings[trace_level]")
    return "TIMESTAMPS" in values


def _number(name: str, text: str, *, lowest: int) -> int:
    digits = text.removeprefix("-")
    number = int(text) if digits.isascii() and digits.isdigit() and len(digits) <= 10 else lowest - 1
    if not lowest <= number <= _NUMBER_MAX:
        raise InvalidInput(
            f"Unable to parse '{name}'. Expecting value >= {lowest}, got: {text[:32]}", field=f"settings[{name}]"
        )
    return number
