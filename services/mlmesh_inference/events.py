"""What a registry tells: versions published, aliases moved and deleted, and how far everything was told."""

from __future__ import annotations

from dataclasses import dataclass

from mlmesh_inference.desired import VersionRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A version was published, its stage changed, or it is back. `record` is None when it cannot be served.

    `problem` then says why.
    """

    revision: int
    record: VersionRecord | None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """A version was deleted."""

    revision: int
    model: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A model was registered or changed. `servable` is whether its versions are models at all."""

    revision: int
    model: str
    servable: bool


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


Change = Published | Withdrawn | Named | AliasMoved | AliasDeleted
Event = Change | Bookmark
