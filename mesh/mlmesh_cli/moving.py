"""Open inference streams: where they are, and moving them to where the mesh's weights want them.

A mesh chooses where a stream goes when it is opened; weights that change later reach new streams only. So after a
change the processes are asked, each by itself, to have a share of their streams open again: they land by the weights of
now.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import grpc
import yaml

from mlmesh.inference.v1 import control_pb2, control_pb2_grpc
from mlmesh.local.v1 import local_pb2
from mlmesh_cli.config import full_host
from mlmesh_cli.connection import CONTROL_DEADLINE_S, Connection, duration
from mlmesh_cli.errors import usage_error

if TYPE_CHECKING:
    from mlmesh.local.v1.local_pb2_grpc import LocalMeshServiceAsyncStub

INFERENCE_APP = "inference"
ROUNDS_MAX = 4
_SETTLE_S = 5.0
_LOOK_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """An inference process: its name, where its own port is, the subset that it is of, and streams by model version
    ("models/m/versions/1")."""

    name: str
    address: str
    subset: str = ""
    streams: Mapping[str, int]

    @property
    def count(self) -> int:
        """Open streams."""
        return sum(self.streams.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What came of asking.

    Attributes:
        streams: that matched, before. asked: how many times one was asked. pinned: cannot move.
        processes: as they were after it.
    """

    streams: int
    asked: int
    pinned: int
    processes: tuple[Process, ...] = ()


async def processes_of(connection: Connection, addresses: Sequence[str] = ()) -> list[Process]:
    """The inference processes of the laptop mesh, or at these addresses, with their open streams.

    Raises CliError when there is no mesh, or a name does not resolve.
    """
    found = await resolve(addresses) if addresses else await _of_mesh(connection)
    return list(await asyncio.gather(*(_look(process) for process in found)))


async def resolve(addresses: Sequence[str]) -> list[Process]:
    """A process an address that the names stand for: on a cluster the name of a headless Service is all of its pods."""
    loop = asyncio.get_running_loop()
    found: dict[str, Process] = {}
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise usage_error(f"{address!r} is no address", "give host:port")
        try:
            infos = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            raise usage_error(
                f"{host} does not resolve: {error.strerror}", "is it the name of a headless Service?"
            ) from None
        for *_, place in infos:
            number = str(place[0])
            shown = f"[{number}]:{port}" if ":" in number else f"{number}:{port}"
            found.setdefault(shown, Process(name=shown, address=shown, streams={}))
    return list(found.values())


async def _of_mesh(connection: Connection) -> list[Process]:
    status = await connection.status()
    subsets = await _subsets(await connection.control())
    return [
        Process(
            name=instance.name,
            address=instance.application_address,
            subset=next(
                (name for name, labels in subsets.items() if labels.items() <= dict(instance.labels).items()), ""
            ),
            streams={},
        )
        for instance in sorted(status.instances, key=lambda i: i.name)
        if instance.labels.get("app") == INFERENCE_APP and instance.state == local_pb2.INSTANCE_STATE_READY
    ]


async def _subsets(control: LocalMeshServiceAsyncStub) -> dict[str, dict[str, str]]:
    """Labels by subset of the inference service."""
    listed = await control.ListResources(
        local_pb2.ListResourcesRequest(kind="DestinationRule"), timeout=CONTROL_DEADLINE_S
    )
    found: dict[str, dict[str, str]] = {}
    for resource in listed.resources:
        for document in yaml.safe_load_all(resource.yaml):
            spec = (document or {}).get("spec", {})
            if full_host(spec.get("host", "")) == full_host(INFERENCE_APP):
                found |= {subset["name"]: dict(subset.get("labels", {})) for subset in spec.get("subsets", [])}
    return found


async def _look(process: Process) -> Process:
    async with grpc.aio.insecure_channel(process.address) as channel:
        stub: Any = control_pb2_grpc.InferenceControlServiceStub(channel)
        request = control_pb2.ListServedVersionsRequest()
        listed = await stub.ListServedVersions(request, timeout=CONTROL_DEADLINE_S)
    return replace(process, streams={s.name: s.stream_count for s in listed.served_versions if s.stream_count})


