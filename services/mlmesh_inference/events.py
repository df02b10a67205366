"""What a registry tells: versions published, aliases moved and deleted, and how far everything was told."""

from __future__ import annotations

from dataclasses import dataclass

from mlmesh_inference.desired import VersionRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A version was published. `record` is None when it cannot be served; `problem` says why."""

    revision: int
    record: VersionRecord | None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasMoved:
    """An alias points to a version from now on."""

    revision: int
    model: str
    alias: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AliasDeleted:
    """An alias is gone."""

    revision: int
    model: str
    alias: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bookmark:
    """Everything up to `revision` was told."""

    revision: int


Event = Published | AliasMoved | AliasDeleted | Bookmark
