"""The trust bundle in the form that other trust domains read: a JSON Web Key Set, as SPIFFE defines it.

https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE_Trust_Domain_and_Bundle.md
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from mlmesh_runtime.errors import InvalidInput

REFRESH_HINT_S = 300
"""How often others should look again: a root is known for longer than this before it signs on purpose."""


def spiffe_bundle(roots: Iterable[x509.Certificate], sequence: int) -> str:
    """The bundle as text. Each root is a key of use "x509-svid" with its certificate."""
    bundle = {
        "keys": [_key(root) for root in roots],
        "spiffe_sequence": sequence,
        "spiffe_refresh_hint": REFRESH_HINT_S,
    }
    return f"{json.dumps(bundle, indent=2)}\n"


def _key(root: x509.Certificate) -> dict[str, Any]:
    der = base64.b64encode(root.public_bytes(serialization.Encoding.DER)).decode()
    return {"use": "x509-svid", **_public(root), "x5c": [der]}


def _public(root: x509.Certificate) -> dict[str, str]:
    key = root.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        numbers = key.public_numbers()
        size = (key.key_size + 7) // 8
        curve = {256: "P-256", 384: "P-384", 521: "P-521"}[key.key_size]
        return {"kty": "EC", "crv": curve, "x": _bytes(numbers.x, size), "y": _bytes(numbers.y, size)}
    if isinstance(key, rsa.RSAPublicKey):
        public = key.public_numbers()
        return {"kty": "RSA", "n": _bytes(public.n), "e": _bytes(public.e)}
    raise InvalidInput("a root has neither an elliptic curve key nor an RSA key", field="roots")


def _bytes(number: int, size: int = 0) -> str:
    length = size or (number.bit_length() + 7) // 8
    return base64.urlsafe_b64encode(number.to_bytes(length, "big")).rstrip(b"=").decode()
