"""Translation that does again only what its inputs ask for.

Translation is pure: what it makes of a `View` and a proxy depends on what it reads of them. So reads are noted while it
runs. When the world has changed, what was made is still right if everything that was read then reads the same now. That
needs no list of which section depends on what, and cannot be forgotten when translation learns something new.

    memory = Memory()
    memory.turn(view)                                    # a new world
    configuration = memory.translate(proxy)              # reused, or made

`View.part` divides the work further: a part is reused on its own, by other proxies too if they would read the same.
Values that translation gives are shared from then on: nobody changes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from mlmesh_local.model import ProxyNode, World
from mlmesh_local.translate import SECTIONS, Configuration, View

SELF: Final = "<proxy>"
KEPT_TURNS = 3
"""Worlds after which what was no longer asked for may be forgotten: a refused change comes back to the world before."""
HISTORY_TURNS = 256
FORGET_FROM = 20_000
LARGE = 16

_POLICIES: Final = frozenset(
    {"AuthorizationPolicy", "RequestAuthentication", "Telemetry", "EnvoyFilter", "ServiceAccount"}
)
_BESIDE: Final = _POLICIES | {"PeerAuthentication", "endpoints", "proxies"}
UNRELATED: Final[Mapping[str, frozenset[str]]] = {
    "services": _BESIDE | {"DestinationRule", "VirtualService", "Gateway"},
    "services_seen_by": _BESIDE | {"DestinationRule", "Gateway"},
    "service_seen_by": _BESIDE | {"DestinationRule", "Gateway"},
    "services_by_age": _BESIDE | {"DestinationRule", "VirtualService", "Gateway"},
    "destination": _BESIDE | {"DestinationRule", "Gateway"},
    "policy": _BESIDE | {"VirtualService", "Gateway"},
    "traffic_policy": _BESIDE | {"VirtualService", "Gateway"},
    "endpoints": _POLICIES | {"DestinationRule", "VirtualService", "Gateway", "PeerAuthentication"},
    "all_endpoints": _POLICIES | {"DestinationRule", "VirtualService", "Gateway", "PeerAuthentication"},
    "identities": _BESIDE - {"ServiceAccount"} | {"DestinationRule", "VirtualService", "Gateway"},
    "mtls_mode": _POLICIES | {"DestinationRule", "VirtualService", "Gateway", "endpoints", "proxies"},
    "virtual_services": _BESIDE | {"DestinationRule", "Gateway"},
    "mesh_config": _BESIDE | {"DestinationRule", "VirtualService", "Gateway"},
    "settings": _BESIDE | {"DestinationRule", "VirtualService", "Gateway"},
    "root_namespace": _BESIDE | {"DestinationRule", "VirtualService", "Gateway"},
    "trust_domain": _BESIDE | {"DestinationRule", "VirtualService", "Gateway"},
    "trust_domains": _BESIDE | {"DestinationRule", "VirtualService", "Gateway"},
    "auto_mtls": _BESIDE | {"DestinationRule", "VirtualService", "Gateway"},
    "telemetry": frozenset(
        {
            "VirtualService",
            "DestinationRule",
            "Gateway",
            "AuthorizationPolicy",
            "PeerAuthentication",
            "endpoints",
            "proxies",
        }
    ),
}
"""What questions to a view do not depend on: kinds, "endpoints" or "proxies" of the world. They are then not asked
again. What is not named here is asked again whenever anything has changed; that costs time and is never wrong."""

Read = tuple[Hashable, ...]
Changes = frozenset[str] | None
"""Kinds whose resources differ, "endpoints", "proxies"; None where more than that differs."""


class _Same:
    """An argument that has no hash, by identity; it stays alive with the note."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (self.value is other.value or bool(self.value == other.value))


