"""The laptop mesh's certificate authority: SPIFFE identities for sidecars, a server certificate for gateways.

Keys are EC P-256. A workload's certificate carries one critical URI subject alternative name and nothing else, as the
SPIFFE X.509-SVID standard demands; Istio's own authority issues the same shape.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mlmesh_runtime.errors import Corrupt, InvalidInput, WrongState

TRUST_DOMAIN = "cluster.local"
LEAF_TTL = timedelta(hours=24)
ROOT_TTL = timedelta(days=3650)
# Certificates are valid from a little earlier than now: clocks of one machine agree, those of tools may not.
SKEW = timedelta(seconds=60)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

Clock = Callable[[], datetime]
Phase = Literal["IDLE", "DISTRIBUTING", "RETIRING"]
"""How far the replacement of a root is: none, a new one is made known, the old one is no longer used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A leaf with its key. ``identity`` is its SPIFFE id, empty for a gateway's server certificate."""

    identity: str
    chain_pem: str
    key_pem: str
    bundle_pem: str
    serial: str
    not_before: datetime
    not_after: datetime

    def rotate_at(self) -> datetime:
        """When to replace it: at half of its life, as Istio's agent does (SECRET_GRACE_PERIOD_RATIO 0.5)."""
        return self.not_before + (self.not_after - self.not_before) / 2


def spiffe_id(service_account: str, namespace: str, *, trust_domain: str = TRUST_DOMAIN) -> str:
    """The identity of a ServiceAccount, as Istio writes it. Raises InvalidInput on a name that Kubernetes refuses."""
    for field, value in (("service_account", service_account), ("namespace", namespace)):
        if not _NAME.fullmatch(value):
            raise InvalidInput(f"{field} {value!r} is not a Kubernetes name", field=field)
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"


