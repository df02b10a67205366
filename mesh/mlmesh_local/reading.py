"""YAML that a person names on a command line: files, folders, kustomize folders, and "-" for standard input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from mlmesh_local.resources.parse import Document, read_documents
from mlmesh_local.resources.problems import At, InvalidResource, Problem
from mlmesh_local.resources.tree import Node, parse_yaml

STANDARD_INPUT = "-"
KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
DEPTH_MAX = 16
"""Most kustomize folders inside each other."""

# Fields of a kustomization that change nothing that the mesh reads, or are followed here.
_HARMLESS = frozenset({"apiVersion", "kind", "metadata", "resources", "bases", "labels", "images", "buildMetadata"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Documents, and what of kustomizations was not followed: a person should know."""

    documents: tuple[Document, ...]
    notes: tuple[str, ...] = ()


def read_paths(paths: Iterable[Path | str], *, standard_input: Callable[[], str] = str) -> Reading:
    """Documents of files, of folders (not of folders in folders), and of kustomize folders by their `resources`.

    `standard_input` reads all of it when "-" is named. A file that several kustomizations name is read once. Patches
    and other changes that kustomize would make are not made: `notes` names them.

    Raises InvalidResource for what cannot be read.
    """
    reader = _Reader(standard_input)
    for path in paths:
        reader.add(path)
    return Reading(documents=tuple(reader.documents.values()), notes=tuple(dict.fromkeys(reader.notes)))


class _Reader:
    def __init__(self, standard_input: Callable[[], str]) -> None:
        self._standard_input = standard_input
        self.documents: dict[str, Document] = {}
        self.notes: list[str] = []

    def add(self, path: Path | str) -> None:
        if str(path) == STANDARD_INPUT:
            self.documents["standard input"] = Document(source="standard input", text=self._standard_input())
            return
        self._add(Path(path), depth=0)

    def _add(self, path: Path, *, depth: int) -> None:
        if not path.exists():
            raise _refusal(str(path), 0, "does not exist; name YAML files or folders of them")
        kustomization = next((path / name for name in KUSTOMIZATIONS if (path / name).is_file()), None)
        if kustomization is not None:
            self._follow(kustomization, depth=depth)
            return
        found = read_documents([path])
        if not found:
            raise _refusal(str(path), 0, "has no .yaml file; name YAML files or folders of them")
        for document in found:
            self.documents.setdefault(str(Path(document.source).resolve()), document)

    def _follow(self, kustomization: Path, *, depth: int) -> None:
        source = str(kustomization)
        if depth >= DEPTH_MAX:
            raise _refusal(source, 0, f"more than {DEPTH_MAX} kustomizations name each other")
        (document,) = read_documents([kustomization])
        for tree in parse_yaml(source, document.text):
            fields = tree.root.value if isinstance(tree.root.value, dict) else {}
            self._note(source, fields)
            for key in ("resources", "bases"):
                for item in _items(fields.get(key)):
                    place = Path(os.path.normpath(kustomization.parent / str(item.value)))
                    if "://" in str(item.value) or not place.exists():
                        raise _refusal(source, item.line, f'{key}: "{item.value}" is no file or folder here')
                    self._add(place, depth=depth + 1)

    def _note(self, source: str, fields: dict[str, Node]) -> None:
        for key, node in fields.items():
            if key in _HARMLESS or (key == "namespace" and node.value == "mlmesh"):
                continue
            self.notes.append(f'{source}:{node.line}: "{key}" is not followed; pipe `kustomize build` into "-" for it')


def _items(node: Node | None) -> list[Node]:
    return node.value if node is not None and isinstance(node.value, list) else []


def _refusal(source: str, line: int, message: str) -> InvalidResource:
    return InvalidResource([Problem(at=At(source=source, line=line), message=message)])