@dataclass(slots=True, eq=False)
class _Made:
    """Something made, what was read for it, and the parts that it consists of."""

    given: tuple[Any, ...]
    value: Any = None
    reads: dict[Read, Any] = field(default_factory=dict)
    """Answers by owner, name and arguments; those that depend on the proxy are apart."""
    own_reads: dict[Read, Any] = field(default_factory=dict)
    parts: list[_Made] = field(default_factory=list)
    tags: frozenset[tuple[str, str]] = frozenset()
    """Owner and name of everything that was read, in parts, too."""
    right_at: int = 0
    """Turn at which its reads, those about the proxy apart, were last known to be right; its parts' are theirs."""
    wrong_at: int = 0
    fits: dict[int, tuple[ProxyNode, int]] = field(default_factory=dict)
    """Proxies for which all of it was right, and when, by identity."""
    used: int = 0

    def close(self) -> None:
        """Nothing more will be read."""
        tags = {(str(read[0]), _tag(read)) for reads in (self.reads, self.own_reads) for read in reads}
        self.tags = frozenset(tags).union(*(part.tags for part in self.parts))

    def is_touched(self, changes: frozenset[str]) -> bool:
        """Whether something that was read may have changed with these."""
        return any(_related(owner, name, changes) for owner, name in self.tags)


