"""Which resources `mlmesh delete` means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlmesh_cli.errors import usage_error
from mlmesh_local.resources.parse import Document, load_names

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


def of_files(documents: Sequence[tuple[Path, str]]) -> list[Name]:
    """What files define: only kinds and names are read. Raises InvalidResource for what has none."""
    return load_names(Document(source=str(path), text=text) for path, text in documents)
