"""SPIRE's own server and agent on this machine, for tests; and a small Workload API of our own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from mlmesh_local.pki import Certificate
from mlmesh_local.workload_api import METADATA, message

START_S = 30.0
TRUST_DOMAIN = "cluster.local"

_SERVER = """
server {{
  bind_address = "127.0.0.1"
  bind_port = "{port}"
  socket_path = "{folder}/api.sock"
  trust_domain = "{domain}"
  data_dir = "{folder}/server"
  log_level = "WARN"
  default_x509_svid_ttl = "{ttl}"
}}
plugins {{
  DataStore "sql" {{ plugin_data {{ database_type = "sqlite3", connection_string = "{folder}/store.sqlite3" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "memory" {{ plugin_data {{}} }}
}}
"""
_AGENT = """
agent {{
  data_dir = "{folder}/agent"
  server_address = "127.0.0.1"
  server_port = "{port}"
  socket_path = "{folder}/agent.sock"
  trust_domain = "{domain}"
  insecure_bootstrap = true
  log_level = "WARN"
}}
plugins {{
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  KeyManager "memory" {{ plugin_data {{}} }}
  WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""


class Spire:
    """A running SPIRE; ``socket`` is the address of its Workload API."""

    def __init__(self, tools: Path, folder: Path) -> None:
        self._tools, self._folder = tools, folder
        self.socket = f"unix://{folder}/agent.sock"
        self._processes: list[asyncio.subprocess.Process] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, tools: Path, folder: Path, *, ttl: str = "1h") -> AsyncIterator[Spire]:
        """A server and an agent that trust each other."""
        it = cls(tools, folder)
        try:
            await it._start(ttl)
            yield it
        finally:
            for process in it._processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def register(self, identities: Iterable[str]) -> None:
        """Entries for processes of this user."""
        for identity in identities:
            await self._server(
                "entry", "create", "-parentID", f"spiffe://{TRUST_DOMAIN}/agent", "-spiffeID", identity,
                "-selector", f"unix:uid:{os.getuid()}",
            )  # fmt: skip

    async def federate(self, trust_domain: str, bundle: Path) -> str:
        """Trust another trust domain by its SPIFFE bundle; gives the roots that SPIRE read, PEM."""
        name = f"spiffe://{trust_domain}"
        await self._server("bundle", "set", "-format", "spiffe", "-id", name, "-path", str(bundle))
        return await self._server("bundle", "list", "-format", "pem", "-id", name)

    async def _start(self, ttl: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        values = {"folder": self._folder, "port": port, "domain": TRUST_DOMAIN, "ttl": ttl}
        for name, text in (("server.conf", _SERVER), ("agent.conf", _AGENT)):
            (self._folder / name).write_text(text.format(**values))
        await self._run("spire-server", "run", "-config", str(self._folder / "server.conf"))
        await self._healthy("spire-server", "api.sock")
        answer = await self._server("token", "generate", "-spiffeID", f"spiffe://{TRUST_DOMAIN}/agent")
        token = answer.split()[-1]
        await self._run("spire-agent", "run", "-config", str(self._folder / "agent.conf"), "-joinToken", token)
        await self._healthy("spire-agent", "agent.sock")

    async def _run(self, program: str, *arguments: str) -> None:
        with (self._folder / f"{program}.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(self._tools / program, *arguments, stdout=log, stderr=log)
        self._processes.append(process)

    async def _healthy(self, program: str, name: str) -> None:
        async with asyncio.timeout(START_S):
            while True:
                command = (self._tools / program, "healthcheck", "-socketPath", self._folder / name)
                null = asyncio.subprocess.DEVNULL
                check = await asyncio.create_subprocess_exec(*command, stdout=null, stderr=null)
                if await check.wait() == 0:
                    return
                await asyncio.sleep(0.2)

    async def _server(self, *arguments: str) -> str:
        command = (self._tools / "spire-server", *arguments, "-socketPath", self._folder / "api.sock")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        out, err = await process.communicate()
        assert process.returncode == 0, err.decode()
        return out.decode()


class WorkloadApi:
    """A Workload API that gives what it was told to everybody."""

    def __init__(self) -> None:
        self._response: Any = message("X509SVIDResponse")()
        self._changed = asyncio.Event()
        self.asked: list[dict[str, str]] = []

    def give(self, certificates: Iterable[Certificate]) -> None:
        """Identities from now on."""
        response = message("X509SVIDResponse")()
        for certificate in certificates:
            key = serialization.load_pem_private_key(certificate.key_pem.encode(), password=None)
            response.svids.add(
                spiffe_id=certificate.identity,
                x509_svid=_der(certificate.chain_pem),
                x509_svid_key=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
                bundle=_der(certificate.bundle_pem),
            )
        self._response = response
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    @contextlib.asynccontextmanager
    async def serve(self, path: Path) -> AsyncIterator[str]:
        """Its address."""
        server = grpc.aio.server()
        handler = grpc.unary_stream_rpc_method_handler(
            self._fetch,
            request_deserializer=message("X509SVIDRequest").FromString,
            response_serializer=lambda response: response.SerializeToString(),
        )
        handlers = grpc.method_handlers_generic_handler("SpiffeWorkloadAPI", {"FetchX509SVID": handler})
        server.add_generic_rpc_handlers((handlers,))
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        try:
            yield f"unix://{path}"
        finally:
            await server.stop(None)

    async def _fetch(self, _request: Any, context: Any) -> AsyncIterator[Any]:
        metadata = dict(context.invocation_metadata())
        self.asked.append(metadata)
        if METADATA[0] not in metadata.items():
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")
        while True:
            changed = self._changed
            if not self._response.svids:
                await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
            yield self._response
            await changed.wait()


def _der(pem: str) -> bytes:
    return b"".join(each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(pem.encode()))
