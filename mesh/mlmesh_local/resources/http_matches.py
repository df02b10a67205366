"""Conditions of VirtualServices on requests: `spec.http[].match`."""

from __future__ import annotations

import re

from mlmesh_local.resources.domains import claim_path, gateway_name_problem, is_label, labels_problem
from mlmesh_local.resources.fields import Fields
from mlmesh_local.resources.model_routes import HttpMatch, StringMatch
from mlmesh_local.resources.regexes import regex_problem
from mlmesh_local.resources.tree import Node

HEADER_NAME = re.compile(r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")
PSEUDO_HEADERS = frozenset({":method", ":scheme", ":authority", ":path", ":status"})
_HOW = ("exact", "prefix", "regex")
PRESENT = StringMatch(how="present")


def parse_http_match(fields: Fields, index: int) -> HttpMatch:
    """Read one entry of `match`."""
    with fields:
        return HttpMatch(
            name=fields.text("name"),
            uri=_condition(fields, "uri", empty_prefix=True),
            ignore_uri_case=fields.boolean("ignoreUriCase"),
            scheme=_condition(fields, "scheme"),
            method=_condition(fields, "method"),
            authority=_condition(fields, "authority"),
            headers=_conditions(fields, "headers"),
            without_headers=_conditions(fields, "withoutHeaders", anything=True),
            query_params=_conditions(fields, "queryParams", names=False),
            port=match_port(fields),
            source_labels=source_labels(fields),
            source_namespace=_source_namespace(fields),
            gateways=gateway_names(fields, "gateways"),
            stat_prefix=fields.text("statPrefix"),
            index=index,
            at=fields.at,
        )


def match_port(fields: Fields) -> int:
    """`port` of a match; 0, as absent, is any."""
    return fields.integer("port", low=0, high=65535) or 0


def source_labels(fields: Fields) -> dict[str, str]:
    """`sourceLabels` of a match."""
    labels = dict(fields.text_map("sourceLabels"))
    for key, value in labels.items():
        problem = labels_problem(key, value)
        if problem:
            fields.refuse("sourceLabels", problem)
    return labels


def gateway_names(fields: Fields, name: str) -> tuple[str, ...]:
    """Names of gateways: "name", "namespace/name", "mesh"."""
    names: list[str] = []
    for item, at in fields.items(name):
        if not isinstance(item.value, str):
            fields.problems.add(at, f"must be a string, not {item.kind()}")
            continue
        problem = gateway_name_problem(item.value)
        if problem:
            fields.problems.add(at, problem)
        names.append(item.value)
    return tuple(names)


def _source_namespace(fields: Fields) -> str:
    namespace = fields.text("sourceNamespace")
    if namespace and not is_label(namespace):
        fields.refuse("sourceNamespace", f'"{namespace}" is not the name of a namespace')
    return namespace


def _conditions(
    fields: Fields, name: str, *, names: bool = True, anything: bool = False
) -> tuple[tuple[str, StringMatch], ...]:
    """A mapping of names to conditions; an empty condition holds where the name is present."""
    node = fields.raw(name)
    place = fields.place(name)
    if node is None:
        return ()
    if not isinstance(node.value, dict):
        fields.refuse(name, f"must be a mapping, not {node.kind()}")
        return ()
    result: list[tuple[str, StringMatch]] = []
    holder = Fields(node, place, fields.problems)
    for key, inner in node.value.items():
        at = holder.place(key, inner)
        if names and key not in PSEUDO_HEADERS and not claim_path(key) and not HEADER_NAME.match(key):
            fields.problems.add(at, f'"{key}" is not a header name')
        one = Fields(Node(inner.line, inner.value if inner.value is not None else {}), at, fields.problems)
        result.append((key, parse_string_match(one, anything=anything)))
    return tuple(sorted(result, key=lambda entry: entry[0]))


def _condition(fields: Fields, name: str, *, empty_prefix: bool = False) -> StringMatch | None:
    if not fields.has(name):
        fields.ignored(name)
        return None
    return parse_string_match(fields.message(name), empty_prefix=empty_prefix)


def parse_string_match(fields: Fields, *, empty_prefix: bool = False, anything: bool = False) -> StringMatch:
    """Read `exact`, `prefix` or `regex`; none of them holds whenever there is a value.

    ``anything``: the regular expression "*", which is none, means the same, as it does in Istio.
    """
    with fields:
        how = fields.one_of(*_HOW)
        values = {name: fields.text(name) for name in _HOW}
        if how == "exact":
            return StringMatch(how="exact", value=values["exact"])
        if how == "prefix":
            if not values["prefix"] and not empty_prefix:
                fields.refuse("prefix", "must not be empty")
            return StringMatch(how="prefix", value=values["prefix"])
        if how == "regex":
            if values["regex"] == "*" and anything:
                return PRESENT
            check_regex(fields, "regex", values["regex"])
            return StringMatch(how="regex", value=values["regex"])
        return PRESENT


def check_regex(fields: Fields, name: str, value: str) -> None:
    """Note a problem when it is not a regular expression that Envoy's RE2 takes."""
    problem = regex_problem(value)
    if problem:
        fields.refuse(name, problem)
