"""What a change of resources changes: the resources themselves, what each proxy is told, and what that does to streams.

    difference = compare(before, after)

Pure. Proxies that change in the same way are told of together.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from mlmesh_local.describing import Lines, cuts, describe
from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.streams import DRAIN_S
from mlmesh_local.inspection import TYPES
from mlmesh_local.model import ProxyNode, World
from mlmesh_local.resources import Resource, ResourceSet
from mlmesh_local.translate import View, translate

SCHEMA = "mlmesh.diff/v1"
Action = Literal["created", "configured", "deleted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceDifference:
    """One resource. ``lines`` are a unified diff of its fields."""

    kind: str
    name: str
    action: Action
    source: str
    lines: Lines


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigDifference:
    """One Envoy resource that differs for proxies in the same way; their own addresses are written POD and so on.

    ``summary`` says in words what differs, ``lines`` are a unified diff of its JSON. ``cuts``: whether open streams
    through it end.
    """

    type: str
    name: str
    action: Action
    proxies: tuple[str, ...]
    summary: Lines
    lines: Lines
    cuts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Everything that differs. ``created`` and ``deleted`` are proxies that come and go.

    ``consequences`` are sentences about open streams and connections.
    """

    resources: tuple[ResourceDifference, ...]
    config: tuple[ConfigDifference, ...]
    created: tuple[str, ...]
    deleted: tuple[str, ...]
    consequences: Lines

    @property
    def empty(self) -> bool:
        """Whether nothing differs."""
        return not (self.resources or self.config or self.created or self.deleted)


def compare(before: World, after: World) -> Difference:
    """The difference of two worlds. Raises InvalidResource when one cannot be translated."""
    config = tuple(_config(before, after))
    had, has = [proxy.id for proxy in before.proxies], [proxy.id for proxy in after.proxies]
    deleted = tuple(name for name in had if name not in has)
    return Difference(
        resources=tuple(_resources(before.resources, after.resources)),
        config=config,
        created=tuple(name for name in has if name not in had),
        deleted=deleted,
        consequences=tuple(_consequences(config, deleted)),
    )


def document(difference: Difference) -> dict[str, Any]:
    """The difference as JSON values."""
    return {
        "schema": SCHEMA,
        "resources": [
            {"kind": r.kind, "name": r.name, "action": r.action, "source": r.source, "diff": list(r.lines)}
            for r in difference.resources
        ],
        "config": [
            {
                "type": c.type,
                "name": c.name,
                "action": c.action,
                "proxies": list(c.proxies),
                "cuts_streams": c.cuts,
                "summary": list(c.summary),
                "diff": list(c.lines),
            }
            for c in difference.config
        ],
        "proxies": {"created": list(difference.created), "deleted": list(difference.deleted)},
        "consequences": list(difference.consequences),
    }


def _resources(before: ResourceSet, after: ResourceSet) -> Iterator[ResourceDifference]:
    old = {resource.key: resource for resource in before}
    new = {resource.key: resource for resource in after}
    for key in sorted({*old, *new}):
        one, other = old.get(key), new.get(key)
        if one is not None and other is not None and one.plain == other.plain:
            continue
        told = other or one
        if told is None:
            continue
        yield ResourceDifference(
            kind=told.kind,
            name=told.name,
            action="created" if one is None else "deleted" if other is None else "configured",
            source=f"{told.source}:{told.spec.meta.at.line}",
            lines=_unified(_yaml(one), _yaml(other)),
        )


def _yaml(resource: Resource | None) -> list[str]:
    if resource is None:
        return []
    # In one order: what other tools wrote out again differs by what it says alone.
    return yaml.safe_dump(resource.plain, allow_unicode=True, width=120).splitlines()


def _json(content: Json | None) -> list[str]:
    return json.dumps(content, indent=1, sort_keys=True).splitlines() if content is not None else []


def _unified(old: list[str], new: list[str]) -> Lines:
    # Without the two lines of file names and the marks of positions: the fields around tell where it is.
    return tuple(line for line in difflib.unified_diff(old, new, n=2, lineterm="") if line[:3] not in ("---", "+++"))


def _config(before: World, after: World) -> Iterator[ConfigDifference]:
    old, new = View(before), View(after)
    had = {proxy.id: proxy for proxy in before.proxies}
    alike: dict[ConfigDifference, list[str]] = {}
    for proxy in after.proxies:
        if proxy.id in had:
            for change in _changes(_told(old, had[proxy.id]), _told(new, proxy)):
                alike.setdefault(change, []).append(proxy.id)
    order = {kind: number for number, kind in enumerate(TYPES)}
    for change, names in sorted(alike.items(), key=lambda item: (order[item[0].type], item[0].name)):
        yield dataclasses.replace(change, proxies=tuple(names))


def _told(view: View, proxy: ProxyNode) -> Mapping[str, Mapping[str, Json]]:
    """What a proxy is told, with words for its own addresses: so replicas can be told of together."""
    told = json.dumps({short: translate(view, proxy).get(url, {}) for short, url in TYPES.items()})
    for address, word in (
        (proxy.pod_address, "POD"),
        (proxy.outbound_address, "OUTBOUND"),
        (proxy.application_address, "APPLICATION"),
    ):
        if address:
            told = re.sub(rf"(?<![0-9.]){re.escape(address)}(?![0-9.])", word, told)
    result: Mapping[str, Mapping[str, Json]] = json.loads(told)
    return result


def _changes(
    old: Mapping[str, Mapping[str, Json]], new: Mapping[str, Mapping[str, Json]]
) -> Iterator[ConfigDifference]:
    for kind in TYPES:
        for name in sorted({*old[kind], *new[kind]}):
            one, other = old[kind].get(name), new[kind].get(name)
            if one == other:
                continue
            action: Action = "created" if one is None else "deleted" if other is None else "configured"
            yield ConfigDifference(
                type=kind,
                name=name,
                action=action,
                proxies=(),
                summary=describe(kind, one, other),
                lines=_unified(_json(one), _json(other)) if action == "configured" else (),
                cuts=kind == "listeners" and cuts(one, other),
            )


def _consequences(config: Iterable[ConfigDifference], deleted: tuple[str, ...]) -> Iterator[str]:
    kinds: set[str] = set()
    for change in config:
        kinds.add(change.type)
        if change.cuts:
            what = "is removed" if change.action == "deleted" else "changes"
            yield (
                f"listener {change.name} of {named(change.proxies)} {what}: streams that are open through what changes "
                f"are CUT {DRAIN_S:.0f} s later with UNAVAILABLE; new calls work all the time"
            )
    if "routes" in kinds:
        yield "routes change: new calls and new streams follow at once, streams that are open stay where they are"
    if "extensions" in kinds:
        yield (
            "policies change: every new call is asked by the new ones, on open connections too; open streams go on "
            "(in a cluster istiod writes policies into listeners: there streams are cut after the drain time)"
        )
    if deleted:
        yield f"{named(deleted)} end: their streams end with UNAVAILABLE at the end of the termination grace"


def named(names: tuple[str, ...]) -> str:
    """Names for a person: all of a few, else some and how many more."""
    return ", ".join(names) if len(names) <= _NAMES_MAX else f"{', '.join(names[:3])} and {len(names) - 3} more"


_NAMES_MAX = 4
