"""When a call that failed is tried again: pure decisions, the caller waits.

Inference changes nothing on the server, so a request may be sent twice; a request of a sequence may not, and is tried
again only where the server said that it did not take it. The mesh tries again on its own where no server could be
reached at all; what is here is for what the mesh leaves: hints of the server, and callers without a mesh.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import Final

from mlmesh_client.errors import InferenceError

_SUCCESS_RATIO: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Bounds of retries.

    Attributes:
        attempts: of one call, the first included. 1 never tries again.
        first_s, most_s: the wait after the first failure, doubled with each further one, up to the most; of each wait
            a random part between nothing and all is waited. A server's hint is waited in full.
        budget: failures that a client may have more than a tenth of its successes before half of it is used up, and no
            call is tried again until calls succeed: when everything fails, retries are only load (gRPC's retry
            throttling, proposal A6).
    """

    attempts: int = 4
    first_s: float = 0.05
    most_s: float = 2.0
    budget: int = 20


class Retries:
    """One client's retries. Thread-safe.

    Args:
        policy: bounds. chance: spreads the waits.
    """

    def __init__(self, policy: RetryPolicy, chance: random.Random) -> None:
        self._policy, self._chance = policy, chance
        self._tokens = float(policy.budget)
        self._lock = threading.Lock()

    def succeeded(self) -> None:
        """A call went well."""
        if self._tokens < self._policy.budget:
            with self._lock:
                self._tokens = min(self._policy.budget, self._tokens + _SUCCESS_RATIO)

    def wait_s(self, error: InferenceError, attempt: int, *, left_s: float, repeatable: bool = True) -> float | None:
        """Seconds to wait before trying again; None to give up.

        Args:
            error: of the attempt, the first of which is number 1. left_s: until the call's deadline.
            repeatable: whether the request may reach a server twice.
        """
        if not _worth_it(error, repeatable=repeatable):
            return None
        with self._lock:
            self._tokens = max(0.0, self._tokens - 1)
            allowed = self._tokens > self._policy.budget / 2
        if not allowed or attempt >= self._policy.attempts:
            return None
        wait_s = self.backoff_s(attempt)
        if error.retry_after_s is not None:
            wait_s = error.retry_after_s + wait_s
        return wait_s if wait_s < left_s else None

    def backoff_s(self, attempt: int) -> float:
        """A random wait after that many failures."""
        most_s = min(self._policy.most_s, self._policy.first_s * 2 ** min(attempt - 1, 30))
        with self._lock:
            return self._chance.uniform(0, most_s)


def _worth_it(error: InferenceError, *, repeatable: bool) -> bool:
    if not error.retryable:
        return False
    if error.code == "RESOURCE_EXHAUSTED":
        # Refused before anything was done. Without a hint nobody knows that waiting helps.
        return error.retry_after_s is not None
    return repeatable and error.code == "UNAVAILABLE"
