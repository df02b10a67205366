"""What commands look at: the running mesh as it is, or what files would make of it, without any process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlmesh_cli.defaults import choose_folders
from mlmesh_local.addresses import BLOCKS, Block
from mlmesh_local.model import World
from mlmesh_local.offline import offline_world
from mlmesh_local.reading import read_paths
from mlmesh_local.resources import Document, ResourceSet, load_resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A world, and what a person should know of how it was read."""

    world: World
    notes: tuple[str, ...] = ()


def read_files(paths: Sequence[Path]) -> tuple[tuple[Document, ...], tuple[str, ...]]:
    """Documents of files, folders, kustomize folders and "-"; none named: what `mlmesh up` would read here.

    Raises InvalidResource, CliError for what cannot be read.
    """
    if not paths:
        folders = choose_folders(Path())
        paths = (*folders.manifests, *folders.istio)
    reading = read_paths(paths, standard_input=sys.stdin.read)
    return reading.documents, reading.notes


def files_world(paths: Sequence[Path]) -> Seen:
    """The world that files would make: every replica runs, at addresses that depend on the files alone."""
    documents, notes = read_files(paths)
    applied = ResourceSet().apply(load_resources(documents))
    world = offline_world(applied.resources, otlp_address=Block(second=BLOCKS.start).otlp)
    return Seen(world=world, notes=(*notes, *applied.warnings))
