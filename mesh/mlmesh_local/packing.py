"""Resources as Envoy's bytes, each packed once: what was translated to the same object is packed to the same object.

A route configuration is a list of virtual hosts. Serialized, a list is its entries one after the other, so virtual
hosts are packed one by one and joined; of a thousand hosts only the one that changed is packed again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from mlmesh_local.envoy_types import ROUTES, Json, build_bytes, canonical

T = TypeVar("T")

VIRTUAL_HOST: Final = "type.googleapis.com/envoy.config.route.v3.VirtualHost"
# RouteConfiguration.virtual_hosts: field 2, length-delimited.
_VIRTUAL_HOSTS_TAG: Final = b"\x12"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One Envoy resource: its bytes and a version that changes when they do."""

    name: str
    version: str
    content: bytes = field(repr=False)


Named = Mapping[str, Packed]


def version_of(content: bytes) -> str:
    """16 hex digits that change with the content."""
    return hashlib.sha256(content).hexdigest()[:16]


class Kept(Generic[T]):
    """Values made of objects, by identity of the object."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], tuple[object, T]] = {}

    def __len__(self) -> int:
        return len(self._made)

    def get(self, kind: str, source: object) -> T | None:
        """What was made of an object."""
        found = self._made.get((kind, id(source)))
        return found[1] if found else None

    def put(self, kind: str, source: object, value: T) -> T:
        """Keep what was made of an object; the object stays alive with it, so that nothing else gets its identity."""
        self._made[kind, id(source)] = (source, value)
        return value

    def retain(self, alive: Collection[int]) -> None:
        """Forget what was made of objects that are not among these identities."""
        self._made = {key: found for key, found in self._made.items() if key[1] in alive}


class Packer:
    """Packs, and keeps what it has packed."""

    def __init__(self) -> None:
        self._resources: Kept[Packed] = Kept()
        self._parts: Kept[bytes] = Kept()
        self._equal: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._resources) + len(self._parts)

    def retain(self, alive: Collection[int]) -> None:
        """Forget what was packed of objects that are not among these identities."""
        self._resources.retain(alive)
        self._parts.retain(alive)
        self._equal.clear()

    def pack(self, type_url: str, name: str, value: Json) -> Packed:
        """One resource. Raises InvalidMessageError."""
        found = self._resources.get(type_url, value)
        if found is None:
            content = self._routes(value) if type_url == ROUTES else self._bytes(type_url, value)
            found = Packed(name=name, version=version_of(content), content=content)
            self._resources.put(type_url, value, found)
        return found

    def _routes(self, value: Json) -> bytes:
        parts = [self._bytes(ROUTES, {key: item for key, item in value.items() if key != "virtual_hosts"})]
        for host in value.get("virtual_hosts", ()):
            content = self._parts.get(VIRTUAL_HOST, host)
            if content is None:
                content = self._parts.put(VIRTUAL_HOST, host, self._bytes(VIRTUAL_HOST, host))
            parts.append(_VIRTUAL_HOSTS_TAG + _varint(len(content)) + content)
        return b"".join(parts)

    def _bytes(self, type_url: str, value: Json) -> bytes:
        # Proxies are told much that is equal without being the same.
        key = hashlib.sha256(f"{type_url}{canonical(value)}".encode()).digest()
        content = self._equal.get(key)
        if content is None:
            content = self._equal[key] = build_bytes(type_url, value)
        return content


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def find(value: Any, key: str) -> Iterator[Any]:
    """Values of a key, wherever it is."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            else:
                yield from find(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from find(inner, key)