class Memory:
    """What was made for worlds before. Use it from one thread."""

    def __init__(self) -> None:
        self._turn = 0
        self._view: View | None = None
        self._history: list[Changes] = []
        self._since: dict[int, Changes] = {}
        self._made: dict[Hashable, list[_Made]] = {}
        self._frames: list[_Made] = []
        self._answers: dict[Read, Any] = {}
        self._compared: dict[tuple[tuple[int, ...], int], bool] = {}
        self._proxies: dict[str, ProxyNode] = {}
        self._count = self._alive = 0
        self.made = 0
        """How often something had to be made."""

    def turn(self, view: View) -> None:
        """Go on to a world."""
        self._history.append(None if self._view is None else _changes(self._view, view))
        del self._history[:-HISTORY_TURNS]
        self._view = view
        self._turn += 1
        self._answers, self._since, self._compared = {}, {}, {}
        known = {proxy.id for proxy in view.world.proxies}
        self._proxies = {name: proxy for name, proxy in self._proxies.items() if name in known}
        if self._count > 2 * self._alive + FORGET_FROM:
            self._forget()

    def translate(self, proxy: ProxyNode) -> Configuration:
        """The configuration of a proxy; sections that did not change are the very same objects as before."""
        before = self._proxies.get(proxy.id)
        if before is not None and before == proxy:
            proxy = before
        self._proxies[proxy.id] = proxy
        tracked = cast("ProxyNode", _Proxy(self, proxy))
        view = cast("View", _View(self, self._real(), proxy))
        return {
            name: self.part((name, proxy.id), functools.partial(make, view, tracked), (), proxy)
            for name, make in SECTIONS
        }

    def _real(self) -> View:
        if self._view is None:
            raise RuntimeError("turn() comes first")
        return self._view

    def _forget(self) -> None:
        """Forget what is not part of anything that was asked for lately."""
        alive: set[int] = set()
        waiting = [made for found in self._made.values() for made in found if made.used > self._turn - KEPT_TURNS]
        while waiting:
            made = waiting.pop()
            if id(made) not in alive:
                alive.add(id(made))
                waiting.extend(made.parts)
        self._made = {
            key: kept for key, found in self._made.items() if (kept := [made for made in found if id(made) in alive])
        }
        self._count = self._alive = len(alive)

    # Parts

    def part(self, key: Hashable, make: Callable[[], Any], given: tuple[Any, ...], proxy: ProxyNode) -> Any:
        """What `make` gives, or gave for the same key when it was given and read the same."""
        found = self._made.setdefault(key, [])
        for made in reversed(found):
            if made.given == given and self._is_right(made, proxy):
                break
        else:
            made = self._make(make, given, proxy)
            found.append(made)
        made.used = self._turn
        if self._frames:
            self._frames[-1].parts.append(made)
        return made.value

    def _make(self, make: Callable[[], Any], given: tuple[Any, ...], proxy: ProxyNode) -> _Made:
        made = _Made(given, right_at=self._turn)
        self._frames.append(made)
        try:
            made.value = make()
        finally:
            self._frames.pop()
        made.close()
        made.fits[id(proxy)] = (proxy, self._turn)
        self._count += 1
        self.made += 1
        return made

    def note(self, read: Read, value: Any, *, own: bool) -> None:
        """Something was read."""
        if self._frames:
            frame = self._frames[-1]
            (frame.own_reads if own else frame.reads)[read] = value

    def _is_right(self, made: _Made, proxy: ProxyNode) -> bool:
        _, fitted = made.fits.get(id(proxy), (None, 0))
        changes = self._changes_since(fitted) if fitted else None
        if changes is not None and not made.is_touched(changes):
            made.fits[id(proxy)] = (proxy, self._turn)
            return True
        if made.wrong_at == self._turn:
            return False
        if made.right_at != self._turn:
            known = self._changes_since(made.right_at)
            if not all(self._same(read, value, known, None) for read, value in made.reads.items()):
                made.wrong_at = self._turn
                return False
            made.right_at = self._turn
        for read, value in made.own_reads.items():
            # An unchanged proxy still has the attributes that it had.
            if (read[0] != "proxy" or not fitted) and not self._same(read, value, changes, proxy):
                return False
        if not all(self._is_right(part, proxy) for part in made.parts):
            return False
        made.fits[id(proxy)] = (proxy, self._turn)
        return True

    def _same(self, read: Read, value: Any, changes: Changes, proxy: ProxyNode | None) -> bool:
        if changes is not None and not _related(str(read[0]), _tag(read), changes):
            return True
        if proxy is not None:
            return self._equal(self._ask(read, proxy), value)
        if read not in self._answers:
            self._answers[read] = self._ask(read, None)
        return self._equal(self._answers[read], value)

    def _equal(self, one: Any, other: Any) -> bool:
        if one is other:
            return True
        if not (isinstance(one, tuple) and len(one) > LARGE):
            return bool(one == other)
        # The same long answer is compared once, although every proxy has a copy of its own.
        key = (tuple(map(id, one)), id(other))
        if key not in self._compared:
            self._compared[key] = bool(one == other)
        return self._compared[key]

    def _changes_since(self, turn: int) -> Changes:
        """What has changed since a turn; None where that is not known, or everything."""
        if turn not in self._since:
            steps = self._history[turn - self._turn :] if turn < self._turn else []
            unknown = self._turn - turn > len(self._history) or any(step is None for step in steps)
            self._since[turn] = None if unknown else frozenset().union(*(step or () for step in steps))
        return self._since[turn]

    def _ask(self, read: Read, proxy: ProxyNode | None) -> Any:
        owner, name, *rest = read
        view = self._real()
        sources = {
            "view": view,
            "world": view.world,
            "resources": view.resources,
            "world.resources": view.world.resources,
            "proxy": proxy,
        }
        value = getattr(sources[str(owner)], str(name))
        if rest:
            positional, named = cast("tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]", rest)
            arguments = [_argument(item, proxy) for item in positional]
            value = value(*arguments, **{key: _argument(item, proxy) for key, item in named})
        return _settled(value)


def _argument(item: Any, proxy: ProxyNode | None) -> Any:
    if item is SELF:
        return proxy
    return item.value if isinstance(item, _Same) else item


def _settled(value: Any) -> Any:
    """Answers that can be read once only would be empty the second time."""
    return tuple(value) if isinstance(value, Iterator) else value


def _tag(read: Read) -> str:
    if read[1] == "specs" and len(read) > 2:
        kind = cast("tuple[type, ...]", read[2])[0]
        return f"specs {kind.__name__}"
    return str(read[1])


