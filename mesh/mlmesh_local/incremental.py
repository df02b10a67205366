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

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, cast

from mlmesh_local.model import ProxyNode, World
from mlmesh_local.tracking import OWN_LABELS, SELF, Read, Same, TrackedProxy, TrackedView
from mlmesh_local.translate import SECTIONS, Configuration, View

KEPT_TURNS = 3
"""Worlds after which what was no longer asked for may be forgotten: a refused change comes back to the world before."""
HISTORY_TURNS = 256
FORGET_FROM = 20_000
REPLACED_MAX = 1000
FEW = 16
NEVER: Final = (None, 0)

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

Changes = frozenset[str] | None
"""Kinds whose resources differ, "endpoints", "proxies"; None where more than that differs."""


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
        self._own_answers: dict[tuple[Read, int], Any] = {}
        self._known: dict[Hashable, Any] = {}
        self._settled: dict[int, tuple[Any, Any]] = {}
        self._touched: dict[tuple[frozenset[tuple[str, str]], frozenset[str]], bool] = {}
        self._different: dict[tuple[int, int], tuple[Any, Any]] = {}
        """Answers found to differ, by identity; they are kept alive, so that nothing else gets it."""
        self._proxies: dict[str, ProxyNode] = {}
        self._count = self._alive = 0
        self._replaced = 0
        """Proxies that were there and are no more, or are others now, since the last time of forgetting."""
        self.made = 0
        """How often something had to be made."""

    def turn(self, view: View) -> None:
        """Go on to a world."""
        self._history.append(None if self._view is None else _changes(self._view, view))
        del self._history[:-HISTORY_TURNS]
        self._view = view
        self._turn += 1
        self._answers, self._own_answers, self._since = {}, {}, {}
        self._settled, self._different, self._touched = {}, {}, {}
        known = {proxy.id for proxy in view.world.proxies}
        self._replaced += len(self._proxies.keys() - known)
        self._proxies = {name: proxy for name, proxy in self._proxies.items() if name in known}
        if self._count > 2 * self._alive + FORGET_FROM or self._replaced > REPLACED_MAX:
            self._forget()

    @property
    def view(self) -> View | None:
        """The world gone on to last."""
        return self._view

    def translate(self, proxy: ProxyNode) -> Configuration:
        """The configuration of a proxy; sections that did not change are the very same objects as before."""
        before = self._proxies.get(proxy.id)
        if before is not None and before == proxy:
            proxy = before
        elif before is not None:
            self._replaced += 1
        self._proxies[proxy.id] = proxy
        tracked = cast("ProxyNode", TrackedProxy(self, proxy))
        view = cast("View", TrackedView(self, self._real(), proxy))
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
        current = {id(proxy) for proxy in self._proxies.values()}
        for made in (made for found in self._made.values() for made in found):
            made.fits = {key: fit for key, fit in made.fits.items() if key in current}
        # It saves comparisons only, and has names of resources that are long gone.
        self._known = {}
        self._replaced = 0

    # Parts

    def part(self, key: Hashable, make: Callable[[], Any], given: tuple[Any, ...], proxy: ProxyNode) -> Any:
        """What `make` gives, or gave for the same key when it was given and read the same."""
        found = self._made.setdefault(key, [])
        # What was right for this proxy before is the likeliest.
        likely = sorted(found, key=lambda made: made.fits.get(id(proxy), NEVER)[1], reverse=True)
        for made in likely if len(found) > 1 else found:
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
        if changes is not None and not self._is_touched(made.tags, changes):
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
            if (read[0] not in ("proxy", "labels") or not fitted) and not self._same(read, value, changes, proxy):
                return False
        if not all(self._is_right(part, proxy) for part in made.parts):
            return False
        made.fits[id(proxy)] = (proxy, self._turn)
        return True

    def _is_touched(self, tags: frozenset[tuple[str, str]], changes: frozenset[str]) -> bool:
        """Whether something that was read may have changed. Parts are many, what they read is of few sorts."""
        key = (tags, changes)
        found = self._touched.get(key)
        if found is None:
            found = self._touched[key] = any(_related(owner, name, changes) for owner, name in tags)
        return found

    def _same(self, read: Read, value: Any, changes: Changes, proxy: ProxyNode | None) -> bool:
        if changes is not None and not _related(str(read[0]), _tag(read), changes):
            return True
        answer = self.answer(read, proxy)
        if answer is value:
            return True
        pair = (id(answer), id(value))
        if pair in self._different:
            return False
        if answer != value:
            self._different[pair] = (answer, value)
            return False
        # Next time it is the same object, and so is what is made of it.
        self._put(read, proxy, value)
        self._settled[id(answer)] = (answer, value)
        return True

    def answer(self, read: Read, proxy: ProxyNode | None) -> Any:
        """What is answered in this world; ``proxy`` where the question is about it."""
        found = self._own_answers.get((read, id(proxy)), self) if proxy else self._answers.get(read, self)
        return self._put(read, proxy, self.settle(self._ask(read, proxy))) if found is self else found

    def _put(self, read: Read, proxy: ProxyNode | None, answer: Any) -> Any:
        if proxy is None:
            self._answers[read] = answer
        else:
            self._own_answers[read, id(proxy)] = answer
        return answer

    def settle(self, value: Any) -> Any:
        """An answer in which what equals what was known before is that object: equality is then found at a glance.

        Views make services and rules anew for every world. Answers that can be read once only are made lasting.
        """
        if isinstance(value, Iterator):
            value = tuple(value)
        if isinstance(value, tuple):
            return tuple(map(self.settle, value)) if value and not isinstance(value[0], str | int) else value
        if type(value) is dict and len(value) > FEW:
            return {key: self.settle(item) for key, item in value.items()}
        if not dataclasses.is_dataclass(value):
            return value
        settled = self._settled.get(id(value))
        if settled is None:
            key = _name_of(value)
            known = self._known.get(key)
            if known is None or known != value:
                known = value
                if key is not None:
                    self._known[key] = value
            # The value stays alive, so that nothing else gets its identity.
            settled = self._settled[id(value)] = (value, known)
        return settled[1]

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
            "labels": proxy.labels if proxy else {},
        }
        value = getattr(sources[str(owner)], str(name))
        if rest:
            positional, named = cast("tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]", rest)
            arguments = [_argument(item, proxy) for item in positional]
            value = value(*arguments, **{key: _argument(item, proxy) for key, item in named})
        return value


def _argument(item: Any, proxy: ProxyNode | None) -> Any:
    if item is SELF:
        return proxy
    if item is OWN_LABELS:
        return proxy.labels if proxy else {}
    return item.value if isinstance(item, Same) else item


def _name_of(value: Any) -> Hashable:
    """What tells a value apart in a world; None where that is not known."""
    meta = getattr(value, "meta", None)
    if meta is not None:
        return (type(value), meta.kind, meta.namespace, meta.name)
    host = getattr(value, "host", None)
    return None if host is None else (type(value), host, getattr(value, "namespace", ""), getattr(value, "address", ""))


def _tag(read: Read) -> str:
    if read[1] == "specs" and len(read) > 2:
        kind = cast("tuple[type, ...]", read[2])[0]
        return f"specs {kind.__name__}"
    return str(read[1])


def _related(owner: str, name: str, changes: frozenset[str]) -> bool:
    if not changes or owner in ("proxy", "labels"):
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
