"""Certificates as files, for tools outside the mesh."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlmesh.local.v1 import local_pb2 as pb
from mlmesh_cli.connection import CONTROL_DEADLINE_S, duration

if TYPE_CHECKING:
    from mlmesh.local.v1.local_pb2_grpc import LocalMeshServiceAsyncStub


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenCertificate:
    """Files of a certificate (PEM), its SPIFFE identity and when it expires (Unix seconds)."""

    identity: str
    expires_s: int
    cert: Path
    key: Path
    ca: Path

    def as_dict(self) -> dict[str, str | int]:
        """For JSON output."""
        files = {"cert": self.cert, "key": self.key, "ca": self.ca}
        return {
            "identity": self.identity,
            "expire_time_unix_s": self.expires_s,
            **{name: str(path) for name, path in files.items()},
        }


async def write_certificate(
    stub: LocalMeshServiceAsyncStub, service_account: str, folder: Path, *, ttl_s: float
) -> WrittenCertificate:
    """Issues a certificate for a ServiceAccount and writes cert.pem, key.pem (mode 0600) and ca.pem into a folder."""
    request = pb.IssueCertificateRequest(service_account=service_account, ttl=duration(ttl_s))
    issued = await stub.IssueCertificate(request, timeout=CONTROL_DEADLINE_S)
    return await asyncio.to_thread(_write, issued, folder)


def _write(issued: pb.IssueCertificateResponse, folder: Path) -> WrittenCertificate:
    folder.mkdir(parents=True, exist_ok=True)
    cert, key, ca = (folder / name for name in ("cert.pem", "key.pem", "ca.pem"))
    cert.write_text(issued.certificate_chain_pem)
    ca.write_text(issued.trust_bundle_pem)
    _write_private(key, issued.private_key_pem)
    return WrittenCertificate(identity=issued.identity, expires_s=issued.expire_time.seconds, cert=cert, key=key, ca=ca)


def _write_private(path: Path, text: str) -> None:
    # A key that was ever readable by others is not secret: the mode comes before the text.
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
