"""What EnvoyFilter says, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlmesh_local.resources.meta import Meta

PatchContext = Literal["ANY", "SIDECAR_INBOUND", "SIDECAR_OUTBOUND", "GATEWAY"]
PatchOperation = Literal["INSERT_FIRST", "INSERT_BEFORE", "INSERT_AFTER"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterPatch:
    """One more HTTP filter.

    ``port`` 0 is every listener of the context. ``sub_filter`` is what it is put before or after: without one, before
    is before all and after is after all but the router, which is always the last.
    """

    context: PatchContext
    port: int
    operation: PatchOperation
    sub_filter: str
    value: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoyFilter:
    """HTTP filters for the proxies that the selector selects; in the root namespace, for those of all namespaces."""

    meta: Meta
    selector: Mapping[str, str]
    priority: int
    patches: tuple[FilterPatch, ...]
