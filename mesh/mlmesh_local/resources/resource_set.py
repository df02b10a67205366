"""The active resources: merged by kind, namespace and name, in the order of their first appearance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from mlmesh_local.resources.crosscheck import crosscheck
from mlmesh_local.resources.model import Spec
from mlmesh_local.resources.problems import did_you_mean
from mlmesh_runtime.errors import NotFound

S = TypeVar("S")
Key = tuple[str, str, str]

WORKLOAD_KINDS = frozenset({"Deployment", "Service", "ServiceAccount"})
"""Kubernetes kinds; applying with `prune` never removes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A validated resource: what it says, the plain values it was read from, and its text."""

    spec: Spec
    plain: Any = field(repr=False)
    text: str = field(repr=False, compare=False)

    @property
    def key(self) -> Key:
        """Kind, namespace and name."""
        meta = self.spec.meta
        return (meta.kind, meta.namespace, meta.name)

    @property
    def kind(self) -> str:
        """Kind, such as "VirtualService"."""
        return self.spec.meta.kind

    @property
    def name(self) -> str:
        """ "{namespace}/{name}"."""
        return f"{self.spec.meta.namespace}/{self.spec.meta.name}"

    @property
    def source(self) -> str:
        """File it came from."""
        return self.spec.meta.at.source


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What happened to one resource. ``name`` is "{namespace}/{name}"."""

    kind: str
    name: str
    action: Literal["created", "configured", "unchanged", "deleted", "missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """Outcome of an apply: the new set, what changed, and what a person should look at."""

    resources: ResourceSet
    changes: tuple[Change, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResourceSet:
    """Validated resources. Immutable; iteration is by first appearance, which is Istio's "oldest first"."""

    _resources: tuple[Resource, ...] = ()
    digest: str = field(default_factory=lambda: _digest(()))

    @classmethod
    def of(cls, resources: Iterable[Resource]) -> Self:
        """A set of resources with different keys."""
        items = tuple(resources)
        return cls(items, _digest(items))

    def __iter__(self) -> Iterator[Resource]:
        return iter(self._resources)

    def __len__(self) -> int:
        return len(self._resources)

    def specs(self, kind: type[S]) -> tuple[S, ...]:
        """What resources of a kind say, oldest first: ``resources.specs(Deployment)``."""
        return tuple(resource.spec for resource in self._resources if isinstance(resource.spec, kind))

    def listed(self, kind: str = "") -> tuple[Resource, ...]:
        """Resources (of a kind) in the order of kind, namespace and name."""
        return tuple(sorted((r for r in self._resources if kind in {"", r.kind}), key=lambda r: r.key))

    def apply(self, other: ResourceSet, *, prune: bool = False) -> Applied:
        """This set with the resources of another added or replaced; with `prune`, Istio resources not in it removed.

        Raises InvalidResource when the result does not fit together (see `crosscheck`); then nothing changed.
        """
        incoming = {resource.key: resource for resource in other}
        changes: list[Change] = []
        result: list[Resource] = []
        for old in self._resources:
            new = incoming.pop(old.key, None)
            if new is not None:
                same = new.plain == old.plain
                changes.append(Change(kind=new.kind, name=new.name, action="unchanged" if same else "configured"))
                result.append(new)
            elif prune and old.kind not in WORKLOAD_KINDS:
                changes.append(Change(kind=old.kind, name=old.name, action="deleted"))
            else:
                result.append(old)
        for new in incoming.values():
            changes.append(Change(kind=new.kind, name=new.name, action="created"))
            result.append(new)
        merged = ResourceSet.of(result)
        return Applied(resources=merged, changes=tuple(changes), warnings=crosscheck(merged))

    def without(self, names: Iterable[tuple[str, str]], *, allow_missing: bool = False) -> Applied:
        """This set without the resources of these kinds and names ("{namespace}/{name}").

        Raises NotFound (RESOURCE_NOT_FOUND) for one that is not there, InvalidResource when what is left does not fit
        together; then nothing changed.
        """
        wanted = list(dict.fromkeys(names))
        known = {(resource.kind, resource.name) for resource in self._resources}
        missing = [name for name in wanted if name not in known]
        if missing and not allow_missing:
            kind, name = missing[0]
            hint = did_you_mean(name, (other for known_kind, other in known if known_kind == kind))
            raise NotFound(f"there is no {kind} {name}{hint}", reason="RESOURCE_NOT_FOUND")
        left = ResourceSet.of(resource for resource in self._resources if (resource.kind, resource.name) not in wanted)
        changes = [
            Change(kind=kind, name=name, action="missing" if (kind, name) in missing else "deleted")
            for kind, name in wanted
        ]
        return Applied(resources=left, changes=tuple(changes), warnings=crosscheck(left))


def _digest(resources: tuple[Resource, ...]) -> str:
    content = json.dumps([resource.plain for resource in resources], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()
