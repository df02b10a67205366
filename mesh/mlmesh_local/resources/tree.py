"""YAML as a tree in which every value knows its line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from mlmesh_local.resources.problems import At, InvalidResource, Problem
from mlmesh_local.resources.scalars import MERGE, plain_scalar

NODES_MAX = 200_000
"""Most values in one document: aliases can make a small file endless."""

DEPTH_MAX = 64
"""Most values inside each other; Kubernetes and Istio need about a dozen."""

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its line (from 1): a scalar, a mapping or a list of nodes."""

    line: int
    value: Scalar | dict[str, Node] | list[Node]

    def plain(self) -> Any:
        """The value without lines, as JSON would have it."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def kind(self) -> str:
        """What a person calls this value."""
        if isinstance(self.value, dict):
            return "a mapping"
        if isinstance(self.value, list):
            return "a list"
        if self.value is None:
            return "null"
        if isinstance(self.value, bool):
            return "a boolean"
        return "a number" if isinstance(self.value, int | float) else "a string"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """One YAML document: its root, where it starts, and its own text."""

    root: Node
    source: str
    text: str


def parse_yaml(source: str, text: str) -> Iterator[Tree]:
    """The documents of a text; empty ones are skipped. Raises InvalidResource for what is not YAML."""
    loader: _Loader | None = None
    try:
        # It reads at once, and refuses what is no text.
        loader = _Loader(_without_tabs(text))
        while loader.check_node():
            node = loader.get_node()
            if node is None or (isinstance(node, yaml.ScalarNode) and _scalar(node) is None):
                continue
            builder = _Builder(source)
            # One mark is enough: documents end where the next "---" begins, and comments between them do not matter.
            yield Tree(
                root=builder.build(node), source=source, text=text[node.start_mark.index : node.end_mark.index].rstrip()
            )
    except yaml.YAMLError as error:
        raise InvalidResource([_yaml_problem(source, error)]) from error
    except RecursionError as error:
        at = At(source=source, line=0)
        raise InvalidResource([Problem(at=at, message="values are nested too deeply")]) from error
    finally:
        if loader is not None:
            loader.dispose()


def _without_tabs(text: str) -> str:
    """JSON may be indented with tabs, which the reader of YAML does not take; in its strings there is none."""
    if "\t" in text and text.lstrip()[:1] in ("{", "["):
        try:
            json.loads(text)
        except ValueError:
            return text
        return text.replace("\t", " ")
    return text


def _yaml_problem(source: str, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    text = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    return Problem(at=At(source=source, line=mark.line + 1 if mark else 0), message=f"not valid YAML: {text}")


_PLAIN = "plain"
_TYPED = frozenset(f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null"))


class _Loader(yaml.SafeLoader):
    """Leaves it to `plain_scalar` what a scalar without quotes and tag is."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return tag


def _scalar(node: yaml.Node) -> Scalar:
    return plain_scalar(node.value) if node.tag == _PLAIN or node.tag in _TYPED else str(node.value)


def _key(node: yaml.ScalarNode) -> str:
    value = _scalar(node)
    return str(value).lower() if isinstance(value, bool) else str(node.value)


class _Builder:
    def __init__(self, source: str) -> None:
        self._source = source
        self._count = 0

    def build(self, node: yaml.Node, depth: int = 0) -> Node:
        line = node.start_mark.line + 1
        self._count += 1
        if depth > DEPTH_MAX:
            self._refuse(line, f"values are nested too deeply: more than {DEPTH_MAX} inside each other")
        if self._count > NODES_MAX:
            self._refuse(line, f"more than {NODES_MAX} values in one document")
        if isinstance(node, yaml.MappingNode):
            return Node(line, self._mapping(node, depth))
        if isinstance(node, yaml.SequenceNode):
            return Node(line, [self.build(item, depth + 1) for item in node.value])
        return Node(line, _scalar(node))

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        result: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(line, "a key must be a string")
            if key_node.value == MERGE and key_node.tag == _PLAIN:
                merged = {**self._merged(value_node, depth), **merged}
                continue
            key = _key(key_node)
            if key in result:
                self._refuse(line, f'the key "{key}" occurs twice')
            value = self.build(value_node, depth + 1)
            # A person looks for the key, not for the first line of what it holds.
            result[key] = Node(line, value.value)
        return {**merged, **result}

    def _merged(self, node: yaml.Node, depth: int) -> dict[str, Node]:
        """What `<<` brings: of several mappings the first that has a key."""
        result: dict[str, Node] = {}
        for one in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(one, yaml.MappingNode):
                self._refuse(node.start_mark.line + 1, '"<<" takes a mapping, or a list of mappings')
            value = self.build(one, depth + 1).value
            if isinstance(value, dict):
                result = {**value, **result}
        return result

    def _refuse(self, line: int, message: str) -> None:
        raise InvalidResource([Problem(at=At(source=self._source, line=line), message=message)])
