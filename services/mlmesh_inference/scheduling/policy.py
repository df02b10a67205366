"""Bounds of one model version's queue and batches, in the terms of Triton's ModelDynamicBatching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from mlmesh_inference.serving import BatchingConfig, QueueConfig, ServingConfig
from mlmesh_runtime.errors import InvalidInput

_UNSAID: Final = QueueConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """Bounds of one model version.

    Attributes:
        batches: whether the first dimension is a free batch dimension; if not, every request runs alone.
        rows_max: most rows of one request and of one batch.
        rows_preferred: a batch takes no further request once it has this many rows.
        queue_items_max: requests of one priority level that may wait; a level's own bound may be smaller.
        delay_us: how long a free instance waits for `rows_preferred` rows to come together; 0 never waits.
        levels: priority levels; 1 is the most urgent, requests that name none of them get `level_default`.
        queue: bounds of a level that `queues` does not name.
        limiter: whether the number of requests inside is limited by latency (`limiter`).
        admission: whether a request that cannot be in time is refused on arrival (`pace`).
    """

    batches: bool = True
    rows_max: int = 64
    rows_preferred: int = 8
    queue_items_max: int = 256
    delay_us: int = 0
    levels: int = 1
    level_default: int = 1
    queue: QueueConfig = _UNSAID
    queues: Mapping[int, QueueConfig] = field(default_factory=dict)
    limiter: bool = True
    admission: bool = True

    def level(self, priority: int) -> int:
        """Level of a request: its priority where there is such a level, else the default (as Triton does)."""
        return priority if 0 < priority <= self.levels else self.level_default

    def items_max(self, level: int) -> int:
        """Requests of a level that may wait."""
        return min(self.queues.get(level, self.queue).items_max or self.queue_items_max, self.queue_items_max)

    def timeout_ns(self, level: int, asked_us: int) -> int:
        """Longest wait of a request of a level that asks for `asked_us`; 0 for no bound.

        As in Triton a request may shorten the wait that the level grants, never prolong it, and only where the level
        lets it. Unlike Triton, a level that grants any wait lets a request name one.
        """
        queue = self.queues.get(level, self.queue)
        if asked_us and queue.timeout_override:
            return 1000 * (min(asked_us, queue.timeout_us) if queue.timeout_us else asked_us)
        return 1000 * queue.timeout_us


def policy_of(
    config: ServingConfig,
    *,
    batches: bool,
    rows_max: int,
    rows_preferred: int,
    queue_items_max: int,
    limiter: bool = True,
) -> BatchPolicy:
    """Bounds of a model version: those given, and what its configuration says of waiting, levels and queues.

    Args:
        config: of the version. The other arguments are those of `BatchPolicy`, the configuration's word on rows
            included. A queue may be shorter than the process's, never longer.
    """
    batching = config.batching or BatchingConfig()
    levels = max(batching.priorities, 1)
    return BatchPolicy(
        batches=batches,
        rows_max=rows_max,
        rows_preferred=min(rows_preferred, rows_max),
        queue_items_max=queue_items_max,
        delay_us=batching.delay_us,
        levels=levels,
        level_default=batching.priority_default or levels,
        queue=batching.queue,
        queues=batching.queues,
        limiter=limiter,
    )


def check_rows(rows: int, policy: BatchPolicy, *, model: str) -> None:
    """Refuse a request with more rows than a batch may have."""
    if rows > policy.rows_max:
        raise InvalidInput(
            f"inference request batch-size must be <= {policy.rows_max} for '{model}', got {rows}",
            field="inputs",
            reason="SHAPE_MISMATCH",
        )
