"""Kubernetes objects with their resource versions, and the changes that watches follow. Knows no network."""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Object = dict[str, Any]
"""A Kubernetes object as JSON."""

HISTORY_MAX = 20_000
"""Changes that are kept; who watches from further back lists again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A resource of the API, such as "pods" of the core group, which is empty."""

    group: str
    plural: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A change of one object."""

    version: int
    resource: Resource
    action: Literal["ADDED", "MODIFIED", "DELETED"]
    object: Object


_Key = tuple[str, str]


class ExpiredError(Exception):
    """The history does not reach back to the version asked for."""


class ClosedError(Exception):
    """Nothing changes any more."""


class Store:
    """All objects. Use it from one event loop."""

    def __init__(self) -> None:
        self.version = 1
        self._objects: dict[Resource, dict[_Key, Object]] = {}
        self._events: deque[Event] = deque(maxlen=HISTORY_MAX)
        self._changed = asyncio.Event()
        self._closed = False

    def close(self) -> None:
        """End every wait."""
        self._closed = True
        self._changed.set()

    def all(self, resource: Resource) -> list[Object]:
        """Objects of a resource, by namespace and name."""
        found = self._objects.get(resource, {})
        return [found[key] for key in sorted(found)]

    def get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """One object."""
        return self._objects.get(resource, {}).get((namespace, name))

    def put(self, resource: Resource, item: Mapping[str, Any]) -> Object:
        """Create or replace an object; an equal one changes nothing."""
        found = self._objects.setdefault(resource, {})
        made = copy.deepcopy(dict(item))
        metadata = made.setdefault("metadata", {})
        key = (str(metadata.get("namespace", "")), str(metadata["name"]))
        old = found.get(key)
        metadata["uid"] = metadata.get("uid") or (old or {}).get("metadata", {}).get("uid") or _uid(resource, key)
        if old is not None:
            metadata["resourceVersion"] = old["metadata"]["resourceVersion"]
            metadata["generation"] = old["metadata"]["generation"]
            if "creationTimestamp" in old["metadata"]:
                metadata.setdefault("creationTimestamp", old["metadata"]["creationTimestamp"])
            if made == old:
                return old
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        same = old is not None and made.get("spec") == old.get("spec")
        metadata["generation"] = old["metadata"]["generation"] + (not same) if old is not None else 1
        found[key] = made
        self._note(resource, "ADDED" if old is None else "MODIFIED", made)
        return made

    def delete(self, resource: Resource, namespace: str, name: str) -> None:
        """Remove an object if it is there."""
        old = self._objects.get(resource, {}).pop((namespace, name), None)
        if old is None:
            return
        self.version += 1
        gone = copy.deepcopy(old)
        gone["metadata"]["resourceVersion"] = str(self.version)
        self._note(resource, "DELETED", gone)

    def replace(self, wanted: Mapping[Resource, Iterable[Mapping[str, Any]]], owned: Iterable[Resource]) -> None:
        """Make the objects of the owned resources exactly those wanted, with as few changes as possible."""
        for resource in owned:
            items = list(wanted.get(resource, ()))
            keys = {(str(i["metadata"].get("namespace", "")), str(i["metadata"]["name"])) for i in items}
            for key in sorted(self._objects.get(resource, {}).keys() - keys):
                self.delete(resource, *key)
            for item in items:
                self.put(resource, item)

    def since(self, version: int) -> list[Event]:
        """Changes after a version. Raises ExpiredError."""
        if self._events and version < self._events[0].version - 1 and len(self._events) == HISTORY_MAX:
            raise ExpiredError
        return [event for event in self._events if event.version > version]

    async def beyond(self, version: int) -> None:
        """Wait until there is a newer version. Raises ClosedError."""
        while self.version <= version:
            await self._changed.wait()
            if self._closed:
                raise ClosedError

    def _note(self, resource: Resource, action: Literal["ADDED", "MODIFIED", "DELETED"], item: Object) -> None:
        self._events.append(Event(version=self.version, resource=resource, action=action, object=item))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _uid(resource: Resource, key: _Key) -> str:
    return ".".join(part for part in (resource.plural, resource.group, *key) if part)
