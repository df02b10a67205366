"""How long to wait before a process is started again: pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Backoff:
    """Doubles from ``first_s`` to ``longest_s``; a run of at least ``healthy_s`` starts over.

    Kubernetes does the same with 10 s to 5 min and a reset after 10 min; on a laptop a person is waiting.
    """

    first_s: float = 0.1
    longest_s: float = 10.0
    healthy_s: float = 30.0
    failures: int = 0

    def next_delay_s(self, ran_s: float) -> float:
        """The pause after a run that lasted ``ran_s`` seconds."""
        if ran_s >= self.healthy_s:
            self.failures = 0
        # The exponent is bounded so that a process that failed for days does not overflow.
        delay_s = self.first_s * 2.0 ** min(self.failures, 32)
        self.failures += 1
        return min(delay_s, self.longest_s)
