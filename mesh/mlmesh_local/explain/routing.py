"""From an authority and a request to a virtual host and a route, as Envoy's router chooses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mlmesh_local.envoy_types import Json
from mlmesh_local.explain.requests import Request
from mlmesh_local.explain.strings import (
    describe_header_value,
    describe_path,
    describe_string,
    header_mismatch,
    path_mismatch,
    query_mismatch,
    query_of,
    string_matches,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A route of a virtual host; ``mismatch`` is empty for the one that took the request."""

    route: Json
    mismatch: str


def virtual_host(configuration: Json, authority: str) -> Json | None:
    """The virtual host of an authority: its exact domain, the longest "*suffix", the longest "prefix*", "*".

    https://www.envoyproxy.io/docs/envoy/v1.40.0/api-v3/config/route/v3/route_components.proto
    """
    name = authority.lower()
    if configuration.get("ignore_port_in_host_matching"):
        host, colon, port = name.rpartition(":")
        name = host if colon and port.isdigit() else name
    best: tuple[int, int] = (-1, -1)
    found: Json | None = None
    for host in configuration.get("virtual_hosts", ()):
        for domain in host.get("domains", ()):
            rank = _domain_rank(str(domain).lower(), name)
            if rank > best:
                best, found = rank, host
    return found


def _domain_rank(domain: str, name: str) -> tuple[int, int]:
    if domain == name:
        return (3, len(domain))
    if domain == "*":
        return (0, 0)
    # A wildcard stands for at least one character.
    if domain.startswith("*") and name.endswith(domain[1:]) and len(name) >= len(domain):
        return (2, len(domain))
    if domain.endswith("*") and name.startswith(domain[:-1]) and len(name) >= len(domain):
        return (1, len(domain))
    return (-1, -1)


def choose(host: Json, request: Request) -> tuple[list[Tried], Json | None]:
    """Routes in the order of trial up to the one that takes the request, and that one."""
    tried: list[Tried] = []
    for route in host.get("routes", ()):
        mismatch = route_mismatch(route.get("match", {}), request)
        tried.append(Tried(route=route, mismatch=mismatch))
        if not mismatch:
            return tried, route
    return tried, None


def route_mismatch(match: Json, request: Request) -> str:
    """Why a request does not satisfy a route match; every failing part is named."""
    return "; ".join(_mismatches(match, request))


def _mismatches(match: Json, request: Request) -> Iterator[str]:
    parts = [path_mismatch(match, request.path)]
    parts += [header_mismatch(matcher, request.headers) for matcher in match.get("headers", ())]
    query = query_of(request.path)
    parts += [query_mismatch(matcher, query) for matcher in match.get("query_parameters", ())]
    if "grpc" in match and not request.headers.get("content-type", "").startswith("application/grpc"):
        parts.append("it is not gRPC")
    parts += [metadata_mismatch(matcher, request) for matcher in match.get("dynamic_metadata", ())]
    fraction = match.get("runtime_fraction", {}).get("default_value")
    if fraction is not None and share(fraction) == 0:
        parts.append("the route takes 0 % of requests")
    yield from (part for part in parts if part)


def describe_match(match: Json) -> str:
    """A route match, for a person."""
    parts: list[str] = []
    if match.get("prefix") != "/" or not match:
        parts.append(f"path {describe_path(match)}")
    for matcher in match.get("headers", ()):
        negation = "not " if matcher.get("invert_match") else ""
        parts.append(f"{matcher.get('name', '')} {negation}{describe_header_value(matcher)}")
    for matcher in match.get("query_parameters", ()):
        wanted = describe_string(matcher["string_match"]) if "string_match" in matcher else "present"
        parts.append(f"query {matcher.get('name', '')} {wanted}")
    parts += [f"claim {'.'.join(_path(matcher))}" for matcher in match.get("dynamic_metadata", ())]
    return " and ".join(parts) or "everything"


def metadata_mismatch(matcher: Json, request: Request) -> str:
    """type.matcher.v3.MetadataMatcher over what filters found out."""
    path = _path(matcher)
    value: Any = request.metadata.get(str(matcher.get("filter", "")))
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    matched = value_matches(matcher.get("value", {}), value) != bool(matcher.get("invert"))
    shown = "missing" if value is None else f"{value!r}"
    return "" if matched else f"{'.'.join(path)} is {shown}"


def _path(matcher: Json) -> list[str]:
    return [str(step.get("key", "")) for step in matcher.get("path", ())]


def value_matches(matcher: Json, value: Any) -> bool:
    """type.matcher.v3.ValueMatcher."""
    ((kind, wanted),) = matcher.items() if len(matcher) == 1 else (("", None),)
    return _VALUES[kind](wanted, value) if kind in _VALUES else False


def _in_list(wanted: Json, value: Any) -> bool:
    inner = wanted.get("one_of", {})
    return isinstance(value, list) and any(value_matches(inner, item) for item in value)


def _is_number(wanted: Json, value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    if "range" in wanted:
        return bool(wanted["range"].get("start", 0) <= value < wanted["range"].get("end", 0))
    return bool(value == wanted.get("exact", 0))


_VALUES: dict[str, Callable[[Any, Any], bool]] = {
    "or_match": lambda wanted, value: any(value_matches(one, value) for one in wanted.get("value_matchers", ())),
    "list_match": _in_list,
    "string_match": lambda wanted, value: isinstance(value, str) and string_matches(wanted, value),
    "present_match": lambda wanted, value: (value is not None) == bool(wanted),
    "bool_match": lambda wanted, value: value is bool(wanted),
    "double_match": _is_number,
    "null_match": lambda _wanted, value: value is None,
}


_DENOMINATORS = {"HUNDRED": 100, "TEN_THOUSAND": 10_000, "MILLION": 1_000_000}


def share(fraction: Json) -> float:
    """A FractionalPercent, 0 to 1."""
    return min(1.0, int(fraction.get("numerator", 0)) / _DENOMINATORS[str(fraction.get("denominator", "HUNDRED"))])


def most_specific(name: str, *levels: Json) -> Json | None:
    """A filter's configuration on a route: that of the weighted cluster, else route, virtual host, configuration."""
    for level in levels:
        found = level.get("typed_per_filter_config", {}).get(name)
        if found is not None:
            result: Json = found
            return result
    return None
