"""A throw-away certificate authority for tests: SPIFFE leaves, expired ones, wrong ones, ones with two identities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mlmesh_runtime.config import TlsFiles
from mlmesh_runtime.tls import ClientTls

TRUST_DOMAIN = "cluster.local"
SERVER_NAME = "server.test"


def spiffe(service_account: str, namespace: str = "mlmesh") -> str:
    """The identity of a service account."""
    return f"spiffe://{TRUST_DOMAIN}/ns/{namespace}/sa/{service_account}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A certificate and its key, PEM."""

    cert: bytes
    key: bytes

    def write(self, folder: Path, ca: bytes, *, reload_s: float = 0.0) -> TlsFiles:
        """Write cert.pem, key.pem and ca.pem, each replaced whole."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("cert.pem", self.cert), ("key.pem", self.key), ("ca.pem", ca)):
            fresh = folder / f".{name}"
            fresh.write_bytes(content)
            fresh.replace(folder / name)
        return TlsFiles(cert=folder / "cert.pem", key=folder / "key.pem", ca=folder / "ca.pem", reload_s=reload_s)

    def client(self, folder: Path, ca: bytes, *, server_name: str = SERVER_NAME) -> ClientTls:
        """The same, as a client uses it."""
        files = self.write(folder, ca)
        return ClientTls(ca=files.ca, cert=files.cert, key=files.key, server_name=server_name)


class Authority:
    """A self-signed root. Every instance is another authority, whatever its name."""

    def __init__(self, name: str = "throw-away root") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        """The root certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def leaf(
        self,
        *uris: str,
        dns: Sequence[str] = (SERVER_NAME, "localhost"),
        starts_in: timedelta = timedelta(hours=-1),
        ends_in: timedelta = timedelta(hours=1),
    ) -> Leaf:
        """A leaf for client and server use, with these URI SANs (none, one or several)."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        names += [x509.DNSName(name) for name in dns]
        names.append(x509.IPAddress(ip_address("127.0.0.1")))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + starts_in)
            .not_valid_after(now + ends_in)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return Leaf(
            cert=certificate.public_bytes(serialization.Encoding.PEM),
            key=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        )

    def expired(self, *uris: str) -> Leaf:
        """A leaf that was valid until an hour ago."""
        return self.leaf(*uris, starts_in=timedelta(hours=-2), ends_in=timedelta(hours=-1))
