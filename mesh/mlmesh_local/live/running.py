"""Envoy's own view of its configuration (`/config_dump`), and where it is not what the control plane sent. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlmesh_local.envoy_types import Json

REQUEST = "/config_dump?include_eds"
"""What to ask the admin interface for."""

State = Literal["active", "warming", "draining", "refused"]
Verdict = Literal["same", "differs", "missing", "unused", "only in Envoy", "warming", "draining", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """One resource in an Envoy. Endpoints have no version there."""

    type: str
    name: str
    version: str
    state: State
    content: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One resource as the control plane has it for the Envoy; ``acked`` when the Envoy has taken it."""

    type: str
    name: str
    version: str
    content: Json
    acked: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One resource on both sides; a version is empty where there is none."""

    type: str
    name: str
    sent: str
    running: str
    verdict: Verdict


def running(dump: Mapping[str, Any]) -> list[Running]:
    """What came over ADS, of Envoy's answer. Raises ValueError for anything else."""
    configs = dump.get("configs")
    if not isinstance(configs, list):
        raise ValueError("the answer is no configuration dump")  # noqa: TRY004  what was read is wrong, not a type
    found: list[Running] = []
    for config in configs:
        kind = str(config.get("@type", "")).rpartition(".")[2]
        if kind in _READERS:
            found += _READERS[kind](config)
    # Envoy tells endpoints of every cluster; only those of EDS came by themselves.
    discovered = {one.name for one in found if one.type == "clusters" and one.content.get("type") == "EDS"}
    return [one for one in found if one.type != "endpoints" or one.name in discovered]


def compare(sent: Iterable[Sent], now: Iterable[Running]) -> list[Compared]:
    """Both sides by type and name; what drains beside an active version of the same name counts for itself."""
    wanted = {(one.type, one.name): one for one in sent}
    result: list[Compared] = []
    active: set[tuple[str, str]] = set()
    for one in now:
        key = (one.type, one.name)
        if one.state == "active":
            active.add(key)
        result.append(
            Compared(
                type=one.type,
                name=one.name,
                sent=wanted[key].version if key in wanted else "",
                running=one.version,
                verdict=_verdict(wanted.get(key), one),
            )
        )
    warming = {(one.type, one.name) for one in result if one.verdict == "warming"}
    for key, sending in wanted.items():
        if key not in active | warming:
            # Envoy asks for these by name, once something refers to them.
            idle = not sending.acked and key[0] in ("extensions", "endpoints")
            verdict: Verdict = "unused" if idle else "missing"
            result.append(Compared(type=key[0], name=key[1], sent=sending.version, running="", verdict=verdict))
    return sorted(result, key=lambda one: (one.type, one.name, one.verdict))


def _verdict(sent: Sent | None, now: Running) -> Verdict:
    if now.state != "active":
        return now.state
    if sent is None:
        return "only in Envoy"
    if now.type == "endpoints":
        return "same" if _addresses(sent.content) == _addresses(now.content) else "differs"
    return "same" if sent.version == now.version else "differs"


def _addresses(assignment: Json) -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    for group in assignment.get("endpoints", ()):
        for one in group.get("lb_endpoints", ()):
            socket = one.get("endpoint", {}).get("address", {}).get("socket_address", {})
            found.add((str(socket.get("address", "")), int(socket.get("port_value", 0))))
    return found


def _clusters(config: Json) -> Iterator[Running]:
    states: tuple[tuple[str, State], ...] = (
        ("dynamic_active_clusters", "active"),
        ("dynamic_warming_clusters", "warming"),
    )
    for key, state in states:
        for one in config.get(key, ()):
            yield _running("clusters", one, one.get("cluster", {}), state)


def _listeners(config: Json) -> Iterator[Running]:
    for one in config.get("dynamic_listeners", ()):
        name = str(one.get("name", ""))
        for key in ("active", "warming", "draining"):
            part = one.get(f"{key}_state")
            if part is not None:
                yield _running("listeners", part, part.get("listener", {}), key, name=name)
        if "error_state" in one:
            error = one["error_state"]
            yield Running(
                type="listeners",
                name=name,
                version=str(error.get("version_info", "")),
                state="refused",
                content={"details": error.get("details", "")},
            )


def _routes(config: Json) -> Iterator[Running]:
    for one in config.get("dynamic_route_configs", ()):
        yield _running("routes", one, one.get("route_config", {}), "active")


def _endpoints(config: Json) -> Iterator[Running]:
    for one in config.get("dynamic_endpoint_configs", ()):
        content = one.get("endpoint_config", {})
        yield _running("endpoints", one, content, "active", name=str(content.get("cluster_name", "")))


def _extensions(config: Json) -> Iterator[Running]:
    for one in config.get("ecds_filters", ()):
        yield _running("extensions", one, one.get("ecds_filter", {}), "active")


def _running(kind: str, entry: Json, content: Json, state: State, *, name: str = "") -> Running:
    return Running(
        type=kind,
        name=name or str(content.get("name", "")),
        version=str(entry.get("version_info", "")),
        state=state,
        content={key: value for key, value in content.items() if key != "@type"},
    )


_READERS = {
    "ClustersConfigDump": _clusters,
    "ListenersConfigDump": _listeners,
    "RoutesConfigDump": _routes,
    "EndpointsConfigDump": _endpoints,
    "EcdsConfigDump": _extensions,
}
