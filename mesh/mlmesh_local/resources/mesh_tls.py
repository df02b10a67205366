"""Settings of MeshConfig about TLS: of mutual TLS between sidecars (`meshMTLS`), of other TLS (`tlsDefaults`)."""

from __future__ import annotations

from dataclasses import dataclass

from mlmesh_local.resources.ciphers import is_cipher_suite
from mlmesh_local.resources.fields import Fields

_CURVES = ("P-224", "P-256", "P-521", "P-384", "X25519", "X25519Kyber768Draft00", "X25519MLKEM768")
_VERSIONS = {"TLS_AUTO": "", "TLSV1_2": "TLSv1_2", "TLSV1_3": "TLSv1_3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsSettings:
    """What TLS must be at least; empty leaves Istio's. ``min_version`` is Envoy's word."""

    min_version: str = ""
    cipher_suites: tuple[str, ...] = ()
    curves: tuple[str, ...] = ()


def mesh_mtls(fields: Fields) -> TlsSettings:
    """Read `meshMTLS`; Istio refuses curves there."""
    if fields.has("ecdhCurves"):
        fields.refuse("ecdhCurves", "does not go with meshMTLS")
    return tls_settings(fields)


def tls_settings(fields: Fields) -> TlsSettings:
    """Read the settings. Names that Envoy does not know are refused: it would reject every listener for them."""
    return TlsSettings(
        min_version=_VERSIONS[fields.choice("minProtocolVersion", tuple(_VERSIONS), "TLS_AUTO")],
        cipher_suites=fields.texts("cipherSuites", is_cipher_suite, "a cipher suite that Envoy knows"),
        curves=fields.texts("ecdhCurves", lambda name: name in _CURVES, f"one of {', '.join(_CURVES)}"),
    )
