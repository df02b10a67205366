"""Which resource it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlmesh_local.resources.problems import At


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """Which resource it is, and where it was written. ``namespace`` is empty for kinds of the whole cluster.

    ``created`` is `creationTimestamp` ("2026-01-31T12:00:00Z"), empty for what has none: it is as old as its apply.
    """

    kind: str
    namespace: str
    name: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    at: At = field(compare=False)
    created: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"
