"""What translation sees of a world and of a proxy while it is noted what it reads: see `mlmesh_local.incremental`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, ItemsView, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from mlmesh_local.model import ProxyNode

if TYPE_CHECKING:
    from mlmesh_local.incremental import Memory

SELF: Final = "<proxy>"
OWN_LABELS: Final = "<its labels>"

Read = tuple[Hashable, ...]
"""What was read: its owner ("view", "world", "resources", "proxy", "labels"), a name, and arguments of a method."""


class Same:
    """An argument that has no hash, by identity; it stays alive with the note."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and (self.value is other.value or bool(self.value == other.value))


class _Tracked:
    """Something whose attributes are noted when they are read. Its own have names that nothing tracked has."""

    tracked_owner = ""

    def __init__(self, memory: Memory, target: Any, proxy: ProxyNode) -> None:
        self.tracked_memory = memory
        self.tracked_target = target
        self.tracked_proxy = proxy

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.tracked_target, name)
        if callable(value) and not isinstance(value, type):
            question = _Question(self, name)
            self.__dict__[name] = question
            return question
        value = self.tracked_memory.settle(value)
        self.tracked_memory.note((self.tracked_owner, name), value, own=self.tracked_owner == "proxy")
        return value


class _Question:
    """A method whose answers are noted with their arguments."""

    __slots__ = ("_about", "_name")

    def __init__(self, about: _Tracked, name: str) -> None:
        self._about = about
        self._name = name

    def __call__(self, *positional: Any, **named: Any) -> Any:
        about = self._about
        arguments = tuple(map(_key, positional))
        more = tuple((name, _key(value)) for name, value in sorted(named.items()))
        read: Read = (about.tracked_owner, self._name, arguments, more)
        given = [*arguments, *(value for _, value in more)]
        own = about.tracked_owner in ("proxy", "labels") or any(item is SELF or item is OWN_LABELS for item in given)
        value = about.tracked_memory.answer(read, about.tracked_proxy if own else None)
        about.tracked_memory.note(read, value, own=own)
        return value


def _key(value: Any) -> Hashable:
    if isinstance(value, TrackedProxy):
        return SELF
    if isinstance(value, _Labels):
        return OWN_LABELS
    if isinstance(value, _Tracked):
        raise TypeError(f"{type(value.tracked_target).__name__} is not to be handed to a view")
    try:
        hash(value)
    except TypeError:
        return Same(value)
    return cast("Hashable", value)


class TrackedView(_Tracked):
    tracked_owner = "view"

    @property
    def world(self) -> Any:
        return _World(self.tracked_memory, self.tracked_target.world, self.tracked_proxy)

    @property
    def resources(self) -> Any:
        return _Resources(self.tracked_memory, self.tracked_target.resources, self.tracked_proxy)

    def part(self, key: Hashable, make: Callable[[], Any], *given: Any) -> Any:
        return self.tracked_memory.part(key, make, given, self.tracked_proxy)


class _World(_Tracked):
    tracked_owner = "world"

    @property
    def resources(self) -> Any:
        tracked = _Resources(self.tracked_memory, self.tracked_target.resources, self.tracked_proxy)
        tracked.tracked_owner = "world.resources"
        return tracked


class _Resources(_Tracked):
    tracked_owner = "resources"

    def __iter__(self) -> Iterator[Any]:
        content = tuple(self.tracked_target)
        self.tracked_memory.note((self.tracked_owner, "digest"), self.tracked_target.digest, own=False)
        return iter(content)

    def __len__(self) -> int:
        self.tracked_memory.note((self.tracked_owner, "digest"), self.tracked_target.digest, own=False)
        return len(self.tracked_target)


class TrackedProxy(_Tracked):
    tracked_owner = "proxy"

    def __init__(self, memory: Memory, target: ProxyNode) -> None:
        super().__init__(memory, target, target)

    @property
    def labels(self) -> Any:
        return _Labels(self.tracked_memory, self.tracked_target)


class _LabelItems(ItemsView[str, str]):
    """So that "has it these labels" reads these labels only: ``selector.items() <= labels.items()``."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        super().__init__(labels)
        self._labels = labels

    def __ge__(self, other: Any) -> bool:
        return all(self._labels.get(key) == value for key, value in other)


class _Labels(Mapping[str, str]):
    """Labels of the proxy: most of what reads them asks for one or two, and proxies differ in others."""

    def __init__(self, memory: Memory, proxy: ProxyNode) -> None:
        self.tracked_memory = memory
        self.tracked_proxy = proxy

    def get(self, key: str, default: Any = None) -> Any:
        value = self.tracked_proxy.labels.get(key)
        self.tracked_memory.note(("labels", "get", (key,), ()), value, own=True)
        return default if value is None else value

    def __getitem__(self, key: str) -> str:
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return str(value)

    def __contains__(self, key: object) -> bool:
        return self.get(str(key)) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def items(self) -> ItemsView[str, str]:
        return _LabelItems(self)

    def _all(self) -> Mapping[str, str]:
        self.tracked_memory.note(("proxy", "labels"), self.tracked_proxy.labels, own=True)
        return self.tracked_proxy.labels
