"""Signatures over a version's files, as the model-signing tool makes them with a key (format 1.0 of its predicate).

A Sigstore bundle holds a DSSE envelope; its payload is an in-toto statement whose predicate lists every file with its
SHA-256. The signature is ECDSA over DSSE's pre-authentication encoding, with SHA-256, SHA-384 or SHA-512 as the curve
is P-256, P-384 or P-521. Nothing here reads the network, a clock or the bytes of files.

Pure, but for `load_keys`.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"

BUNDLE_CHARS_MAX = 262_144
SIGNATURES_MAX = 16
KEYS_MAX = 256
_KEY_BYTES_MAX = 65_536
_SHOWN_PATHS = 3
_SHA256 = re.compile(r"[0-9a-f]{64}")

HASHES: Mapping[str, type[hashes.SHA256] | type[hashes.SHA384] | type[hashes.SHA512]] = {
    "secp256r1": hashes.SHA256,
    "secp384r1": hashes.SHA384,
    "secp521r1": hashes.SHA512,
}
"""Hash that goes with each curve that the format knows."""


class BadSignatureError(Exception):
    """A signature that does not hold; the text says why, for a person."""


class BadKeyError(Exception):
    """A key, or a folder of keys, that cannot be used; the text says why, for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedKeys:
    """Public keys whose signatures count.

    Attributes:
        by_id: by key id, see key_id.
        by_hint: key ids by what the tool writes into a bundle, see hint.
    """

    by_id: Mapping[str, ec.EllipticCurvePublicKey] = field(default_factory=dict)
    by_hint: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, *keys: ec.EllipticCurvePublicKey) -> "TrustedKeys":
        """Trust these."""
        return cls(by_id={key_id(key): key for key in keys}, by_hint={hint(key): key_id(key) for key in keys})


def key_id(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo, DER), hex."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def hint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo, PEM), hex: what a bundle names its key by."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.PEM, form)).hexdigest()


def encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def root_digest(digests: list[str]) -> str:
    """SHA-256 over the digests of the files, in their order: the subject's digest."""
    return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in digests)).hexdigest()


