"""Envoy resources in words, line by line, so that two of them can be compared by what they mean. Pure."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.durations import text
from mlmesh_local.explain.policies import faults, header_edits, retries, timeout
from mlmesh_local.explain.requests import Request
from mlmesh_local.explain.routing import describe_match, share

Lines = tuple[str, ...]
Parts = tuple[str, ...]
"""What is said of one thing, such as a route: its destinations, its timeout, its retries."""

FAULT_FILTER = "envoy.filters.http.fault"
_LISTENER_CHAINS = ("filter_chains", "default_filter_chain")


def describe(kind: str, old: Json | None, new: Json | None) -> Lines:
    """What differs between two resources of a type: "- " and "+ " before what was and what will be."""
    if old is None or new is None:
        return ()
    if kind == "listeners":
        return tuple(_listener(old, new))
    before, after = _LINES[kind](old), _LINES[kind](new)
    lines: list[str] = []
    for key in dict.fromkeys((*before, *after)):
        was, will = before.get(key), after.get(key)
        if was != will:
            lines += _turned(key, was, will)
    if not lines and list(before) != list(after):
        return ("the order changes",)
    return tuple(lines)


def _turned(key: str, was: Parts | None, will: Parts | None) -> Iterator[str]:
    """One thing that differs: only what is not on both sides is said."""
    if was is not None:
        gone = [part for part in was if will is None or part not in will]
        if gone or will is None:
            yield f"- {key}{'; '.join(gone)}"
    if will is not None:
        come = [part for part in will if was is None or part not in was]
        if come or was is None:
            yield f"+ {key}{'; '.join(come)}"


def cuts(old: Json | None, new: Json | None) -> bool:
    """Whether a change of a listener ends streams: Envoy drains the chains that change, or all when more does."""
    if old is None:
        return False
    if new is None or any(old.get(key) != new.get(key) for key in {*old, *new} - set(_LISTENER_CHAINS)):
        return True
    now = _by_name(new)
    return any(now.get(name) != chain for name, chain in _by_name(old).items())


def _listener(old: Json, new: Json) -> Iterator[str]:
    """Which parts of a listener differ."""
    was, will = _by_name(old), _by_name(new)
    for name in dict.fromkeys((*was, *will)):
        if was.get(name) != will.get(name):
            yield f"filter chain {name}: {', '.join(_chain(was.get(name), will.get(name)))}"
    keys = sorted({*old, *new} - set(_LISTENER_CHAINS))
    yield from (f"its {key.replace('_', ' ')} changes" for key in keys if old.get(key) != new.get(key))


def _by_name(listener: Json) -> dict[str, Json]:
    chains = listener.get("filter_chains", ())
    return {str(chain.get("name") or index): chain for index, chain in enumerate(chains)}


def _chain(old: Json | None, new: Json | None) -> list[str]:
    if old is None or new is None:
        return ["is new" if old is None else "is removed"]
    words = {
        "transport_socket": "its TLS",
        "filters": "its filters",
        "filter_chain_match": "which connections it takes",
    }
    return [f"{words.get(key, key)} changed" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _routes(configuration: Json) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for host in configuration.get("virtual_hosts", ()):
        for route in host.get("routes", ()):
            name = f"{route['name']}: " if route.get("name") else ""
            key = f"{short(str(host.get('name', '')))}: {name}{describe_match(route.get('match', {}))} → "
            # Equal rules twice in one host: the second is never reached, and counted all the same.
            while key in found:
                key = f"{key}(again) "
            found[key] = (_target(route), *_route_parts(route, host))
    for name, config in configuration.get("typed_per_filter_config", {}).items():
        found.update(_filter(name, config))
    return found


def _route_parts(route: Json, host: Json) -> Iterator[str]:
    """What a route says besides where it sends."""
    action: Json = route.get("route", {})
    if action:
        timed = timeout(action, Request(headers={}))
        if timed.route_s:
            yield f"timeout {text(timed.route_s)}"
        policy = retries(action, host)
        if policy.attempts > 1:
            codes = "".join(f",{code}" for code in policy.status_codes)
            yield f"{policy.attempts - 1} retries on {','.join(policy.conditions)}{codes}"
        if policy.per_try_timeout_s:
            yield f"each attempt at most {text(policy.per_try_timeout_s)}"
        for mirror in action.get("request_mirror_policies", ()):
            yield f"mirrored to {short(str(mirror.get('cluster', '')))} {_percent(mirror)}"
        yield from (f"{key} {_digest(action[key])}" for key in sorted(action) if key not in _TOLD)
    fault = faults(route.get("typed_per_filter_config", {}).get(FAULT_FILTER))
    if fault and fault.delay_share:
        yield f"{fault.delay_share:.2%} delayed by {text(fault.delay_s)}"
    if fault and fault.abort_share:
        yield f"{fault.abort_share:.2%} ended with {fault.abort_code}"
    yield from header_edits((route,), action)
    yield from (f"{key} {_digest(route[key])}" for key in sorted(route) if key not in _TOLD)


def _percent(mirror: Json) -> str:
    fraction = mirror.get("runtime_fraction", {}).get("default_value")
    return "100 %" if fraction is None else f"{share(fraction) * 100:g} %"


def _target(route: Json) -> str:
    if "direct_response" in route:
        return f"answers HTTP {route['direct_response'].get('status', 0)}"
    if "redirect" in route:
        return f"redirects to {_digest(route['redirect'])}"
    action: Json = route.get("route", {})
    if "weighted_clusters" not in action:
        name = str(action.get("cluster") or f"the cluster that header {action.get('cluster_header', '')} names")
        return f"100% {short(name)}"
    clusters = action["weighted_clusters"].get("clusters", ())
    total = sum(int(one.get("weight", 0)) for one in clusters) or 1
    return ", ".join(
        f"{int(one.get('weight', 0)) * 100 / total:.4g}% {short(str(one.get('name', '')))}" for one in clusters
    )


def short(name: str) -> str:
    """A cluster or host for a person: "outbound|9000|v1|server.mlmesh.svc.cluster.local" is "server.mlmesh:9000 v1"."""
    name = name.replace(".svc.cluster.local", "")
    if name.count("|") != 3:
        return name
    direction, port, subset, host = name.split("|")
    shown = f"{host}:{port} {subset}".strip()
    return shown if direction == "outbound" else f"{direction} {port}"


def _filter(name: str, config: Json) -> Iterator[tuple[str, Parts]]:
    """A filter's configuration; of RBAC each rule by its name."""
    rules = config.get("rbac", config).get("rules")
    if isinstance(rules, Mapping) and "policies" in rules:
        for policy, content in sorted(rules["policies"].items()):
            yield f"{rules.get('action', 'ALLOW')} {policy} ", (_digest(content),)
        return
    yield f"filter {name} ", (_digest(config),)


