"""What is known of clients without a sidecar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlmesh_local.model import NodeStatus
from mlmesh_local.proxyless.build import Client
from mlmesh_local.proxyless.node import ProxylessNode


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientStatus:
    """One client process.

    Attributes:
        node: who it is.
        targets: "host:port" that it dialled.
        acked_version: configuration that all of its streams have acknowledged; empty while one has not.
        rejection: gRPC's own text when it refused a resource.
        refused: calls of these fail with UNAVAILABLE, and why.
        does_without: fields that it declared to do without.
    """

    node: ProxylessNode
    targets: tuple[str, ...]
    acked_version: str
    rejection: str
    refused: tuple[str, ...]
    does_without: tuple[str, ...]


def client_status(node: ProxylessNode, streams: Sequence[NodeStatus], client: Client | None) -> ClientStatus:
    """Status of a client by its streams: one for each target that it dials."""
    acked = {status.acked_version for status in streams}
    refusals = client.refusals() if client else []
    return ClientStatus(
        node=node,
        targets=tuple(sorted(client.asked)) if client else (),
        acked_version=acked.pop() if len(acked) == 1 else "",
        rejection=next((status.rejection for status in streams if status.rejection), ""),
        refused=tuple(one.text for one in refusals if one.root not in node.tolerated),
        does_without=tuple(one.text for one in refusals if one.root in node.tolerated),
    )
