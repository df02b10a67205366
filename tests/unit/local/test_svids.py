"""Identities of another issuer: what cannot be read is not taken, and what there was stays."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from mlmesh_local.pki import Authority
from mlmesh_local.svids import ForeignIssuer, Svid

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def der(pem: str) -> bytes:
    return b"".join(each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(pem.encode()))


@pytest.fixture
def good(tmp_path: Path) -> Svid:
    issued = Authority(tmp_path, clock=lambda: NOW).issue("client")
    key = load_pem_private_key(issued.key_pem.encode(), None)
    return Svid(
        identity=issued.identity,
        chain=der(issued.chain_pem),
        key=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        bundle=der(issued.bundle_pem),
    )


def without_names() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "client")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(NOW).not_valid_after(NOW + timedelta(hours=1))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def strange_key() -> bytes:
    return ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


@pytest.mark.parametrize("wrong", ["no names", "cut off", "a strange key", "no key", "nothing", "another name"])
def test_what_cannot_be_read_is_not_taken(good: Svid, wrong: str) -> None:
    issuer = ForeignIssuer()
    issuer.take([good])
    held = issuer.issue("client", "mlmesh", trust_domain="cluster.local")
    changes = {
        "no names": {"chain": without_names()},
        "cut off": {"chain": good.chain[:-10]},
        "a strange key": {"key": strange_key()},
        "no key": {"key": b""},
        "nothing": {"chain": b""},
        "another name": {"identity": good.identity + "x"},
    }
    issuer.take([dataclasses.replace(good, **changes[wrong])])  # type: ignore[arg-type]
    assert issuer.issue("client", "mlmesh", trust_domain="cluster.local") is held
