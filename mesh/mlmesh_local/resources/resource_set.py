"""The active resources: merged by kind, namespace and name, in the order of their first appearance."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from mlmesh_local.resources.crosscheck import crosscheck
from mlmesh_local.resources.model import Spec
from mlmesh_local.resources.problems import did_you_mean
from mlmesh_runtime.errors import NotFound

S = TypeVar("S")
Key = tuple[str, str, str]
Age = tuple[bool, str, int, str, str]

WORKLOAD_KINDS = frozenset({"Deployment", "Pod", "Service", "ServiceAccount", "StatefulSet"})
"""Kubernetes kinds; applying with `prune` never removes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A validated resource: what it says, the plain values it was read from, and its text."""

    spec: Spec
    plain: Any = field(repr=False)
    text: str = field(repr=False, compare=False)
    born: int = 0
    """Which apply brought it: resources of one apply are of one age."""

    @property
    def age(self) -> Age:
        """Sorts by age, the oldest first; those of one age by name and namespace, as Istio does."""
        meta = self.spec.meta
        # What has no time of creation is created by the apply that brings it: after all that have one.
        return (not meta.created, meta.created, self.born, meta.name, meta.namespace)

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
    """Validated resources. Immutable; iteration is by first appearance."""

    _resources: tuple[Resource, ...] = ()
    digest: str = field(default_factory=lambda: _digest((), ()))
    _by_kind: Mapping[type, tuple[Resource, ...]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, resources: Iterable[Resource]) -> Self:
        """A set of resources with different keys."""
        items = tuple(resources)
        by_age = sorted(items, key=lambda resource: resource.age)
        by_kind: dict[type, list[Resource]] = {}
        for ordered, workloads in ((items, True), (by_age, False)):
            for resource in ordered:
                if (resource.kind in WORKLOAD_KINDS) is workloads:
                    by_kind.setdefault(type(resource.spec), []).append(resource)
        return cls(items, _digest(items, by_age), {kind: tuple(found) for kind, found in by_kind.items()})

    def __iter__(self) -> Iterator[Resource]:
        return iter(self._resources)

    def __len__(self) -> int:
        return len(self._resources)

    def specs(self, kind: type[S]) -> tuple[S, ...]:
        """What resources of a kind say: Kubernetes' workloads by first appearance, others the oldest first."""
        return tuple(resource.spec for resource in self.of_kind(kind) if isinstance(resource.spec, kind))

    def of_kind(self, kind: type[S]) -> tuple[Resource, ...]:
        """Resources of a kind, in the order of `specs`."""
        return self._by_kind.get(kind, ())

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
        born = max((resource.born for resource in self._resources), default=-1) + 1
        for old in self._resources:
            new = incoming.pop(old.key, None)
            if new is not None:
                same = new.plain == old.plain
                changes.append(Change(kind=new.kind, name=new.name, action="unchanged" if same else "configured"))
                result.append(dataclasses.replace(new, born=old.born))
            elif prune and old.kind not in WORKLOAD_KINDS:
                changes.append(Change(kind=old.kind, name=old.name, action="deleted"))
            else:
                result.append(old)
        for new in incoming.values():
            changes.append(Change(kind=new.kind, name=new.name, action="created"))
            result.append(dataclasses.replace(new, born=born))
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


def _digest(resources: Sequence[Resource], by_age: Sequence[Resource]) -> str:
    plain = [resource.plain for resource in resources]
    # Age decides between resources that say different things of one host.
    content = json.dumps([plain, [resource.key for resource in by_age]], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()
