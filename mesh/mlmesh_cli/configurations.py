"""What sidecars were told and what they run: asked from the control plane and from Envoys' admin interfaces."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict

from mlmesh.local.v1 import local_pb2, local_pb2_grpc
from mlmesh_cli.connection import CONTROL_DEADLINE_S
from mlmesh_local.inspection import TYPES
from mlmesh_local.live.running import REQUEST, Compared, Running, Sent, compare, running
from mlmesh_local.sidecar import admin
from mlmesh_runtime.errors import NotReady

ADMIN_S = 5.0
SCHEMA = "mlmesh.config/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What one sidecar was told; ``live`` is filled by `compare_all`."""

    message: local_pb2.ProxyConfig

    @property
    def name(self) -> str:
        """The instance."""
        return self.message.name

    def counts(self) -> dict[str, tuple[int, int]]:
        """Resources that the sidecar runs, and that it was sent, by type."""
        found: dict[str, tuple[int, int]] = {}
        for one in self.message.resources:
            acked, sent = found.get(one.type, (0, 0))
            found[one.type] = (acked + one.acked, sent + 1)
        return {kind: found[kind] for kind in (*TYPES, "secrets") if kind in found}

    def sent(self) -> list[Sent]:
        """Resources but secrets, with their content."""
        return [
            Sent(type=one.type, name=one.name, version=one.version, content=MessageToDict(one.content), acked=one.acked)
            for one in self.message.resources
            if one.type in TYPES
        ]

    def document(self, live: Live | None, *, content: bool = False) -> dict[str, Any]:
        """As JSON values."""
        message = self.message
        result: dict[str, Any] = {
            "name": message.name,
            "connected": message.connected,
            "version": message.version,
            "acked_version": message.acked_version,
            "rejection": message.rejection,
            "counts": {kind: {"acked": acked, "sent": sent} for kind, (acked, sent) in self.counts().items()},
        }
        if content:
            result["resources"] = [_resource(one) for one in message.resources]
        if live is not None:
            result["live"] = live.document(content=content)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What an Envoy runs, and how it compares with what it was sent; ``problem`` when it could not be asked."""

    resources: tuple[Running, ...] = ()
    compared: tuple[Compared, ...] = ()
    problem: str = ""

    def document(self, *, content: bool) -> dict[str, Any]:
        """As JSON values."""
        by_key = {(one.type, one.name, one.state): one.content for one in self.resources}
        return {
            "problem": self.problem,
            "resources": [
                {
                    "type": one.type,
                    "name": one.name,
                    "sent": one.sent,
                    "running": one.running,
                    "verdict": one.verdict,
                    **({"content": by_key.get((one.type, one.name, "active"))} if content else {}),
                }
                for one in self.compared
            ],
        }


def _resource(one: local_pb2.SentResource) -> dict[str, Any]:
    result: dict[str, Any] = {
        "type": one.type,
        "name": one.name,
        "version": one.version,
        "size": one.size,
        "acked": one.acked,
    }
    if one.HasField("content"):
        result["content"] = MessageToDict(one.content)
    return result


async def summaries(
    control: local_pb2_grpc.LocalMeshServiceAsyncStub, *, proxy: str = "", kind: str = "", content: bool = False
) -> list[Told]:
    """What sidecars were told, by name."""
    request = local_pb2.GetConfigDumpRequest(proxy=proxy, type=kind, content=content)
    response = await control.GetConfigDump(request, timeout=CONTROL_DEADLINE_S)
    return [Told(message=one) for one in sorted(response.proxies, key=lambda one: one.name)]


async def compare_all(proxies: Sequence[Told], *, kind: str = "") -> dict[str, Live]:
    """Each Envoy's own view beside what it was sent, one after the other."""
    return {one.name: await _live(one, kind) for one in proxies}


async def _live(told: Told, kind: str) -> Live:
    host = told.message.admin_address.rpartition(":")[0]
    if not host:
        return Live(problem="it has no admin interface")
    try:
        found = running(json.loads(await admin(host, REQUEST, timeout_s=ADMIN_S)))
    except NotReady as error:
        return Live(problem=error.message)
    except ValueError as error:
        return Live(problem=f"its admin interface tells nothing of use: {error}")
    chosen = tuple(one for one in found if kind in ("", one.type))
    return Live(resources=chosen, compared=tuple(compare(told.sent(), chosen)))


def not_same(compared: Mapping[str, Live]) -> int:
    """How many resources are not what was sent; what drains, and what nothing refers to, does not count."""
    fine = ("same", "draining", "unused")
    return sum(one.verdict not in fine for live in compared.values() for one in live.compared)