async def move(
    processes: Sequence[Process], shares: Mapping[str, float], *, parent: str = "", spread_s: float = 0.0
) -> Moved:
    """Ask processes to move a share of their streams.

    Args:
        shares: by name of the process; one that is not named is not asked.
        parent: only streams of this model or version. spread_s: time over which the asking is spread.
    """

    async def ask(process: Process) -> control_pb2.MoveStreamsResponse:
        async with grpc.aio.insecure_channel(process.address) as channel:
            stub: Any = control_pb2_grpc.InferenceControlServiceStub(channel)
            request = control_pb2.MoveStreamsRequest(
                parent=parent, share=shares[process.name], spread=duration(spread_s)
            )
            answer: control_pb2.MoveStreamsResponse = await stub.MoveStreams(request, timeout=CONTROL_DEADLINE_S)
            return answer

    answers = await asyncio.gather(*(ask(process) for process in processes if process.name in shares))
    return Moved(
        streams=sum(answer.stream_count for answer in answers),
        asked=sum(answer.asked_count for answer in answers),
        pinned=sum(answer.pinned_count for answer in answers),
    )


async def follow_weights(connection: Connection, *, spread_s: float = 0.5) -> Moved:
    """Move open streams until they are spread as the routes of now say, as nearly as whole streams can be.

    Where one lands is chance, so it takes a few rounds: each moves what is too many, and less of it is left to chance.
    """
    weights = await _weights(connection)
    processes = await processes_of(connection)
    streams, asked, pinned = sum(p.count for p in processes), 0, 0
    for _ in range(ROUNDS_MAX if len(weights) and streams else 0):
        places = Counter[str]()
        for process in processes:
            places[process.subset] += process.count
        if settled(places, weights):
            break
        shares = shares_to_move(places, weights)
        told = await move(
            processes,
            {p.name: shares[p.subset] for p in processes if p.subset in shares and p.count},
            spread_s=spread_s,
        )
        asked, pinned = asked + told.asked, told.pinned
        if not told.asked:
            break
        processes = await _settle(connection, processes, spread_s)
    return Moved(streams=streams, asked=asked, pinned=pinned, processes=tuple(processes))


async def _weights(connection: Connection) -> dict[str, float]:
    """Weight by subset of the inference service's split; empty where there is none."""
    control = await connection.control()
    request = local_pb2.ListRoutesRequest(host=full_host(INFERENCE_APP))
    routes = (await control.ListRoutes(request, timeout=CONTROL_DEADLINE_S)).routes
    # The last rule is the one without a condition, by which streams without special headers go.
    for route in reversed(routes):
        weights = {share.subset: share.configured_share for share in route.destinations}
        if weights and all(weight >= 0 for weight in weights.values()):
            return weights
    return {}


async def _settle(connection: Connection, before: Sequence[Process], spread_s: float) -> list[Process]:
    """The processes once as many streams are open as before, and no longer move; at most _SETTLE_S later."""
    loop = asyncio.get_running_loop()
    end = loop.time() + spread_s + _SETTLE_S
    await asyncio.sleep(spread_s + _LOOK_S)
    seen = await processes_of(connection)
    while loop.time() < end:
        await asyncio.sleep(_LOOK_S)
        last, seen = seen, await processes_of(connection)
        if seen == last and sum(p.count for p in seen) >= sum(p.count for p in before):
            break
    return seen


def shares_to_move(streams: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    """The share of each place's streams to ask so that afterwards streams are spread as the weights say.

    Who is asked lands anywhere by the weights, also where it was. So with b the weights, a the present shares and k the
    smallest a/b of all places that have a weight, asking the share 1 - k*b/a of each place's streams makes the
    expected shares b, and no smaller number of moves does.

    Args:
        streams: by place, how many are open. weights: by place, any positive scale.
    """
    total, weight = sum(streams.values()), sum(weights.values())
    if not total or weight <= 0:
        return {}
    wanted = {place: value / weight for place, value in weights.items() if value > 0}
    smallest = min(streams.get(place, 0) / total / share for place, share in wanted.items())
    found = {}
    for place, count in streams.items():
        if count:
            share = 1 - smallest * wanted.get(place, 0.0) / (count / total)
            if share > 1e-9:
                found[place] = min(1.0, share)
    return found


def settled(streams: Mapping[str, int], weights: Mapping[str, float]) -> bool:
    """Whether no place is off by more than one stream or a twentieth of all, and none without weight has any."""
    total, weight = sum(streams.values()), sum(weights.values())
    if not total or weight <= 0:
        return True
    for place in {*streams, *weights}:
        share = max(0.0, weights.get(place, 0.0)) / weight
        count = streams.get(place, 0)
        if (not share and count) or abs(count - share * total) > max(1.0, total / 20):
            return False
    return True
