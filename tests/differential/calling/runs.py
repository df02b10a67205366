"""Random worlds, given to meshes of real Envoys, with calls that are explained before they are made."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mlmesh_local.explain import Call, Explanation, Scene, explain
from mlmesh_local.resources import InvalidResource
from mlmesh_runtime.errors import MeshError
from tests.differential.calling.echo import Response, ask
from tests.differential.calling.meshes import CallMesh, DrivenCallMesh
from tests.differential.calling.verdicts import Became, differences
from tests.differential.calling.worlds import ISSUERS, RandomCall, fixed, world
from tests.support.pki import spiffe
from tests.support.tokens import Issuer

AT_ONCE = 8


@dataclass(kw_only=True)
class Tally:
    """What came of worlds: calls by outcome, and everything that was not as it was said."""

    calls: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    mirrored: int = 0
    refused: list[int] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Calls that were compared."""
        return sum(self.calls.values())


class Caller:
    """Makes calls in one mesh."""

    def __init__(self, mesh: CallMesh, folder: Path) -> None:
        self.mesh = mesh
        leaf = mesh.authority.leaf(spiffe("client"))
        (folder / "cert.pem").write_bytes(leaf.cert)
        (folder / "key.pem").write_bytes(leaf.key)
        self._secure = {protocol: _tls(folder, protocol) for protocol in ("h2", "http/1.1")}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._number = 0

    async def make(self, call: RandomCall, *, secure: bool) -> Became:
        """One call as it goes."""
        async with self._turns:
            self._number += 1
            name = f"call-{self._number}"
            response = await self._ask(call, name, secure=secure)
            return Became(call=call, response=response, arrived=self.mesh.journal.of(name))

    async def _ask(self, call: RandomCall, name: str, *, secure: bool) -> Response:
        proxy = self.mesh.proxy(f"{call.client or 'gateway'}-0")
        authority = f"{call.host}:{call.port}" if call.client else call.host
        headers = {
            ":method": call.method,
            ":scheme": "https" if secure else "http",
            ":path": call.path,
            ":authority": authority,
            **({"content-type": "application/grpc", "te": "trailers"} if call.grpc else {}),
            **call.headers,
            "x-call": name,
        }
        context = self._secure["h2" if call.grpc else "http/1.1"] if secure else None
        address = (proxy.outbound_address if call.client else proxy.pod_address, call.port)
        try:
            return await ask(
                address, headers, http2=call.grpc, secure=context, server_name=call.host, timeout_s=_patience(call)
            )
        except TimeoutError:
            return Response(status=0)


def _tls(folder: Path, protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.set_alpn_protocols([protocol])
    return context


def _patience(call: RandomCall) -> float:
    return 8.0 if "x-slow" in call.headers else 20.0


def asked(call: RandomCall) -> Call:
    """The call as `mlmesh explain` is asked about it."""
    return Call(
        source=call.client,
        host=call.host,
        port=call.port,
        path=call.path,
        http="" if call.grpc else call.method,
        headers=dict(call.headers),
        gateway="" if call.client else "gateway",
        identity="" if call.client else spiffe("client"),
    )


@contextlib.asynccontextmanager
async def meshes(program: Path | None, folder: Path) -> AsyncIterator[dict[str, CallMesh]]:
    """The mesh that ours configures, and the one that Istio does where it is here."""
    async with contextlib.AsyncExitStack() as stack:
        found: dict[str, CallMesh] = {}
        for side in ("ours", *(("istio",) if program else ())):
            place = folder / side
            place.mkdir()
            if side == "ours":
                started = CallMesh.start(place, fixed())
            else:
                assert program is not None
                started = DrivenCallMesh.driven(program, place, fixed())
            mesh = await stack.enter_async_context(started)
            assert isinstance(mesh, CallMesh)
            found[side] = mesh
        yield found


async def run(program: Path | None, folder: Path, seeds: Iterable[int]) -> Tally:
    """Compare the worlds of seeds."""
    tally = Tally()
    issuers = {name: Issuer(name) for name in ISSUERS}
    async with meshes(program, folder) as sides:
        callers = {name: Caller(mesh, folder / name) for name, mesh in sides.items()}
        for seed in seeds:
            for side, caller in callers.items():
                text, calls = world(seed, caller.mesh.outside, issuers)
                try:
                    await caller.mesh.give(text)
                except InvalidResource:
                    tally.refused.append(seed)
                    break
                except MeshError as error:
                    if side == "istio" and "Envoy refused" in error.message:
                        # Istio, too, sends what Envoy does not take: gateways whose servers have equal filter chains.
                        tally.refused.append(seed)
                        break
                    tally.found.append(f"seed {seed}, {side}: {error.message}")
                    break
                await _compare(tally, seed, side, caller, calls)
    return tally


async def _compare(tally: Tally, seed: int, side: str, caller: Caller, calls: list[RandomCall]) -> None:
    scene = Scene(caller.mesh.world, now_s=time.time(), sent=caller.mesh.sent())
    said: list[Explanation | MeshError] = []
    for call in calls:
        try:
            said.append(explain(scene, asked(call)))
        except MeshError as error:
            said.append(error)
    became = await asyncio.gather(*(caller.make(c, secure=_secure(s)) for c, s in zip(calls, said, strict=True)))
    for number, (one, done) in enumerate(zip(said, became, strict=True)):
        if isinstance(one, MeshError):
            tally.found.append(f"seed {seed}, {side}, call {number}: {done.call.shown()}\n  explain: {one.message}")
            continue
        tally.calls[one.outcome.kind] += 1
        tally.retried += len(done.arrived) > 1 and not one.mirrors
        tally.mirrored += len(done.arrived) > 1 and any(mirror.share for mirror in one.mirrors)
        tally.found += [
            f"seed {seed}, {side}, call {number}: {done.call.shown()}\n  {line}" for line in differences(one, done)
        ]


def _secure(said: Explanation | MeshError) -> bool:
    return isinstance(said, Explanation) and said.call["scheme"] == "https"


def search(program: Path | None, seeds: Iterable[int]) -> Tally:
    """Compare worlds with meshes of their own."""
    with tempfile.TemporaryDirectory(prefix="calls-") as folder:
        return asyncio.run(run(program, Path(folder), seeds))


def report(tally: Tally) -> None:
    """Print what came out."""
    for line in tally.found:
        sys.stdout.write(f"{line}\n")
    kinds = ", ".join(f"{count} {kind}" for kind, count in tally.calls.most_common())
    sys.stdout.write(f"{tally.total} calls: {kinds}; {tally.retried} of several attempts, {tally.mirrored} mirrored\n")
    if tally.refused:
        sys.stdout.write(f"refused worlds: {tally.refused}\n")
    sys.stdout.write(f"{len(tally.found)} not as said\n")
