"""Durations in proto-JSON and in gRPC's headers, in seconds."""

from __future__ import annotations

_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


def seconds(value: object) -> float | None:
    """A Duration ("0.5s"), None where there is none."""
    if value in (None, ""):
        return None
    return float(str(value).removesuffix("s"))


def grpc_timeout(text: str) -> float | None:
    """A grpc-timeout header ("200m" is 0.2 s), None where it is none."""
    number, unit = text[:-1], text[-1:]
    return int(number) * _UNITS[unit] if number.isdigit() and unit in _UNITS else None


def number(value: object, default: int = 0) -> int:
    """An integer or a wrapped one."""
    if isinstance(value, dict):
        value = value.get("value")
    return default if value is None else int(float(str(value)))


def text(value_s: float) -> str:
    """Seconds for a person: "300 ms", "1.5 s"."""
    return f"{value_s * 1000:g} ms" if value_s < 1 else f"{value_s:g} s"