def _related(owner: str, name: str, changes: frozenset[str]) -> bool:
    if not changes or owner == "proxy":
        return False
    if owner == "view":
        return not changes <= UNRELATED.get(name, frozenset())
    if name.startswith("specs "):
        return name.removeprefix("specs ") in changes
    if owner == "world":
        # Its other fields cannot have changed: that would be everything.
        return name in changes
    return True


def _changes(old: View, new: View) -> Changes:
    plain = World.__dataclass_fields__.keys() - {"resources", "endpoints", "proxies"}
    if any(getattr(old.world, name) != getattr(new.world, name) for name in plain):
        return None
    beside = [(name, getattr(old.world, name), getattr(new.world, name)) for name in ("endpoints", "proxies")]
    changed = {name for name, before, after in beside if before is not after and before != after}
    was, now = _by_kind(old), _by_kind(new)
    return frozenset(changed | {kind for kind in was.keys() | now.keys() if was.get(kind) != now.get(kind)})


def _by_kind(view: View) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for resource in view.resources:
        found.setdefault(type(resource.spec).__name__, []).append(resource.spec)
    return found


# What translation sees


class _Tracked:
    """Something whose attributes are noted when they are read."""

    _owner = ""

    def __init__(self, memory: Memory, target: Any, proxy: ProxyNode) -> None:
        self._memory = memory
        self._target = target
        self._proxy = proxy

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if callable(value) and not isinstance(value, type):
            question = _Question(self, name, value)
            self.__dict__[name] = question
            return question
        value = _settled(value)
        self._memory.note((self._owner, name), value, own=self._owner == "proxy")
        return value


class _Question:
    """A method whose answers are noted with their arguments."""

    __slots__ = ("_about", "_method", "_name")

    def __init__(self, about: _Tracked, name: str, method: Callable[..., Any]) -> None:
        self._about = about
        self._name = name
        self._method = method

    def __call__(self, *positional: Any, **named: Any) -> Any:
        about = self._about
        arguments = tuple(map(_key, positional))
        more = tuple((name, _key(value)) for name, value in sorted(named.items()))
        read: Read = (about._owner, self._name, arguments, more)
        own = about._owner == "proxy" or SELF in arguments or any(value is SELF for _, value in more)
        answers = about._memory._answers
        if not own and read in answers:
            value = answers[read]
        else:
            real = [about._proxy if isinstance(item, _Proxy) else item for item in positional]
            really = {key: about._proxy if isinstance(item, _Proxy) else item for key, item in named.items()}
            value = _settled(self._method(*real, **really))
            if not own:
                answers[read] = value
        about._memory.note(read, value, own=own)
        return value


def _key(value: Any) -> Hashable:
    if isinstance(value, _Proxy):
        return SELF
    if isinstance(value, _Tracked):
        raise TypeError(f"{type(value._target).__name__} is not to be handed to a view")
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return cast("Hashable", value)


class _View(_Tracked):
    _owner = "view"

    @property
    def world(self) -> Any:
        return _World(self._memory, self._target.world, self._proxy)

    @property
    def resources(self) -> Any:
        return _Resources(self._memory, self._target.resources, self._proxy)

    def part(self, key: Hashable, make: Callable[[], Any], *given: Any) -> Any:
        return self._memory.part(key, make, given, self._proxy)


class _World(_Tracked):
    _owner = "world"

    @property
    def resources(self) -> Any:
        tracked = _Resources(self._memory, self._target.resources, self._proxy)
        tracked._owner = "world.resources"
        return tracked


class _Resources(_Tracked):
    _owner = "resources"

    def __iter__(self) -> Iterator[Any]:
        content = tuple(self._target)
        self._memory.note((self._owner, "digest"), self._target.digest, own=False)
        return iter(content)

    def __len__(self) -> int:
        self._memory.note((self._owner, "digest"), self._target.digest, own=False)
        return len(self._target)


class _Proxy(_Tracked):
    _owner = "proxy"

    def __init__(self, memory: Memory, target: ProxyNode) -> None:
        super().__init__(memory, target, target)
