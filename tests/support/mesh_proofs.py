"""Proofs under load, as often as wanted: routes and certificates change, policies change, and every call is counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from tests.support.envoy_mesh import CHAT, EnvoyMesh, unary
from tests.support.mesh_documents import split

CALLERS = 3
STREAMS = 2

POLICY = """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: server}
spec:
  selector: {matchLabels: {app: server}}
  rules: [{from: [{source: {principals: [cluster.local/ns/mlmesh/sa/%s]}}]}]
---
"""


@dataclass
class Proof:
    """What happened while routes changed: calls and stream messages that went well, and every failure in words."""

    unary: int = 0
    messages: int = 0
    changes: int = 0
    rotations: int = 0
    failures: list[str] = field(default_factory=list)
    ack_s: list[float] = field(default_factory=list)
    """From each change to its last acknowledgement."""


@dataclass
class PolicyProof:
    """Calls on open connections after a policy's acknowledgement, and those that it should have decided otherwise."""

    calls: int = 0
    wrong: list[str] = field(default_factory=list)
    ack_s: list[float] = field(default_factory=list)


async def change_routes(mesh: EnvoyMesh, *, changes: int, rotations: int) -> Proof:
    """Change weights and certificates while unary calls and messages on open streams go on without pause.

    Of every ten changes one takes a cluster away or brings one.
    """
    proof = Proof()
    await mesh.apply(split(50, 50))
    rotate_every = max(1, changes // rotations) if rotations else changes + 1
    async with _load(mesh, proof):
        for number in range(changes):
            weight = number * 37 % 101
            began = time.perf_counter()
            await mesh.apply(split(weight, 100 - weight), timeout_s=30)
            proof.ack_s.append(time.perf_counter() - began)
            proof.changes += 1
            if number % rotate_every == rotate_every - 1 and proof.rotations < rotations:
                mesh.rotate()
                proof.rotations += 1
        for proxy in mesh.proxies:
            await mesh.secrets_taken(proxy.id)
    return proof


@asynccontextmanager
async def _load(mesh: EnvoyMesh, proof: Proof) -> AsyncIterator[None]:
    stop = asyncio.Event()

    async def call() -> None:
        async with mesh.channel() as channel:
            while not stop.is_set():
                answer = await unary(channel, b"", {}, 10)
                if answer.code is grpc.StatusCode.OK:
                    proof.unary += 1
                else:
                    proof.failures.append(f"unary: {answer.code.name} {answer.text}")

    async def talk() -> None:
        async with mesh.channel() as channel:
            stream = channel.stream_stream(CHAT)(timeout=3600)
            try:
                while not stop.is_set():
                    await stream.write(b"x")
                    if not (await stream.read()).endswith(b":x"):
                        proof.failures.append("stream: a wrong answer")
                    proof.messages += 1
                await stream.done_writing()
                if await stream.code() is not grpc.StatusCode.OK:
                    proof.failures.append(f"stream: ended with {await stream.code()}")
            except (grpc.aio.AioRpcError, AttributeError) as error:
                proof.failures.append(f"stream: {error}")

    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(call())
        for _ in range(STREAMS):
            group.create_task(talk())
        try:
            yield
        finally:
            stop.set()


async def switch_policy(mesh: EnvoyMesh, *, rounds: int) -> PolicyProof:
    """Deny and allow by turns; after each acknowledgement call on connections that were open before."""
    proof = PolicyProof()
    await mesh.apply(split(50, 50), POLICY % "client")
    channels = [mesh.channel() for _ in range(CALLERS)]
    for channel in channels:
        await unary(channel, b"", {}, 10)
    for _ in range(rounds):
        for account, expected in (("nobody", "PERMISSION_DENIED"), ("client", "OK")):
            proof.ack_s.append(await mesh.apply(POLICY % account, timeout_s=30))
            for answer in await asyncio.gather(*(unary(channel, b"", {}, 10) for channel in channels)):
                proof.calls += 1
                if answer.code.name != expected:
                    proof.wrong.append(f"{answer.code.name} although {account} alone may call")
    for channel in channels:
        await channel.close()
    return proof
