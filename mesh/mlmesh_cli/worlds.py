"""What commands look at: the running mesh as it is, or what files would make of it, without any process."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.json_format import MessageToDict

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh_cli.connection import CONTROL_DEADLINE_S, Connection
from mlmesh_cli.defaults import choose_folders
from mlmesh_cli.errors import usage_error
from mlmesh_local.addresses import BLOCKS, Block
from mlmesh_local.model import World
from mlmesh_local.offline import offline_world, only_for_processes
from mlmesh_local.picture import Placed, resources_of, world_of
from mlmesh_local.reading import read_paths
from mlmesh_local.resources import Document, ResourceSet, load_resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A world, and what a person should know of how it was read."""

    world: World
    notes: tuple[str, ...] = ()


def split_target(text: str) -> tuple[str, int]:
    """Host and port of HOST[:PORT]; the port is 0 where there is none. Raises CliError for another port."""
    host, colon, port = text.rpartition(":")
    if not colon:
        return text, 0
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise usage_error(f'"{text}" is not HOST[:PORT]', "such as inference:9000")
    return host, int(port)


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE texts. Raises CliError for what is none; several values of one name are joined as in HTTP."""
    result: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise usage_error(f'{option} takes NAME=VALUE, not "{text}"', f"such as {option} x-user=ada")
        result[name] = f"{result[name]},{value}" if name in result else value
    return result


async def live_world(control: local_pb2_grpc.LocalMeshServiceAsyncStub) -> Seen:
    """The world that runs, with its resources on the lines of the files that they came from."""
    response = await control.GetWorld(local_pb2.GetWorldRequest(), timeout=CONTROL_DEADLINE_S)
    resources = resources_of(Placed(source=d.source, line=d.line, text=d.yaml) for d in response.documents)
    return Seen(world=world_of(resources, MessageToDict(response.world)))


async def look(state_dir: Path, paths: Sequence[Path] | None) -> Seen:
    """The world that files would make, or the one that runs where none are named."""
    if paths is not None:
        return files_world(paths)
    async with Connection.from_environment(state_dir) as connection:
        return await live_world(await connection.control())


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
    seen = offline(documents)
    return Seen(world=seen.world, notes=(*notes, *seen.notes))


def offline(documents: Iterable[Document]) -> Seen:
    """The world that documents would make."""
    applied = ResourceSet().apply(load_resources(documents, overlook=only_for_processes))
    world = offline_world(applied.resources, otlp_address=Block(second=BLOCKS.start).otlp)
    return Seen(world=world, notes=tuple(applied.warnings))
