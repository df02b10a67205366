"""Reads a mapping field by field. What was not asked for is unknown and refused, so no table of names is kept.

Every read gives a usable value even when the field is wrong: the problem is noted and reading goes on, so that a person
sees all problems of a file at once.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Self

from mlmesh_local.resources.problems import At, Problems, did_you_mean
from mlmesh_local.resources.tree import Node

_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_HOST = re.compile(
    r"^(\*|(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*)\Z", re.IGNORECASE
)
_NAME = re.compile(r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?\Z")
UINT32_MAX = 2**32 - 1
INT32_MAX = 2**31 - 1


class Fields:
    """A mapping at a place. Use as a context manager: leaving it refuses every field that nobody asked for."""

    def __init__(self, node: Node, at: At, problems: Problems, *, quoted_numbers: bool = False) -> None:
        self.at = at
        # The schemas of custom resources refuse numbers in quotes; MeshConfig, which has none, takes them.
        self.quoted_numbers = quoted_numbers
        self.problems = problems
        self._asked: set[str] = set()
        self._unsupported: set[str] = set()
        self._values: dict[str, Node] = {}
        self._nulls: dict[str, Node] = {}
        if isinstance(node.value, dict):
            # null means absent, as in Kubernetes.
            self._values = {key: value for key, value in node.value.items() if value.value is not None}
            self._nulls = {key: value for key, value in node.value.items() if value.value is None}
        elif node.value is not None:
            problems.add(at, f"must be a mapping, not {node.kind()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.done()

    def done(self) -> None:
        """Refuse what nobody asked for."""
        for name, node in (*self._values.items(), *self._nulls.items()):
            if name not in self._asked:
                hint = did_you_mean(name, self._asked | self._unsupported)
                self.problems.add(self.place(name, node), f"unknown field{hint}")

    def place(self, name: str, node: Node | None = None) -> At:
        """Where a field is, or would be."""
        node = node or self._values.get(name)
        plain = re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None
        step = name if plain else f'["{name}"]'
        return self.at.field(step, node.line if node else None)

    def has(self, name: str) -> bool:
        """Whether the field is set. Does not count as asking for it."""
        return name in self._values

    def names(self) -> tuple[str, ...]:
        """Names of the fields that are set."""
        return tuple(self._values)

    def refuse(self, name: str, message: str) -> None:
        """Note a problem with a field."""
        self.problems.add(self.place(name), message)

    def unsupported(self, *names: str, why: str = "the laptop mesh does not support it") -> None:
        """Fields that Istio or Kubernetes know and this mesh refuses, by name."""
        for name in names:
            self._asked.add(name)
            self._unsupported.add(name)
            if name in self._values:
                self.refuse(name, f"not supported: {why}")

    def ignored(self, *names: str) -> None:
        """Fields that change nothing on a laptop."""
        self._asked.update(names)

    def required(self, name: str) -> bool:
        """Note a problem when the field is absent."""
        if name in self._values:
            return True
        self.problems.add(self.at, f'"{name}" is required')
        return False

    def one_of(self, *names: str, required: bool = False) -> str:
        """Name of the only one of these fields that is set, or empty. More than one is refused."""
        present = [name for name in names if name in self._values]
        self._asked.update(name for name in names if name in self._nulls)
        if len(present) > 1:
            self.refuse(present[1], f'cannot be set together with "{present[0]}"')
        elif not present and required:
            self.problems.add(self.at, "one of " + ", ".join(f'"{name}"' for name in names) + " is required")
        return present[0] if present else ""

    def _take(self, name: str) -> Node | None:
        self._asked.add(name)
        return self._values.get(name)

    def raw(self, name: str) -> Node | None:
        """The field as it is."""
        return self._take(name)

    # Scalars.

    def text(self, name: str, default: str = "", *, required: bool = False) -> str:
        """A string."""
        node = self._take(name)
        if node is None:
            if required:
                self.required(name)
            return default
        if isinstance(node.value, str):
            if required and not node.value:
                self.refuse(name, "must not be empty")
            return node.value
        self.refuse(name, f"must be a string, not {node.kind()}; quote it")
        return default

    def choice(self, name: str, choices: Iterable[str], default: str = "", *, unsupported: Iterable[str] = ()) -> str:
        """One of a few words."""
        value = self.text(name, default)
        known = tuple(choices)
        if value in unsupported:
            self.refuse(name, f'"{value}" is not supported by the laptop mesh; use one of {", ".join(known)}')
            return default
        if value not in known and name in self._values:
            hint = did_you_mean(value, known)
            self.refuse(name, f'"{value}" is not one of {", ".join(known)}{hint}')
            return default
        return value

    def name(self, name: str, *, required: bool = False) -> str:
        """A Kubernetes name."""
        value = self.text(name, required=required)
        if value and not _NAME.match(value):
            self.refuse(name, f'"{value}" is not a Kubernetes name')
        return value

    def host(self, name: str, *, required: bool = False) -> str:
        """A DNS name, possibly with a leading wildcard."""
        value = self.text(name, required=required)
        if value and not is_host(value):
            self.refuse(name, f'"{value}" is not a host name')
        return value.lower()

    def boolean(self, name: str, *, default: bool = False) -> bool:
        """true or false."""
        value = self.boolean_or_none(name)
        return default if value is None else value

    def boolean_or_none(self, name: str) -> bool | None:
        """true, false, or None when absent."""
        node = self._take(name)
        if node is None:
            return None
        if isinstance(node.value, bool):
            return node.value
        self.refuse(name, f"must be true or false, not {node.kind()}")
        return None

    def integer(self, name: str, *, low: int = 0, high: int = UINT32_MAX) -> int | None:
        """A whole number within bounds, or None when absent."""
        node = self._take(name)
        if node is None:
            return None
        value = _whole(node.value, quoted=self.quoted_numbers)
        if value is None:
            shown = f"{node.value:g}" if isinstance(node.value, float) else node.kind()
            self.refuse(name, f"must be a whole number, not {shown}")
            return None
        if not low <= value <= high:
            self.refuse(name, f"must be {_bounds(low, high)}, not {value}")
            return None
        return value

    def number(self, name: str, *, low: float, high: float) -> float | None:
        """A number within bounds, or None when absent."""
        node = self._take(name)
        if node is None:
            return None
        value = node.value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.refuse(name, f"must be a number, not {node.kind()}")
            return None
        if not low <= value <= high:
            self.refuse(name, f"must be {low:g} to {high:g}, not {value:g}")
            return None
        return float(value)

    def percent(self, name: str) -> float | None:
        """Istio's `Percent` message, `{value: 0.0 .. 100.0}`, or None when absent."""
        node = self._take(name)
        if node is None:
            return None
        if isinstance(node.value, int | float) and not isinstance(node.value, bool):
            self.refuse(name, f"must be a mapping; write {{value: {node.value:g}}}")
            return None
        with self.message(name) as inner:
            value = inner.number("value", low=0.0, high=100.0)
        # Istio's Percent has proto3 defaults: an empty message is 0 %.
        return 0.0 if value is None else value

    def port(self, name: str, *, required: bool = False) -> int:
        """A port number; 0 when absent."""
        value = self.integer(name, low=1, high=65535)
        if value is None and required and not self.has(name):
            self.required(name)
        return value or 0

    def duration_s(self, name: str, *, low_s: float = 0.001, high_s: float = 315_576_000_000.0) -> float | None:
        """A duration such as "300ms", "1h30m" or "5s", in seconds; None when absent. Istio takes 1 ms and more."""
        node = self._take(name)
        if node is None:
            return None
        seconds = parse_duration(node.value) if isinstance(node.value, str) else None
        if seconds is None:
            self.refuse(name, f'must be a duration such as "300ms", "5s" or "1h30m", not {_shown(node)}')
            return None
        if not low_s <= seconds <= high_s:
            bound = f"at least {low_s:g} s" if seconds < low_s else f"at most {high_s:g} s"
            self.refuse(name, f"must be {bound}, not {seconds:g} s")
            return None
        return seconds

    # Lists and mappings.

    def items(self, name: str) -> list[tuple[Node, At]]:
        """Items of a list, each with its place."""
        node = self._take(name)
        if node is None:
            return []
        if not isinstance(node.value, list):
            self.refuse(name, f"must be a list, not {node.kind()}")
            return []
        place = self.place(name, node)
        return [(item, place.field(f"[{index}]", item.line)) for index, item in enumerate(node.value)]

    def texts(self, name: str, check: Callable[[str], bool] | None = None, what: str = "a string") -> tuple[str, ...]:
        """A list of strings, each of which `check` accepts."""
        result: list[str] = []
        for item, at in self.items(name):
            if not isinstance(item.value, str):
                self.problems.add(at, f"must be a string, not {item.kind()}")
            elif not item.value or (check and not check(item.value)):
                self.problems.add(at, f'"{item.value}" is not {what}')
            else:
                result.append(item.value)
        return tuple(result)

    def messages(self, name: str) -> Iterator[Fields]:
        """A list of mappings."""
        for item, at in self.items(name):
            if item.value is None:
                self.problems.add(at, "must be a mapping, not null")
            yield Fields(item, at, self.problems, quoted_numbers=self.quoted_numbers)

    def message(self, name: str) -> Fields:
        """A mapping; an absent one reads as empty."""
        node = self._take(name)
        return Fields(
            node or Node(self.at.line, None),
            self.place(name, node),
            self.problems,
            quoted_numbers=self.quoted_numbers,
        )

    def text_map(self, name: str) -> Mapping[str, str]:
        """A mapping of strings, such as labels. Numbers and booleans are refused, as Kubernetes does."""
        result: dict[str, str] = {}
        for key, node, at in self.entries(name):
            if isinstance(node.value, str):
                result[key] = node.value
            else:
                self.problems.add(at, f"must be a string, not {node.kind()}; quote it")
        return result

    def entries(self, name: str) -> list[tuple[str, Node, At]]:
        """Entries of a mapping whose keys are free, each with its place."""
        inner = self.message(name)
        return [(key, inner._values[key], inner.place(key)) for key in inner._values]


def parse_duration(text: str) -> float | None:
    """Seconds of a Go duration ("1h30m", "0.5s", "0"), or None."""
    if text == "0":
        return 0.0
    position, seconds = 0, 0.0
    for match in _DURATION.finditer(text):
        if match.start() != position:
            return None
        seconds += float(match.group(1)) * _UNIT_S[match.group(2)]
        position = match.end()
    return seconds if position and position == len(text) else None


def is_host(text: str) -> bool:
    """Whether it is a DNS name, possibly with a leading wildcard."""
    return len(text) <= 253 and _HOST.match(text) is not None


def is_cidr(text: str) -> bool:
    """Whether it is an IP address or block."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True


def _whole(value: object, *, quoted: bool) -> int | None:
    """The number that a value is. ``80.0`` is one, as in JSON."""
    if isinstance(value, str) and quoted and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _bounds(low: int, high: int) -> str:
    return f"{low} or more" if high >= INT32_MAX else f"{low} to {high}"


def _shown(node: Node) -> str:
    if isinstance(node.value, str):
        return f'"{node.value}"'
    return f"{node.kind()} without a unit" if isinstance(node.value, int | float) else node.kind()
