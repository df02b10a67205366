"""JSON Web Key Sets (RFC 7517), as far as a mesh must know them: whether a text is one, and has secrets in it."""

from __future__ import annotations

import json
from typing import Any

# RFC 7518, 6: what a public key of each type must have.
_MEMBERS = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x"), "oct": ("k",)}


def problem_of_keys(text: str) -> str:
    """Why a text is no key set (nor a single key, which Istio takes for a set of one), or empty."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"is not JSON: {error}"
    except RecursionError:
        return "is nested too deeply"
    if not isinstance(value, dict):
        return "must be a JSON object with the keys of the issuer"
    if "keys" not in value:
        return _problem_of_key(value, "the key set") or ""
    if not isinstance(value["keys"], list):
        return '"keys" must be a list'
    found = (_problem_of_key(key, f"keys[{index}]") for index, key in enumerate(value["keys"]))
    return next(filter(None, found), "")


def _problem_of_key(key: Any, where: str) -> str:
    if not isinstance(key, dict):
        return f"{where} is not an object"
    kind = key.get("kty")
    if kind not in _MEMBERS:
        return f'{where} has the key type "{kind}"; known are {", ".join(_MEMBERS)}'
    missing = [member for member in _MEMBERS[kind] if not key.get(member)]
    return f"{where} lacks {', '.join(missing)}" if missing else ""


def secret_keys(text: str) -> list[int]:
    """Positions of keys that hold private or shared secrets: verification needs none."""
    if problem_of_keys(text):
        return []
    value = json.loads(text)
    keys = value.get("keys", [value])
    return [index for index, key in enumerate(keys) if "d" in key or key.get("kty") == "oct"]
