"""Look-ups that stay fast with thousands of resources: hosts by pattern, labelled things by selector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Generic, TypeVar

V = TypeVar("V")


class HostIndex(Generic[V]):
    """Values by host; a host may be a wildcard, "*" and a suffix."""

    def __init__(self, values: Mapping[str, V]) -> None:
        self._values = values
        self._wild = any(host.startswith("*") for host in values)

    def __bool__(self) -> bool:
        return bool(self._values)

    def best(self, host: str) -> tuple[str, V] | None:
        """The most specific host that covers a host, with its value: itself, else the longest wildcard."""
        if host in self._values:
            return host, self._values[host]
        if self._wild:
            rest = host.removeprefix("*")
            # Wildcards that cover one host are suffixes of it: no two are equally long.
            for start in range(len(rest) + 1):
                pattern = "*" + rest[start:]
                if pattern in self._values:
                    return pattern, self._values[pattern]
        return None


class LabelIndex(Generic[V]):
    """Things of namespaces by their labels, in the order in which they were given."""

    def __init__(self, things: Iterable[tuple[str, Mapping[str, str], V]]) -> None:
        self._all: dict[str, list[tuple[int, Mapping[str, str], V]]] = {}
        self._by_label: dict[tuple[str, str, str], list[tuple[int, Mapping[str, str], V]]] = {}
        for number, (namespace, labels, thing) in enumerate(things):
            entry = (number, labels, thing)
            self._all.setdefault(namespace, []).append(entry)
            for key, value in labels.items():
                self._by_label.setdefault((namespace, key, value), []).append(entry)

    def select(self, namespace: str, selector: Mapping[str, str]) -> list[V]:
        """Things of a namespace that have everything that a selector asks for; an empty one asks for nothing."""
        candidates = self._all.get(namespace, [])
        for key, value in selector.items():
            narrower = self._by_label.get((namespace, key, value), [])
            if len(narrower) < len(candidates):
                candidates = narrower
        wanted = selector.items()
        return [thing for _, labels, thing in candidates if wanted <= labels.items()]