def _extension(extension: Json) -> dict[str, Parts]:
    return dict(_filter(str(extension.get("name", "")), extension.get("typed_config", {})))


def _cluster(cluster: Json) -> dict[str, Parts]:
    return {f"{key} ": (_digest(value),) for key, value in sorted(cluster.items()) if key not in ("name", "metadata")}


def _assignment(assignment: Json) -> dict[str, Parts]:
    found: dict[str, Parts] = {}
    for group in assignment.get("endpoints", ()):
        where = {key: group[key] for key in ("locality", "priority", "load_balancing_weight") if group.get(key)}
        for one in group.get("lb_endpoints", ()):
            socket = one.get("endpoint", {}).get("address", {}).get("socket_address", {})
            extra = {key: value for key, value in one.items() if key != "endpoint"}
            key = f"{socket.get('address', '')}:{socket.get('port_value', '')} "
            found[key] = (_digest({**where, **extra}),)
    return found


def _digest(value: object) -> str:
    """A value in a line; what is long is cut, with what tells it from others."""
    shown = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}… ({zlib.crc32(shown.encode()):08x})"


_SHOWN = 160
_TOLD = frozenset(
    {
        "name", "match", "route", "redirect", "direct_response", "metadata", "decorator", "cluster", "cluster_header",
        "weighted_clusters", "timeout", "max_grpc_timeout", "retry_policy", "request_mirror_policies",
        "request_headers_to_add", "request_headers_to_remove", "response_headers_to_add", "response_headers_to_remove",
        "host_rewrite_literal", "prefix_rewrite", "regex_rewrite",
    }
)  # fmt: skip
_LINES: Mapping[str, Callable[[Json], dict[str, Parts]]] = {
    "routes": _routes,
    "clusters": _cluster,
    "endpoints": _assignment,
    "extensions": _extension,
}
