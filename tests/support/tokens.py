"""JSON Web Tokens of a throw-away issuer: true ones, and forged ones of every kind."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

ISSUER = "https://issuer.example"
KEY_BITS = 2048


def encode(data: bytes) -> str:
    """Base64url without padding (RFC 7515, 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _number(value: int) -> str:
    return encode(value.to_bytes((value.bit_length() + 7) // 8, "big"))


class Issuer:
    """Signs tokens with an RSA key and with an EC key; ``jwks`` is the text of its key set."""

    def __init__(self, name: str = ISSUER, *, prefix: str = "") -> None:
        self.name = name
        self._rsa_id, self._ec_id = f"{prefix}rsa", f"{prefix}ec"
        self._rsa = rsa.generate_private_key(65537, KEY_BITS)
        self._ec = ec.generate_private_key(ec.SECP256R1())

    @property
    def jwks(self) -> str:
        """The public keys (RFC 7517)."""
        rsa_numbers, ec_numbers = self._rsa.public_key().public_numbers(), self._ec.public_key().public_numbers()
        return json.dumps(
            {
                "keys": [
                    {"kty": "RSA", "kid": self._rsa_id, "n": _number(rsa_numbers.n), "e": _number(rsa_numbers.e)},
                    {
                        "kty": "EC",
                        "kid": self._ec_id,
                        "crv": "P-256",
                        "x": encode(ec_numbers.x.to_bytes(32, "big")),
                        "y": encode(ec_numbers.y.to_bytes(32, "big")),
                    },
                ]
            }
        )

    @property
    def public_pem(self) -> bytes:
        """The RSA key as PEM: what a confused verifier would take for a shared secret."""
        return self._rsa.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def claims(self, **claims: Any) -> dict[str, Any]:
        """Claims of a valid token with some replaced; None leaves one out."""
        whole = {"iss": self.name, "sub": "somebody", "exp": int(time.time()) + 300, **claims}
        return {name: value for name, value in whole.items() if value is not None}

    def token(
        self,
        *,
        alg: str = "RS256",
        header: Mapping[str, Any] | None = None,
        secret: bytes = b"",
        body: str = "",
        **claims: Any,
    ) -> str:
        """A token. ``alg`` is what the header says and how it is signed; ``body`` replaces the claims' JSON."""
        kid = self._ec_id if alg == "ES256" else self._rsa_id
        head = {"alg": alg, "typ": "JWT", "kid": kid, **(header or {})}
        head = {name: value for name, value in head.items() if value is not None}
        text = body or json.dumps(self.claims(**claims))
        signed = f"{encode(json.dumps(head).encode())}.{encode(text.encode())}"
        return f"{signed}.{encode(self._sign(alg, signed.encode(), secret))}"

    def _sign(self, alg: str, data: bytes, secret: bytes) -> bytes:
        if alg == "RS256":
            return self._rsa.sign(data, padding.PKCS1v15(), hashes.SHA256())
        if alg == "ES256":
            r, s = utils.decode_dss_signature(self._ec.sign(data, ec.ECDSA(hashes.SHA256())))
            return r.to_bytes(32, "big") + s.to_bytes(32, "big")
        if alg == "HS256":
            return hmac.digest(secret, data, "sha256")
        return b""


def tampered(token: str, **claims: Any) -> str:
    """The same signature over other claims."""
    head, body, signature = token.split(".")
    text = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    changed = {**json.loads(text), **claims}
    return f"{head}.{encode(json.dumps(changed).encode())}.{signature}"
