"""A gRPC client without a sidecar, in a process of its own: gRPC reads its bootstrap from the environment once.

Run as a program it takes a JSON object a line on standard input and answers with one:
{"target": "server:9000", "calls": 10, "metadata": {...}} -> {"answers": [[code, text, metadata], ...]}
{"stream": "open"}, {"stream": "say"} -> {"text": ...}
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
from grpc import experimental

from mlmesh_local.proxyless import bootstrap as files
from mlmesh_local.proxyless.node import ProxylessNode, node_id
from tests.support.envoy_mesh import CHAT, UNARY, EnvoyMesh
from tests.support.pki import Leaf, spiffe

CALL_S = 20.0


class XdsClient:
    """The process, seen by a test."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, mesh: EnvoyMesh, folder: Path, *, tolerated: frozenset[str] = frozenset()) -> XdsClient:
        """A client of the ServiceAccount "client"."""
        name = node_id("mlmesh", "client", folder.name)
        token = f"token of {name}"
        node = ProxylessNode(
            id=name, namespace="mlmesh", service_account="client", labels={}, tolerated=tolerated, token=token
        )
        path = _write(folder, mesh, node, mesh.authority.leaf(spiffe("client")))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.xds_client",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "GRPC_XDS_BOOTSTRAP": str(path)},
        )
        return cls(process)

    async def ask(self, **question: Any) -> dict[str, Any]:
        """One question and its answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        async with asyncio.timeout(CALL_S + 5):
            line = await self._process.stdout.readline()
        assert line, "the client has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def calls(
        self, number: int = 1, target: str = "server:9000", metadata: Mapping[str, str] | None = None
    ) -> list[tuple[str, str]]:
        """Code and text of unary calls, one after the other."""
        answer = await self.ask(target=target, calls=number, metadata=dict(metadata or {}))
        return [(code, text) for code, text in answer["answers"]]

    async def spread(self, number: int, **arguments: Any) -> Counter[str]:
        """How often each backend answered."""
        found = await self.calls(number, **arguments)
        assert {code for code, _ in found} == {"OK"}, found[:3]
        return Counter(text for _, text in found)

    async def stop(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        async with asyncio.timeout(10):
            await self._process.wait()


def _write(folder: Path, mesh: EnvoyMesh, node: ProxylessNode, leaf: Leaf) -> Path:
    folder.mkdir()
    (folder / files.CHAIN_FILE).write_bytes(leaf.cert)
    (folder / files.KEY_FILE).write_bytes(leaf.key)
    (folder / files.ROOTS_FILE).write_bytes(mesh.authority.pem)
    path = folder / files.BOOTSTRAP_FILE
    path.write_text(json.dumps(files.bootstrap(node, ads=mesh.control_plane, folder=str(folder))))
    return path


def main() -> None:
    """The process."""
    credentials = grpc.xds_channel_credentials(experimental.insecure_channel_credentials())
    channels: dict[str, grpc.Channel] = {}
    streams: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        target = question.get("target", "server:9000")
        channel = channels.get(target)
        if channel is None:
            channel = channels[target] = grpc.secure_channel(f"xds:///{target}", credentials)
        if "stream" in question:
            answer: dict[str, Any] = {"text": _say(streams, channel, question["stream"])}
        else:
            call = channel.unary_unary(UNARY)
            metadata = tuple(question.get("metadata", {}).items())
            answer = {"answers": [_call(call, metadata) for _ in range(question["calls"])]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for channel in channels.values():
        channel.close()


def _call(call: Any, metadata: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    try:
        return "OK", call(b"", timeout=CALL_S, metadata=metadata).decode()
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""


def _say(streams: dict[str, Any], channel: grpc.Channel, text: str) -> str:
    import queue

    if not streams:
        messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        streams["out"] = messages
        streams["in"] = channel.stream_stream(CHAT)(iter(messages.get, b"end"), timeout=60)
    streams["out"].put(text.encode())
    if text == "end":
        return "ended" if next(streams["in"], None) is None else "went on"
    answer: bytes = next(streams["in"])
    return answer.decode()


if __name__ == "__main__":
    main()
