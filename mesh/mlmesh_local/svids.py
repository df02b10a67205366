"""Identities that somebody else issues, given to sidecars in the place of those of the mesh's own authority."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from mlmesh_local.pki import Certificate, spiffe_id
from mlmesh_runtime.errors import WrongState

logger = logging.getLogger(__name__)

_LONG = 0x80


@dataclass(frozen=True, slots=True, kw_only=True)
class Svid:
    """One identity: certificates as concatenated DER (the leaf first), the key as PKCS #8 DER, roots as DER."""

    identity: str
    chain: bytes
    key: bytes = field(repr=False)
    bundle: bytes


class ForeignIssuer:
    """Hands out the identities that were given to it last. Use it from one event loop."""

    def __init__(self) -> None:
        self.changed: Callable[[], object] = lambda: None
        """Called when there are others."""
        self._held: dict[str, Certificate] = {}
        self._roots: tuple[x509.Certificate, ...] = ()

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        """Roots of all identities."""
        return self._roots

    @property
    def bundle_pem(self) -> str:
        """Roots of all identities."""
        return "".join(map(_pem, self._roots))

    def take(self, svids: Iterable[Svid]) -> None:
        """Replace all identities. What cannot be read is refused whole, and what there was stays."""
        try:
            read = [(svid, _certificates(svid.chain), _certificates(svid.bundle)) for svid in svids]
            roots = tuple(dict.fromkeys(root for _, _, roots in read for root in roots))
            bundle = "".join(map(_pem, roots))
            held = {svid.identity: _certificate(svid, chain, bundle) for svid, chain, _ in read}
        except (ValueError, TypeError, x509.ExtensionNotFound, UnsupportedAlgorithm) as error:
            logger.warning("identities cannot be read; those before stay", extra={"problem": str(error)})
            return
        self._held, self._roots = held, roots
        self.changed()

    def missing(self, identities: Iterable[str]) -> list[str]:
        """Which of these are not there."""
        return sorted(set(identities) - self._held.keys())

    def check(self, identities: Iterable[str]) -> None:
        """Raise WrongState, which tells how to register them, when some are not there."""
        missing = self.missing(identities)
        if missing:
            raise _missing(missing)

    def issue(self, service_account: str, namespace: str, *, trust_domain: str) -> Certificate:
        """The identity of a ServiceAccount. Raises WrongState when there is none; its life is the issuer's matter."""
        identity = spiffe_id(service_account, namespace, trust_domain=trust_domain)
        found = self._held.get(identity)
        if found is None:
            raise _missing([identity])
        return found

    def is_current(self, certificate: Certificate) -> bool:
        """Whether it is what `issue` gives now."""
        found = self._held.get(certificate.identity)
        return found is not None and found.serial == certificate.serial


def _missing(identities: list[str]) -> WrongState:
    entries = "\n".join(
        f"  spire-server entry create -parentID AGENT -spiffeID {identity} -selector unix:uid:UID"
        for identity in identities
    )
    return WrongState(
        f"the SPIFFE Workload API gives this process no identity for {', '.join(identities)}; register it:\n{entries}",
        reason="IDENTITY_MISSING",
    )


def _certificate(svid: Svid, chain: list[x509.Certificate], bundle_pem: str) -> Certificate:
    if not chain:
        raise ValueError(f"{svid.identity} has no certificate")
    leaf = chain[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    # More than one URI is not an SVID (SPIFFE X.509-SVID, 5.2).
    if names.get_values_for_type(x509.UniformResourceIdentifier) != [svid.identity]:
        raise ValueError(f"the certificate of {svid.identity} is one of another identity")
    key = serialization.load_der_private_key(svid.key, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise TypeError(f"the key of {svid.identity} is of a kind that Envoy does not take")
    return Certificate(
        identity=svid.identity,
        chain_pem="".join(_pem(each) for each in chain),
        key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        bundle_pem=bundle_pem,
        serial=f"{leaf.serial_number:x}",
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
    )


def _certificates(data: bytes) -> list[x509.Certificate]:
    """Certificates that stand one after the other."""
    found: list[x509.Certificate] = []
    while data:
        size = _size(data)
        found.append(x509.load_der_x509_certificate(data[:size]))
        data = data[size:]
    return found


def _size(data: bytes) -> int:
    """Bytes of the first DER value: its tag, its length, its content."""
    if len(data) < 2:
        raise ValueError("a certificate is cut off")
    first = data[1]
    if first < _LONG:
        return 2 + first
    count = first - _LONG
    return 2 + count + int.from_bytes(data[2 : 2 + count], "big")


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
