"""Secrets with certificates for Istio's control plane; the laptop mesh reads none and issues its own."""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable
from typing import Any

from tests.support.pki import Authority


def secrets(places: Iterable[str]) -> list[dict[str, Any]]:
    """Secrets of "namespace/name"; all hold one certificate, which is its own authority's."""
    return [_secret(*place.split("/")) for place in places]


def _secret(namespace: str, name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"name": name, "namespace": namespace},
        "data": _data(),
    }


@functools.cache
def _data() -> dict[str, str]:
    authority = Authority()
    leaf = authority.leaf("spiffe://example")
    parts = {"tls.crt": leaf.cert, "tls.key": leaf.key, "ca.crt": authority.pem}
    return {key: base64.b64encode(value).decode() for key, value in parts.items()}
