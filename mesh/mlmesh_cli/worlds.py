"""What commands look at: the running mesh as it is, or what files would make of it, without any process."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh_cli.connection import CONTROL_DEADLINE_S, Connection
from mlmesh_cli.defaults import choose_folders
from mlmesh_cli.errors import usage_error
from mlmesh_local.addresses import BLOCKS, Block
from mlmesh_local.inspection import TYPES
from mlmesh_local.model import World
from mlmesh_local.offline import offline_world, only_for_processes
from mlmesh_local.picture import Placed, resources_of, world_of
from mlmesh_local.reading import read_paths
from mlmesh_local.resources import Document, ResourceSet, load_resources
from mlmesh_local.translate import Configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A world, and what a person should know of how it was read."""

    world: World
    notes: tuple[str, ...] = ()
    sent: Mapping[str, Configuration] = field(default_factory=dict)
    """What proxies were really told, by instance; empty where nothing runs."""


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


async def sent_to_all(control: local_pb2_grpc.LocalMeshServiceAsyncStub) -> dict[str, Configuration]:
    """What every connected sidecar was told, whoever made it."""
    request = local_pb2.GetConfigDumpRequest(content=True)
    response = await control.GetConfigDump(request, timeout=CONTROL_DEADLINE_S)
    result: dict[str, Configuration] = {}
    for proxy in response.proxies:
        named = result.setdefault(proxy.name, {})
        for one in proxy.resources:
            if one.type in TYPES:
                named.setdefault(TYPES[one.type], {})[one.name] = _whole_numbers(MessageToDict(one.content))
    return {name: named for name, named in result.items() if named}


def _whole_numbers(value: Any) -> Any:
    """A Struct has one kind of number; ports and weights are whole."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


async def look(state_dir: Path, paths: Sequence[Path] | None, *, sent: bool = False) -> Seen:
    """The world that files would make, or the one that runs where none are named; `sent`: with what it sent."""
    if paths is not None:
        return files_world(paths)
    async with Connection.from_environment(state_dir) as connection:
        control = await connection.control()
        seen = await live_world(control)
        return dataclasses.replace(seen, sent=await sent_to_all(control)) if sent else seen


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
