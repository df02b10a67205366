"""Bootstraps of gRPC clients without a sidecar, as files."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.connection import CONTROL_DEADLINE_S, duration
from mlmesh_local.proxyless.bootstrap import BOOTSTRAP_FILE, CHAIN_FILE, KEY_FILE, ROOTS_FILE

if TYPE_CHECKING:
    from mlmesh.local.v1.local_pb2_grpc import LocalMeshServiceAsyncStub

BOOTSTRAP_VARIABLE = "GRPC_XDS_BOOTSTRAP"
_FILES = (BOOTSTRAP_FILE, CHAIN_FILE, KEY_FILE, ROOTS_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenBootstrap:
    """Where a bootstrap lies, who its client is, and when its certificate expires (Unix seconds)."""

    bootstrap: Path
    identity: str
    expires_s: int

    def as_dict(self) -> dict[str, str | int]:
        """For JSON output."""
        return {
            "bootstrap": str(self.bootstrap),
            "identity": self.identity,
            "expire_time_unix_s": self.expires_s,
            "environment": f"{BOOTSTRAP_VARIABLE}={self.bootstrap}",
        }


async def write_bootstrap(
    stub: LocalMeshServiceAsyncStub,
    folder: Path,
    *,
    service_account: str,
    namespace: str,
    labels: Mapping[str, str],
    tolerated: Sequence[str],
    ttl_s: float,
    renew: bool = False,
) -> WrittenBootstrap:
    """Writes bootstrap.json and the certificate's files into a folder; with `renew` the certificate's alone.

    gRPC reads the certificate's files again by itself, so a running client takes the new ones over.
    """
    request = pb.IssueXdsBootstrapRequest(
        service_account=service_account,
        namespace=namespace,
        labels=labels,
        tolerated=tolerated,
        folder=str(folder),
        ttl=duration(ttl_s),
    )
    made = await stub.IssueXdsBootstrap(request, timeout=CONTROL_DEADLINE_S)
    return await asyncio.to_thread(_write, made, folder, renew)


def _write(made: pb.IssueXdsBootstrapResponse, folder: Path, renew: bool) -> WrittenBootstrap:
    folder.mkdir(parents=True, exist_ok=True)
    issued = made.certificate
    contents = (made.bootstrap_json, issued.certificate_chain_pem, issued.private_key_pem, issued.trust_bundle_pem)
    for name, content in zip(_FILES, contents, strict=True):
        if not (renew and name == BOOTSTRAP_FILE):
            _replace(folder / name, content)
    return WrittenBootstrap(
        bootstrap=folder / BOOTSTRAP_FILE, identity=issued.identity, expires_s=issued.expire_time.seconds
    )


def _replace(path: Path, text: str) -> None:
    # The bootstrap holds a token, and what was ever readable by others is not secret. A reader sees all or nothing.
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)
