"""Signatures of tokens (RFC 7515) by the public keys of a set (RFC 7517), never by a shared secret, as in Envoy."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa, utils

_HASHES: Mapping[str, hashes.HashAlgorithm] = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
_CURVES: Mapping[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
_KINDS = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}


def decoded(part: str) -> bytes:
    """A part of a token. Raises ValueError for what is not base64url."""
    try:
        return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def is_signed(token: str, key_set: str) -> bool:
    """Whether a key of the set signed a token, by the algorithm that the token names and the key is of."""
    signed, _, signature = token.rpartition(".")
    try:
        header = json.loads(decoded(signed.partition(".")[0]))
        keys = json.loads(key_set).get("keys", ())
        algorithm = str(header.get("alg", ""))
        return any(
            _verifies(key, algorithm, signed.encode(), decoded(signature))
            for key in keys
            if key.get("kty") == _KINDS.get(algorithm[:2]) and header.get("kid", key.get("kid")) == key.get("kid")
        )
    except (ValueError, AttributeError):
        return False


def _verifies(key: Mapping[str, Any], algorithm: str, signed: bytes, signature: bytes) -> bool:
    try:
        if key["kty"] == "RSA":
            digest = _HASHES[algorithm[2:]]
            way: padding.AsymmetricPadding = padding.PKCS1v15()
            if algorithm.startswith("PS"):
                way = padding.PSS(padding.MGF1(digest), digest.digest_size)
            public = rsa.RSAPublicNumbers(_number(key["e"]), _number(key["n"])).public_key()
            public.verify(signature, signed, way, digest)
        elif key["kty"] == "EC":
            half = len(signature) // 2
            pair = utils.encode_dss_signature(
                int.from_bytes(signature[:half], "big"), int.from_bytes(signature[half:], "big")
            )
            curve = _CURVES[key["crv"]]
            point = ec.EllipticCurvePublicNumbers(_number(key["x"]), _number(key["y"]), curve).public_key()
            point.verify(pair, signed, ec.ECDSA(_HASHES[algorithm[2:]]))
        else:
            ed25519.Ed25519PublicKey.from_public_bytes(decoded(key["x"])).verify(signature, signed)
    except (InvalidSignature, KeyError):
        return False
    return True


def _number(text: str) -> int:
    return int.from_bytes(decoded(text), "big")