def public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Read a public key. Errors: BadKeyError."""
    if b"PRIVATE KEY" in pem:
        raise BadKeyError("holds a private key; public keys are wanted")
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise BadKeyError("is not a public key in PEM") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in HASHES:
        raise BadKeyError("is not an elliptic curve key of P-256, P-384 or P-521")
    return key


def load_keys(folder: Path) -> TrustedKeys:
    """Read the public keys of a folder, one a file; hidden files are left out. Errors: BadKeyError naming the file."""
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_file())
    except OSError as error:
        raise BadKeyError(f"cannot read {folder}: {error.strerror}") from None
    if len(paths) > KEYS_MAX:
        raise BadKeyError(f"{folder} holds {len(paths)} files, at most {KEYS_MAX}")
    return TrustedKeys.of(*(_read_key(path) for path in paths))


def verify(bundle: str, files: Mapping[str, str], keys: TrustedKeys) -> str:
    """Id of the trusted key that signed exactly these files (hex SHA-256 by path). Errors: BadSignatureError."""
    payload, signature, hinted = _opened(bundle)
    signer = _signer(encoded(payload), signature, hinted, keys)
    _compare(_signed_files(payload), files)
    return signer


def _read_key(path: Path) -> ec.EllipticCurvePublicKey:
    try:
        if path.stat().st_size > _KEY_BYTES_MAX:
            raise BadKeyError("is too long for a key")
        return public_key(path.read_bytes())
    except BadKeyError as error:
        raise BadKeyError(f"{path} {error}") from None
    except OSError as error:
        raise BadKeyError(f"cannot read {path}: {error.strerror}") from None


def _opened(bundle: str) -> tuple[bytes, bytes, str]:
    """Payload, signature and the hint at the key ("" where there is none)."""
    if len(bundle) > BUNDLE_CHARS_MAX:
        raise BadSignatureError(f"the bundle has {len(bundle)} characters, at most {BUNDLE_CHARS_MAX} are read")
    data = _object(_json(bundle, "the bundle"), "the bundle")
    if data.get("mediaType") != MEDIA_TYPE:
        raise BadSignatureError(f"the bundle's mediaType is not {MEDIA_TYPE}")
    material = _object(data.get("verificationMaterial"), "verificationMaterial")
    if "publicKey" not in material:
        raise BadSignatureError("the bundle was not made with a key; certificates and identities are not trusted here")
    hinted = _object(material["publicKey"], "publicKey").get("hint")
    envelope = _object(data.get("dsseEnvelope"), "dsseEnvelope")
    if envelope.get("payloadType") != PAYLOAD_TYPE:
        raise BadSignatureError(f"the envelope's payloadType is not {PAYLOAD_TYPE}")
    signatures = envelope.get("signatures")
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise BadSignatureError("the envelope does not hold exactly one signature")
    signature = _object(signatures[0], "the signature").get("sig")
    return (
        _bytes(envelope.get("payload"), "payload"),
        _bytes(signature, "sig"),
        hinted if isinstance(hinted, str) else "",
    )


def _signer(signed: bytes, signature: bytes, hinted: str, keys: TrustedKeys) -> str:
    if not keys.by_id:
        raise BadSignatureError("no key is trusted here: set MLMESH_REGISTRY_TRUSTED_KEYS to a folder of public keys")
    if hinted and hinted not in keys.by_hint:
        raise BadSignatureError("no trusted key made it: the key that it names is not among them")
    for candidate in [keys.by_hint[hinted]] if hinted else keys.by_id:
        key = keys.by_id[candidate]
        try:
            key.verify(signature, signed, ec.ECDSA(HASHES[key.curve.name]()))
        except InvalidSignature:
            continue
        return candidate
    raise BadSignatureError("no trusted key made it: the signature is not over this payload, or of another key")


def _signed_files(payload: bytes) -> dict[str, str]:
    statement = _object(_json(payload, "the payload"), "the payload")
    if statement.get("_type") != STATEMENT_TYPE or statement.get("predicateType") != PREDICATE_TYPE:
        raise BadSignatureError(f"the payload is not a statement of {PREDICATE_TYPE}")
    predicate = _object(statement.get("predicate"), "the predicate")
    method = _object(predicate.get("serialization"), "serialization")
    if (method.get("method"), method.get("hash_type")) != ("files", "sha256"):
        raise BadSignatureError("the files are not listed one by one with SHA-256; sign with the tool's defaults")
    resources = predicate.get("resources")
    if not isinstance(resources, list):
        raise BadSignatureError("the predicate lists no files")
    found: dict[str, str] = {}
    for resource in resources:
        entry = _object(resource, "a file")
        name, digest = entry.get("name"), entry.get("digest")
        if not isinstance(name, str) or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise BadSignatureError("the predicate lists a file without a name or a SHA-256")
        if entry.get("algorithm") != "sha256" or name in found:
            raise BadSignatureError("the predicate lists a file twice, or with another digest than SHA-256")
        found[name] = digest
    subjects = statement.get("subject")
    subject = _object(subjects[0] if isinstance(subjects, list) and len(subjects) == 1 else None, "the one subject")
    if _object(subject.get("digest"), "the subject's digest").get("sha256") != root_digest([*found.values()]):
        raise BadSignatureError("the subject's digest is not that of the files listed")
    return found


def _compare(signed: Mapping[str, str], files: Mapping[str, str]) -> None:
    for problem, paths in (
        ("does not cover", files.keys() - signed.keys()),
        ("covers what the version does not have:", signed.keys() - files.keys()),
        (
            "was made over other bytes of",
            {path for path in files.keys() & signed.keys() if files[path] != signed[path]},
        ),
    ):
        if paths:
            shown = ", ".join(ascii(path[:100]) for path in sorted(paths)[:_SHOWN_PATHS])
            more = f" and {len(paths) - _SHOWN_PATHS} more" if len(paths) > _SHOWN_PATHS else ""
            raise BadSignatureError(f"it {problem} {shown}{more}")


def _json(text: str | bytes, what: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise BadSignatureError(f"{what} is not JSON") from None
    return value


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadSignatureError(f"{what} is missing, or is no object")
    return value


def _bytes(value: object, what: str) -> bytes:
    try:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise BadSignatureError(f"{what} is missing, or is not base64")
