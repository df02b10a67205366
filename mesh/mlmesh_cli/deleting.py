"""Which resources `mlmesh delete` means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlmesh_cli.errors import usage_error
from mlmesh_local.resources.parse import load_resources, read_documents

Name = tuple[str, str]
"""Kind and "{namespace}/{name}"; the namespace of a Namespace is empty."""

_OF_NO_NAMESPACE = frozenset({"Namespace", "GatewayClass"})


def named(words: Sequence[str], namespace: str) -> list[Name]:
    """Names written as KIND NAME or KIND/NAME. Raises CliError (wrong usage)."""
    found: list[Name] = []
    rest = list(words)
    while rest:
        kind, slash, name = rest.pop(0).partition("/")
        if not slash:
            if not rest:
                raise usage_error(f"{kind!r} is a kind without a name", "mlmesh delete VirtualService inference")
            name = rest.pop(0)
        found.append((kind, name if "/" in name else f"{'' if kind in _OF_NO_NAMESPACE else namespace}/{name}"))
    return found


def of_files(paths: Sequence[Path]) -> list[Name]:
    """What files define. Raises InvalidResource for what cannot be read."""
    return [(resource.kind, resource.name) for resource in load_resources(read_documents(paths))] if paths else []
