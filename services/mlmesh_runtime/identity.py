"""Who calls: the SPIFFE identity of the peer of the RPC being handled.

Two sources, chosen by MLMESH_IDENTITY_SOURCE and never mixed:

- ``xfcc``: the sidecar verified the peer's certificate and wrote ``x-forwarded-client-cert``. Istio's sidecars *append*
  to what the peer sent, so only the LAST element is the sidecar's own word; everything before it is hearsay. Use it
  only where nothing but the sidecar can reach the port.
- ``tls``: this process verified the certificate itself; the identity is its one URI SAN (SPIFFE X.509-SVID section 2:
  exactly one). The header is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mlmesh_runtime.calls import CURRENT, Call
from mlmesh_runtime.errors import Unauthenticated

XFCC = "x-forwarded-client-cert"


def current_identity() -> str:
    """SPIFFE id of the caller of the RPC being handled; "" when unknown.

    Raises Unauthenticated (AMBIGUOUS_IDENTITY) when the caller's certificate names more than one.
    """
    call = CURRENT.get()
    return "" if call is None else identity_of(call)


def identity_of(call: Call) -> str:
    """SPIFFE id of one call's peer, looked up once; "" when unknown. Raises Unauthenticated when ambiguous."""
    if call.identity is None:
        call.identity = _look_up(call)
    return call.identity


def _look_up(call: Call) -> str:
    if call.identity_source == "xfcc":
        values = [value for key, value in call.metadata if key == XFCC and isinstance(value, str)]
        return _only(xfcc_uris(",".join(values)))
    if call.identity_source == "tls":
        return _only(tls_uris(call.context.auth_context()))
    return ""


def _only(uris: Sequence[str]) -> str:
    if len(uris) > 1:
        raise Unauthenticated(
            f"the certificate names {len(uris)} identities; exactly one is allowed", reason="AMBIGUOUS_IDENTITY"
        )
    return uris[0] if uris and uris[0].startswith("spiffe://") else ""


def tls_uris(auth_context: Mapping[str, Sequence[bytes]]) -> list[str]:
    """The URI SANs of a verified client certificate, out of gRPC's auth context."""
    if auth_context.get("transport_security_type") != [b"ssl"]:
        return []
    return [uri.decode("utf-8", "replace") for uri in auth_context.get("peer_uri", ())]


def xfcc_uris(header: str) -> list[str]:
    """The URIs of the last element of an x-forwarded-client-cert header; [] when it has none or does not parse.

    Grammar (Envoy): elements apart by ``,``, pairs apart by ``;``, a value may be quoted, and a quote in
    it is escaped by a backslash.
    """
    last: list[str] = []
    for element in _split(header, ","):
        last = []
        for pair in _split(element, ";"):
            key, equals, value = pair.partition("=")
            if equals and key.strip().lower() == "uri":
                last.append(_unquote(value.strip()))
    return [uri for uri in last if uri]


def _split(text: str, separator: str) -> Iterator[str]:
    """Split on a separator outside of quotes. An unclosed quote swallows the rest, which then has no separate URI."""
    start, quoted, escaped = 0, False, False
    for index, char in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and char == "\\":
            escaped = True
        elif char == '"':
            quoted = not quoted
        elif char == separator and not quoted:
            yield text[start:index]
            start = index + 1
    if not quoted:
        yield text[start:]
    else:
        yield ""


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return value[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    return value
