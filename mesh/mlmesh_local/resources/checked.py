"""Fields that several resources about hosts have, with Istio's rules (pkg/config/validation)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from mlmesh_local.resources.domains import LABEL_MAX, domain_problem, is_label, labels_problem
from mlmesh_local.resources.fields import Fields

T = TypeVar("T")


def part(fields: Fields, name: str, parse: Callable[[Fields], T]) -> T | None:
    """A mapping read by `parse`, or None when absent."""
    if not fields.has(name):
        fields.ignored(name)
        return None
    with fields.message(name) as inner:
        return parse(inner)


def duration_s(fields: Fields, name: str, *, low_s: float = 0.001) -> float | None:
    """A duration of whole milliseconds, in seconds; None when absent."""
    seconds = fields.duration_s(name, low_s=low_s)
    if seconds is not None and abs(seconds * 1000 - round(seconds * 1000)) > 1e-6:
        fields.refuse(name, "must be a whole number of milliseconds")
        return None
    return seconds


def host(fields: Fields, name: str, *, wildcard: bool) -> str:
    """A host name that must be there."""
    text = fields.text(name, required=True)
    problem = domain_problem(text, wildcard=wildcard) if text else ""
    if problem:
        fields.refuse(name, problem)
    return text


def labels(fields: Fields, name: str) -> Mapping[str, str]:
    """Labels of a workload."""
    found = fields.text_map(name)
    for key, value in found.items():
        problem = labels_problem(key, value)
        if problem:
            fields.refuse(name, problem)
    return found


def selected(fields: Fields, name: str) -> Mapping[str, str]:
    """Labels that a selector asks for."""
    found = fields.text_map(name)
    for key, value in found.items():
        if not key:
            fields.refuse(name, "must not have an empty key")
        if "*" in key or "*" in value:
            fields.refuse(name, f'"{key}: {value}": a selector knows no wildcards')
        if len(value) > LABEL_MAX:
            fields.refuse(name, f'the value of "{key}" has {len(value)} characters; a label has at most {LABEL_MAX}')
    return found


def selector(fields: Fields, name: str, labels_name: str) -> Mapping[str, str] | None:
    """A `workloadSelector`, whose labels are under `labels_name`; None when absent. Without labels it selects all."""
    return part(fields, name, lambda inner: selected(inner, labels_name))


def exports(fields: Fields, namespace: str, *, nobody: bool = False, own_only: bool = False) -> tuple[str, ...]:
    """`exportTo`: "*" (everyone), "." (the own namespace), namespaces, and with `nobody` "~"; empty when absent.

    `own_only`: a rule with a workloadSelector is for its own namespace.
    """
    targets = fields.texts("exportTo")
    named: set[str] = set()
    for target in targets:
        full = namespace if target == "." else target
        if full in named:
            fields.refuse("exportTo", f'"{target}" occurs twice')
        elif target != "*" and not is_label(full) and not (nobody and target == "~"):
            fields.refuse("exportTo", f'"{target}" is neither a namespace nor "." nor "*"')
        named.add(full)
    for alone in ("*", "~"):
        if alone in named and len(targets) > 1:
            fields.refuse("exportTo", f'"{alone}" goes with nothing else')
    if own_only and named - {namespace}:
        fields.refuse("exportTo", "a rule with a workloadSelector is for its own namespace only")
    return targets
