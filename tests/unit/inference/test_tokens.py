"""Tokens of moving streams: what they carry, and what is refused."""

from __future__ import annotations

import base64
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_inference.tensors import object_array
from mlmesh_inference.tokens import AGE_MAX_S, TOKEN_CHARS_MAX, SequenceState, Token, Tokens, pack, unpack
from mlmesh_runtime.errors import InvalidInput

KEY = b"a key of sixteen bytes or more"
STATE = SequenceState(model="m", version=3, id=7, state=b"\0state\xff")
TOKEN = Token(moves=2, owner="spiffe://a", written_s=1000.0, sequences=(STATE, dataclasses.replace(STATE, id="seven")))


def read(text: str, tokens: Tokens | None = None, *, owner: str = "spiffe://a", now_s: float = 1001.0) -> Token:
    return (tokens or Tokens(KEY)).read(text, owner=owner, now_s=now_s)


def test_a_token_says_elsewhere_what_was_written_here() -> None:
    assert read(Tokens(KEY).write(TOKEN)) == TOKEN
    plain = Token(moves=5, written_s=1000.0)
    assert read(Tokens().write(plain), Tokens()) == plain


def test_no_state_without_a_key() -> None:
    assert not Tokens().sealed
    with pytest.raises(ValueError, match="without a key"):
        Tokens().write(TOKEN)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (Tokens(b"another key").write(TOKEN), {}),
        (Tokens(KEY).write(TOKEN), {"owner": "spiffe://b"}),
        (Tokens(KEY).write(TOKEN), {"now_s": 1001.0 + AGE_MAX_S}),
        (Tokens(KEY).write(TOKEN), {"now_s": 900.0}),
        (Tokens().write(Token(written_s=1000.0)), {}),
        ("", {}),
        ("%%%", {}),
        ("é", {}),
        ("A" * (TOKEN_CHARS_MAX + 4), {}),
    ],
    ids=["other key", "other owner", "old", "of the future", "no key", "empty", "no base64", "no ascii", "long"],
)
def test_what_is_not_ours_is_refused(text: str, changes: dict[str, object]) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(text, **changes)  # type: ignore[arg-type]
    assert caught.value.violations[0].field == "parameters[mlmesh_resume]"


@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_bit_that_turned_is_noticed(place: int, bit: int) -> None:
    raw = bytearray(base64.urlsafe_b64decode(Tokens(KEY).write(TOKEN)))
    raw[place % len(raw)] ^= 1 << bit
    with pytest.raises(InvalidInput):
        read(base64.urlsafe_b64encode(raw).decode())


@given(st.binary(max_size=200))
def test_a_server_without_a_key_survives_any_token(body: bytes) -> None:
    import hashlib

    text = base64.urlsafe_b64encode(hashlib.sha256(body).digest() + body).decode()
    with pytest.raises(InvalidInput):
        read(text, Tokens())


def test_a_state_that_somebody_wrote_without_a_key_is_not_believed() -> None:
    sealed = base64.urlsafe_b64decode(Tokens(KEY).write(TOKEN))[32:]
    import hashlib

    forged = base64.urlsafe_b64encode(hashlib.sha256(sealed).digest() + sealed).decode()
    for tokens in (Tokens(), Tokens(KEY)):
        with pytest.raises(InvalidInput):
            read(forged, tokens)


def test_a_token_is_bounded() -> None:
    with pytest.raises(ValueError, match="characters"):
        Tokens(KEY).write(Token(sequences=(dataclasses.replace(STATE, state=bytes(TOKEN_CHARS_MAX)),)))
    with pytest.raises(ValueError, match="100 sequences"):
        Tokens(KEY).write(Token(sequences=(STATE,) * 100))


def test_states_of_every_kind_travel() -> None:
    arrays = {
        "h": np.arange(6, dtype=np.float32).reshape(1, 2, 3),
        "n": np.array([-5], np.int64),
        "half": np.array([1.5], np.float16),
        "flag": np.array([True]),
        "bits": np.array([[1, 2]], np.uint16),
        "none": np.zeros((0, 3), np.float64),
        "text": object_array([b"", b"\0\xff"], (2, 1)),
    }
    back = unpack(pack(arrays))
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(back[name], array)


@given(st.binary(max_size=100))
def test_a_state_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        unpack(b"\0\0\0\5[[1]]" + data)