class Authority:
    """A certificate authority kept in a folder of mode 0700, its files 0600.

    ``root.pem`` and ``root-key.pem`` are the active root. A root is replaced in three steps, between which others must
    learn of it, and the files are the state: what was begun before a restart goes on after it.

    1. `prepare_root`: ``next/`` has a new root. It is trusted and does not sign.
    2. `promote_root`: it signs. The one before is in ``retired/``: still trusted, and its key is gone.
    3. `retire_roots`: only the active root is trusted.
    """

    def __init__(self, folder: Path, *, clock: Clock, trust_domain: str = TRUST_DOMAIN) -> None:
        self._folder = folder
        self._clock = clock
        self.trust_domain = trust_domain
        for each in (folder, folder / "retired", folder / "next"):
            _private_folder(each)
        if not (folder / "root.pem").exists():
            self._write_root(folder)
        self._finish_promotion()
        self._read_root()

    @property
    def expire_time(self) -> datetime:
        """When the active root expires."""
        return self._root.not_valid_after_utc

    @property
    def phase(self) -> Phase:
        """How far the replacement of the root is."""
        if self._next() is not None:
            return "DISTRIBUTING"
        return "RETIRING" if self._retired() else "IDLE"

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """Every root that is trusted now, the active one first."""
        upcoming = self._next()
        return (self._root, *((upcoming,) if upcoming else ()), *(r for r in self._retired() if r != self._root))

    @property
    def bundle_pem(self) -> str:
        """Every root that is trusted now, the active one first."""
        return "".join(_pem(root) for root in self.roots)

    @property
    def sequence(self) -> int:
        """Number of this bundle: each change of it has a higher one."""
        try:
            return int((self._folder / "sequence").read_text())
        except (FileNotFoundError, ValueError):
            return 1

    def is_signer(self, certificate: Certificate) -> bool:
        """Whether the active root signed a certificate."""
        leaf = x509.load_pem_x509_certificate(certificate.chain_pem.encode())
        try:
            leaf.verify_directly_issued_by(self._root)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True

    def issue(
        self, service_account: str, namespace: str = "mlmesh", ttl: timedelta = LEAF_TTL, *, trust_domain: str = ""
    ) -> Certificate:
        """A new key and a certificate for a ServiceAccount, for client and server use.

        ``trust_domain`` is that of the mesh's settings; empty is the authority's own.
        """
        identity = spiffe_id(service_account, namespace, trust_domain=trust_domain or self.trust_domain)
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity)])
        # Critical because the subject is empty (RFC 5280, 4.1.2.6).
        return self._sign(x509.Name([]), names, critical=True, identity=identity, ttl=ttl)

    def lend(self, service_account: str, namespace: str, ttl: timedelta, *, trust_domain: str = "") -> Certificate:
        """A certificate for a tool outside of the mesh. As long as it is valid, the root that signed it is trusted."""
        certificate = self.issue(service_account, namespace, ttl, trust_domain=trust_domain)
        until = max(certificate.not_after, self._lent("lent-until") or certificate.not_after)
        write_private(self._folder / "lent-until", f"{until.isoformat()}\n")
        return certificate

    @property
    def lent_until(self) -> datetime | None:
        """When the last certificate expires that a retired root signed for a tool; None when there is none."""
        return self._lent("retired/lent-until")

    def _lent(self, name: str) -> datetime | None:
        try:
            return datetime.fromisoformat((self._folder / name).read_text().strip())
        except (FileNotFoundError, ValueError):
            return None

    def issue_server(
        self, hosts: Sequence[str], addresses: Sequence[str] = (), ttl: timedelta = LEAF_TTL
    ) -> Certificate:
        """A server certificate for DNS names and IP addresses: what a gateway shows to clients outside the mesh."""
        entries: list[x509.GeneralName] = [x509.DNSName(host) for host in dict.fromkeys(hosts)]
        entries += [x509.IPAddress(ipaddress.ip_address(address)) for address in dict.fromkeys(addresses)]
        if not entries:
            raise InvalidInput("a server certificate needs at least one name", field="hosts")
        subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "mlmesh gateway")])
        return self._sign(subject, x509.SubjectAlternativeName(entries), critical=False, identity="", ttl=ttl)

    def prepare_root(self) -> None:
        """Step 1: make a new root, to be trusted before it signs. Nothing happens when there is one already."""
        if self._next() is None:
            self._write_root(self._folder / "next")
            self._count()

    def promote_root(self) -> None:
        """Step 2: sign with the prepared root. Raises WrongState when there is none."""
        if self._next() is None:
            raise WrongState("there is no prepared root to sign with; prepare one first", reason="ROTATION_UNDER_WAY")
        write_private(self._folder / "retired" / f"{_serial(self._root)}.pem", _pem(self._root))
        if (self._folder / "lent-until").exists():
            (self._folder / "lent-until").replace(self._folder / "retired" / "lent-until")
        (self._folder / "next" / "root.pem").replace(self._folder / "root.pem")
        self._finish_promotion()
        self._read_root()

    def retire_roots(self) -> int:
        """Step 3: trust only the root that signs. Gives how many are trusted no more."""
        found = list((self._folder / "retired").glob("*.pem"))
        if found:
            self._count()
        for path in found:
            path.unlink()
        (self._folder / "retired" / "lent-until").unlink(missing_ok=True)
        return len(found)

    def _finish_promotion(self) -> None:
        """A crash may have come between the two files of a root: its key is still where it was prepared."""
        key = self._folder / "next" / "root-key.pem"
        if key.exists() and not (self._folder / "next" / "root.pem").exists():
            if _belong_together(self._folder / "root.pem", key):
                key.replace(self._folder / "root-key.pem")
            else:
                # It was written, and the certificate was not: nobody has heard of it.
                key.unlink()

    def _next(self) -> x509.Certificate | None:
        try:
            return x509.load_pem_x509_certificate((self._folder / "next" / "root.pem").read_bytes())
        except FileNotFoundError:
            return None

    def _retired(self) -> tuple[x509.Certificate, ...]:
        paths = sorted((self._folder / "retired").glob("*.pem"))
        found = (x509.load_pem_x509_certificate(path.read_bytes()) for path in paths)
        return tuple(root for root in found if root.not_valid_after_utc > self._clock())

    def _count(self) -> None:
        write_private(self._folder / "sequence", f"{self.sequence + 1}\n")

    def _sign(
        self, subject: x509.Name, names: x509.SubjectAlternativeName, *, critical: bool, identity: str, ttl: timedelta
    ) -> Certificate:
        if ttl <= timedelta(0) or ttl > LEAF_TTL:
            raise InvalidInput(f"ttl must be more than 0 and at most {LEAF_TTL}, not {ttl}", field="ttl")
        now = self._clock().replace(microsecond=0)
        end = min(now + ttl, self._root.not_valid_after_utc)
        if end <= now:
            raise Corrupt("the mesh's root certificate has expired; delete the folder of the certificate authority")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._root.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_leaf_usage(), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(names, critical=critical)
            .sign(self._key, hashes.SHA256())
        )
        return Certificate(
            identity=identity,
            chain_pem=_pem(certificate),
            key_pem=_key_pem(key),
            bundle_pem=self.bundle_pem,
            serial=_serial(certificate),
            not_before=now,
            not_after=end,
        )

    def _write_root(self, folder: Path) -> None:
        now = self._clock().replace(microsecond=0)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, self.trust_domain),
                x509.NameAttribute(NameOID.COMMON_NAME, "mlmesh local root"),
            ]
        )
        root = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(now + ROOT_TTL)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_root_usage(), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        # The key first: a root without its key could never sign and would be found at the next start.
        write_private(folder / "root-key.pem", _key_pem(key))
        write_private(folder / "root.pem", _pem(root))

    def _read_root(self) -> None:
        try:
            self._root = x509.load_pem_x509_certificate((self._folder / "root.pem").read_bytes())
            key = serialization.load_pem_private_key((self._folder / "root-key.pem").read_bytes(), password=None)
        except (OSError, ValueError) as error:
            raise Corrupt(f"cannot read the certificate authority in {self._folder}: {error}; delete it") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._root.public_key():
            raise Corrupt(f"root.pem and root-key.pem in {self._folder} do not belong together; delete the folder")
        self._key = key


def _belong_together(root: Path, key: Path) -> bool:
    certificate = x509.load_pem_x509_certificate(root.read_bytes())
    loaded = serialization.load_pem_private_key(key.read_bytes(), password=None)
    return loaded.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    ) == certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _leaf_usage() -> x509.KeyUsage:
    return _usage(digital_signature=True, key_cert_sign=False)


def _root_usage() -> x509.KeyUsage:
    return _usage(digital_signature=False, key_cert_sign=True)


def _usage(*, digital_signature: bool, key_cert_sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _serial(certificate: x509.Certificate) -> str:
    return f"{certificate.serial_number:x}"


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def _private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def write_private(path: Path, text: str) -> None:
    """Write whole or not at all, readable by the owner from the first byte on."""
    draft = path.with_suffix(".tmp")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
