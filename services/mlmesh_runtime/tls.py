"""TLS with rotation: certificates are files that somebody else replaces while the process runs.

A server looks at its files before a handshake (at most every ``reload_s``): the next connection uses what is there.
Files that do not fit together are refused, the old certificate stays, a warning is logged and
``mlmesh_tls_reloads_total{outcome="refused"}`` counts, because a half-written rotation must not take the service down.

gRPC's client credentials cannot be exchanged: a channel keeps the certificate it was opened with.
Handshakes that TLS refuses never reach Python and are not counted here; see `mlmesh_runtime.telemetry`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from mlmesh_runtime.config import ConfigError, TlsFiles
from mlmesh_runtime.telemetry import TLS_EXPIRY, TLS_RELOADS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientTls:
    """A client's side of TLS (PEM files).

    Attributes:
        ca: authorities that the server's certificate must come from.
        cert, key: the client's own identity for mutual TLS, or both None.
        server_name: the DNS name the server's certificate must carry, where it is not the target's host.
    """

    ca: Path
    cert: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files now. Raises ConfigError when one cannot be read."""
        try:
            return grpc.ssl_channel_credentials(
                root_certificates=self.ca.read_bytes(),
                private_key=self.key.read_bytes() if self.key else None,
                certificate_chain=self.cert.read_bytes() if self.cert else None,
            )
        except OSError as error:
            raise ConfigError(f"TLS file {error.filename}: {error.strerror}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """Contents of the three files, checked to fit together."""

    cert: bytes
    key: bytes
    ca: bytes
    expires: datetime


def load(files: TlsFiles, *, now: datetime) -> Material:
    """Read and check: parseable, key of the certificate, within its dates. Raises ValueError or OSError."""
    cert, key, ca = files.cert.read_bytes(), files.key.read_bytes(), files.ca.read_bytes()
    chain = x509.load_pem_x509_certificates(cert)
    x509.load_pem_x509_certificates(ca)
    private = load_pem_private_key(key, password=None)
    leaf = chain[0]
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if leaf.public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        raise ValueError("the key is not the certificate's")
    if not leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc:
        raise ValueError(f"the certificate is valid {leaf.not_valid_before_utc} to {leaf.not_valid_after_utc}, not now")
    return Material(cert=cert, key=key, ca=ca, expires=leaf.not_valid_after_utc)


class RotatingCredentials:
    """Server credentials that follow their files. `server_credentials` is for `add_secure_port`.

    gRPC asks on its own threads, one handshake after another.
    """

    def __init__(
        self,
        files: TlsFiles,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._files, self._monotonic, self._now = files, monotonic, now
        self._lock = threading.Lock()
        try:
            self._stamp = self._look()
            self._material = load(files, now=now())
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"TLS files {files.cert}, {files.key}, {files.ca}: {error}") from None
        self._looked = monotonic()
        self._accepted(self._material)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Credentials that require and verify a client certificate."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._material),
            self._fetch,  # type: ignore[arg-type] # None is allowed: no change
            require_client_authentication=True,
        )

    @property
    def expires(self) -> datetime:
        """When the certificate in use expires."""
        return self._material.expires

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        material = self.reload()
        return None if material is None else _configuration(material)

    def reload(self) -> Material | None:
        """Look at the files, if it is time to; the new contents, or None for no (usable) change."""
        with self._lock:
            if self._monotonic() - self._looked < self._files.reload_s:
                return None
            self._looked = self._monotonic()
            try:
                stamp = self._look()
                if stamp == self._stamp:
                    return None
                material = load(self._files, now=self._now())
            except (OSError, ValueError, TypeError) as error:
                TLS_RELOADS.labels("refused").inc()
                logger.warning("new TLS files refused, the old certificate stays", extra={"cause": str(error)})
                return None
            self._stamp = stamp
            if (material.cert, material.key, material.ca) == (
                self._material.cert,
                self._material.key,
                self._material.ca,
            ):
                return None
            self._material = material
            TLS_RELOADS.labels("ok").inc()
            self._accepted(material)
            return material

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        stats = [path.stat() for path in (self._files.cert, self._files.key, self._files.ca)]
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats)

    def _accepted(self, material: Material) -> None:
        TLS_EXPIRY.set(material.expires.timestamp())
        logger.info("TLS certificate in use", extra={"expires": material.expires.isoformat()})


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], root_certificates=material.ca)
