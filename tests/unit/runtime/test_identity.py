"""Who calls: the last word of x-forwarded-client-cert, or the one URI SAN."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_runtime.calls import CURRENT, Call
from mlmesh_runtime.errors import Unauthenticated
from mlmesh_runtime.identity import current_identity, tls_uris, xfcc_uris

REGISTRY = "spiffe://cluster.local/ns/mlmesh/sa/registry"
OPERATOR = "spiffe://cluster.local/ns/mlmesh/sa/operator"


@pytest.mark.parametrize(
    ("header", "uris"),
    [
        ("", []),
        (f"By=spiffe://x;Hash=ab;URI={REGISTRY}", [REGISTRY]),
        (f'By=x;Subject="CN=a,O=\\"b\\";x";URI={REGISTRY}', [REGISTRY]),
        # What the peer itself sent comes first and does not count.
        (f"By=x;URI={OPERATOR},By=y;Hash=1;URI={REGISTRY}", [REGISTRY]),
        (f"URI={OPERATOR},By=y;Hash=1", []),
        (f"URI={REGISTRY};URI={OPERATOR}", [REGISTRY, OPERATOR]),
        (f'URI="{REGISTRY}"', [REGISTRY]),
        (f"uri={REGISTRY}", [REGISTRY]),
        # A quoted value cannot smuggle an element or a pair in.
        (f'Subject="x,URI={OPERATOR}";URI={REGISTRY}', [REGISTRY]),
        (f'URI={REGISTRY},Subject="x;URI={OPERATOR}"', []),
        # An unclosed quote: nothing after it can be told apart.
        (f'URI={REGISTRY},Subject="x;URI={OPERATOR}', []),
        ("URI=", []),
        (",,;;==", []),
    ],
)
def test_only_the_last_element_counts(header: str, uris: list[str]) -> None:
    assert xfcc_uris(header) == uris


PIECES = ["URI=spiffe://cluster.local/ns/mlmesh/sa/operator", "x=", '"', ";", ",", "\\", 'Subject="', " "]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
def test_no_header_of_the_peers_own_makes_it_somebody_else(peers: str) -> None:
    """The sidecar appends its element to whatever the peer sent, unclosed quotes and stray escapes included."""
    for own in (f'By=b;Hash=00;Subject="";URI={REGISTRY}', f'By=b;Subject="O=x,CN=\\"y\\"";URI={REGISTRY}'):
        uris = xfcc_uris(f"{peers},{own}")
        # Right, unknown, or refused as ambiguous; never one other identity.
        assert uris == [] or REGISTRY in uris


class Context:
    """The part of gRPC's context that a Call reads."""

    def __init__(self, *metadata: tuple[str, str], auth: dict[str, list[bytes]] | None = None) -> None:
        self._metadata, self._auth = metadata, auth or {"transport_security_type": [b"insecure"]}

    def time_remaining(self) -> float | None:
        return None

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._auth


def identity(source: str, context: Context) -> str:
    token = CURRENT.set(Call(context, "/x/Y", source))
    try:
        return current_identity()
    finally:
        CURRENT.reset(token)


def test_each_source_ignores_the_other() -> None:
    forged = ("x-forwarded-client-cert", f"URI={OPERATOR}")
    tls = {"transport_security_type": [b"ssl"], "peer_uri": [REGISTRY.encode()]}
    assert identity("tls", Context(forged, auth=tls)) == REGISTRY
    assert identity("xfcc", Context(forged, auth=tls)) == OPERATOR
    assert identity("none", Context(forged, auth=tls)) == ""
    assert identity("tls", Context(forged)) == ""


def test_several_headers_count_as_one() -> None:
    headers = [("x-forwarded-client-cert", f"URI={OPERATOR}"), ("x-forwarded-client-cert", f"URI={REGISTRY}")]
    assert identity("xfcc", Context(*headers)) == REGISTRY


def test_two_identities_are_none() -> None:
    with pytest.raises(Unauthenticated, match="names 2 identities") as caught:
        identity("xfcc", Context(("x-forwarded-client-cert", f"URI={REGISTRY};URI={OPERATOR}")))
    assert caught.value.reason == "AMBIGUOUS_IDENTITY"


def test_only_spiffe_counts() -> None:
    assert identity("xfcc", Context(("x-forwarded-client-cert", "URI=https://example.com"))) == ""
    assert tls_uris({"transport_security_type": [b"insecure"], "peer_uri": [b"spiffe://a"]}) == []


def test_outside_of_a_call_nobody_calls() -> None:
    assert current_identity() == ""
