"""A world as plain values and back, so that another process can look at it. Pure."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from mlmesh_local.model import World
from mlmesh_local.resources import Document, ResourceSet, load_resources
from mlmesh_local.resources.model_sidecars import ProxySettings
from mlmesh_local.resources.parse import DOCUMENT_BYTES_MAX

_OWN = frozenset({"resources"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Text of resources, and the line of the file on which it begins (from 1)."""

    source: str
    line: int
    text: str


def documents_of(resources: ResourceSet) -> list[Placed]:
    """The texts that resources were read from, in their order; of a List, whose items share it, once."""
    found: list[Placed] = []
    seen: set[tuple[str, str]] = set()
    for resource in resources:
        key = (resource.source, resource.text)
        # What was made from other resources has no text: it is made again.
        if resource.text and key not in seen:
            seen.add(key)
            found.append(Placed(source=resource.source, line=max(resource.spec.meta.at.line, 1), text=resource.text))
    return found


def resources_of(documents: Iterable[Placed]) -> ResourceSet:
    """Resources of texts, on their lines. Raises InvalidResource as reading them the first time would."""
    loaded = load_resources(
        Document(source=one.source, text="\n" * min(one.line - 1, DOCUMENT_BYTES_MAX) + one.text) for one in documents
    )
    return ResourceSet().apply(loaded).resources


def values_of(world: World) -> dict[str, Any]:
    """Everything of a world but its resources, as JSON values."""
    return {
        field.name: _plain(getattr(world, field.name)) for field in dataclasses.fields(world) if field.name not in _OWN
    }


def world_of(resources: ResourceSet, values: Mapping[str, Any]) -> World:
    """The world that `values_of` was made from. Values that this version does not know are left out."""
    return typing.cast("World", _dataclass(World, {**values, "resources": resources}))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _dataclass(kind: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind, localns={"ResourceSet": ResourceSet, "ProxySettings": ProxySettings})
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: _value(hints[name], value) for name, value in values.items() if name in known})


def _value(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None or isinstance(value, ResourceSet):
        return value
    if origin in (types.UnionType, typing.Union):
        return _value(next(one for one in arguments if one is not types.NoneType), value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint, value)
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return tuple(_value(one, item) for one, item in zip(kinds, value, strict=True))
    if isinstance(value, Mapping):
        inner = arguments[1] if len(arguments) == 2 else Any
        return {key: _value(inner, item) for key, item in value.items()}
    # JSON has one kind of number.
    return hint(value) if hint in (int, float) else value
