"""Envoy's matchers of strings, headers, query parameters and paths, evaluated as Envoy does, with the reason.

Each function gives an empty text when it matches, and otherwise why not, such as ``header x-user is "bob", not "ada"``.
Regular expressions are RE2 and must match the whole value.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import re2

from mlmesh_local.envoy_types import Json

_WAYS = ("exact", "prefix", "suffix", "contains")


@functools.lru_cache(maxsize=512)
def _regex(pattern: str) -> Any:
    return re2.compile(pattern)


def regex_matches(pattern: str, value: str) -> bool:
    """Whether RE2 matches all of a value."""
    return _regex(pattern).fullmatch(value) is not None


def regex_replaced(pattern: str, substitution: str, value: str) -> str:
    """A value in which every match of RE2 is replaced."""
    return str(_regex(pattern).sub(substitution, value))


def string_matches(matcher: Json, value: str) -> bool:
    """type.matcher.v3.StringMatcher. An empty matcher matches the empty string only, as `exact` would."""
    if "safe_regex" in matcher:
        return regex_matches(str(matcher["safe_regex"].get("regex", "")), value)
    way = next((name for name in _WAYS if name in matcher), "exact")
    wanted = str(matcher.get(way, ""))
    if matcher.get("ignore_case"):
        wanted, value = wanted.lower(), value.lower()
    if way == "exact":
        return value == wanted
    if way == "prefix":
        return value.startswith(wanted)
    return value.endswith(wanted) if way == "suffix" else wanted in value


def describe_string(matcher: Json) -> str:
    """A string matcher, for a person."""
    if "safe_regex" in matcher:
        return f'all of it matching "{matcher["safe_regex"].get("regex", "")}"'
    way = next((name for name in _WAYS if name in matcher), "exact")
    words = {"exact": "", "prefix": "beginning with ", "suffix": "ending with ", "contains": "containing "}
    case = " (in any case)" if matcher.get("ignore_case") else ""
    return f'{words[way]}"{matcher.get(way, "")}"{case}'


def header_mismatch(matcher: Json, headers: Mapping[str, str]) -> str:
    """route.v3.HeaderMatcher; `headers` have lower-case names, and several values of one joined by a comma."""
    name = str(matcher.get("name", "")).lower()
    # To Envoy the two are one.
    value = headers.get(":authority" if name == "host" else name)
    inverted = bool(matcher.get("invert_match"))
    label = f"header {name}"
    if "present_match" in matcher or not _says_anything(matcher):
        wanted = bool(matcher.get("present_match", True))
        # Envoy: the inversion counts here, too, and a missing header is not taken as empty.
        if ((value is not None) == wanted) != inverted:
            return ""
        return f"{label} is missing" if value is None else f'{label} is present ("{value}")'
    if value is None and not matcher.get("treat_missing_header_as_empty"):
        return f"{label} is missing"
    text = value or ""
    matched = _header_value(matcher, text)
    if matched != inverted:
        return ""
    shown = f'{label} is "{text}"' if value is not None else f"{label} is missing"
    return f"{shown}, {'which is excluded' if inverted else f'not {describe_header_value(matcher)}'}"


def _says_anything(matcher: Json) -> bool:
    return any(key in matcher for key in ("string_match", "range_match", *_OLD))


_OLD = ("exact_match", "prefix_match", "suffix_match", "contains_match", "safe_regex_match")


def _as_string(matcher: Json) -> Json:
    if "string_match" in matcher:
        result: Json = matcher["string_match"]
        return result
    return next({name.removesuffix("_match"): matcher[name]} for name in _OLD if name in matcher)


def _header_value(matcher: Json, value: str) -> bool:
    if "range_match" in matcher:
        bounds = matcher["range_match"]
        try:
            number = int(value)
        except ValueError:
            return False
        return int(bounds.get("start", 0)) <= number < int(bounds.get("end", 0))
    return string_matches(_as_string(matcher), value)


def describe_header_value(matcher: Json) -> str:
    """What a header must be, for a person."""
    if "range_match" in matcher:
        return f"in [{matcher['range_match'].get('start', 0)}, {matcher['range_match'].get('end', 0)})"
    return describe_string(_as_string(matcher)) if _says_anything(matcher) else "present"


def query_mismatch(matcher: Json, query: Mapping[str, str]) -> str:
    """route.v3.QueryParameterMatcher; `query` holds the first value of each parameter."""
    name = str(matcher.get("name", ""))
    value = query.get(name)
    if "string_match" not in matcher:
        wanted = bool(matcher.get("present_match", True))
        if (value is not None) == wanted:
            return ""
        return f"query parameter {name} is {'missing' if value is None else 'present'}"
    if value is None:
        return f"query parameter {name} is missing"
    if string_matches(matcher["string_match"], value):
        return ""
    return f'query parameter {name} is "{value}", not {describe_string(matcher["string_match"])}'


def query_of(path: str) -> dict[str, str]:
    """Parameters of a :path, the first value of each."""
    result: dict[str, str] = {}
    for name, value in parse_qsl(path.partition("?")[2].partition("#")[0], keep_blank_values=True):
        result.setdefault(name, value)
    return result


def without_query(path: str) -> str:
    """The path alone: no query, no fragment."""
    return path.partition("?")[0].partition("#")[0]


def path_mismatch(match: Json, full_path: str) -> str:
    """The path part of a route.v3.RouteMatch."""
    path = without_query(full_path)
    fold = match.get("case_sensitive") is False
    have = path.lower() if fold else path
    kind = next((k for k in ("prefix", "path", "path_separated_prefix", "safe_regex") if k in match), "")
    if not kind:
        return "the route takes CONNECT requests only" if "connect_matcher" in match else ""
    wanted = match[kind]
    if kind == "safe_regex":
        matched = regex_matches(str(wanted.get("regex", "")), path)
    else:
        text = str(wanted).lower() if fold else str(wanted)
        matched = {
            "prefix": have.startswith(text),
            "path": have == text,
            "path_separated_prefix": have == text or have.startswith(f"{text}/"),
        }[kind]
    return "" if matched else f'path "{path}" is not {describe_path(match)}'


def describe_path(match: Json) -> str:
    """The path part of a route match, for a person."""
    case = " (in any case)" if match.get("case_sensitive") is False else ""
    if "safe_regex" in match:
        return f'all of it matching "{match["safe_regex"].get("regex", "")}"'
    if "path" in match:
        return f'"{match["path"]}"{case}'
    if "path_separated_prefix" in match:
        return f'"{match["path_separated_prefix"]}" or below it{case}'
    return f'beginning with "{match.get("prefix", "")}"{case}'
