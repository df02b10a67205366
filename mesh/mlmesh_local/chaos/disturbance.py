"""What is done to connections, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from mlmesh_runtime.errors import InvalidInput

DELAY_MAX_S = 60.0


class Blackhole(Enum):
    """In which direction bytes vanish while connections stay open."""

    NONE = "none"
    REQUESTS = "requests"
    RESPONSES = "responses"
    BOTH = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What a fault proxy does to every connection through it, in each direction.

    Attributes:
        delay_s, jitter_s: every piece of data is late by ``delay_s`` and, at random, up to ``jitter_s`` more.
        bytes_per_s: bound of the rate of one connection; 0 for none.
        cut: new connections are refused, those there are reset.
        blackhole: bytes of a direction vanish; nothing is closed.
        corrupt: share of the pieces of data in which one bit is turned over, 0 to 1. Below TLS: the receiver notices
            and ends the connection.

    Raises InvalidInput that names the field.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: int = 0
    cut: bool = False
    blackhole: Blackhole = Blackhole.NONE
    corrupt: float = 0.0

    def __post_init__(self) -> None:
        for field, value in (("delay", self.delay_s), ("jitter", self.jitter_s)):
            if not 0 <= value <= DELAY_MAX_S:
                raise InvalidInput(f"{field} must be 0 to {DELAY_MAX_S:g} s, not {value:g} s", field=field)
        if self.bytes_per_s < 0:
            raise InvalidInput(f"must be 0 (no bound) or more, not {self.bytes_per_s}", field="bytes_per_second")
        if not 0 <= self.corrupt <= 1:
            raise InvalidInput(f"must be 0 to 100 %, not {self.corrupt * 100:g} %", field="corrupt_percent")

    def __str__(self) -> str:
        parts = []
        if self.cut:
            parts.append("cut")
        if self.delay_s or self.jitter_s:
            spread = f" to {(self.delay_s + self.jitter_s) * 1000:g}" if self.jitter_s else ""
            parts.append(f"delay {self.delay_s * 1000:g}{spread} ms")
        if self.bytes_per_s:
            parts.append(f"{self.bytes_per_s} bytes/s")
        if self.blackhole is not Blackhole.NONE:
            what = "requests and responses" if self.blackhole is Blackhole.BOTH else self.blackhole.value
            parts.append(f"{what} vanish")
        if self.corrupt:
            parts.append(f"corrupt {self.corrupt * 100:g} %")
        return ", ".join(parts) or "watched"
