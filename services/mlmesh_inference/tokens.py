"""What a stream takes along when it moves: a token that the next server reads.

A stream of a model without state needs nothing but its place among its answers, which its client knows. A sequence's
state is in the server; where both servers have the same key, the token carries it, sealed with a MAC so that nobody
else can write a state. Without a key a token carries no state, and a sequence stays until it ends.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mlmesh_inference.tensors import DATATYPES, Array, Datatype, decode_raw, encode_raw
from mlmesh_runtime.errors import InvalidInput

TOKEN_CHARS_MAX: Final = 1 << 18
"""Longest token; sequences whose states do not fit stay where they are."""
SEQUENCES_MAX: Final = 64
"""Most sequences of one token."""
AGE_MAX_S: Final = 900.0
"""A token is good for this long: streams open again at once."""
FIELD: Final = "parameters[mlmesh_resume]"

_MAC_BYTES: Final = 32
_HEADER_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceState:
    """A sequence that is open: of which version, its id, and its state as the version's sequencer wrote it."""

    model: str
    version: int
    id: int | str
    state: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What a token says.

    Attributes:
        moves: how often the stream moved before.
        owner: identity of the client, "" where identities are unknown.
        written_s: when, seconds since 1970.
        sequences: those that were open.
    """

    moves: int = 0
    owner: str = ""
    written_s: float = 0.0
    sequences: Sequence[SequenceState] = ()


class Tokens:
    """Writes and reads tokens.

    Args:
        key: shared by the servers among which streams move; empty: tokens carry no state.
    """

    def __init__(self, key: bytes = b"") -> None:
        self._key = hashlib.sha256(b"mlmesh stream token\0" + key).digest() if key else b""

    @property
    def sealed(self) -> bool:
        """Whether tokens can carry state."""
        return bool(self._key)

    def write(self, token: Token) -> str:
        """The token as text. Raises ValueError when it is longer than TOKEN_CHARS_MAX, or has state without a key."""
        if token.sequences and not self._key:
            raise ValueError("a token without a key carries no state")
        head: dict[str, Any] = {"n": token.moves, "t": round(token.written_s, 3)}
        if token.owner:
            head["o"] = token.owner
        if token.sequences:
            head["s"] = [[item.model, item.version, item.id, len(item.state)] for item in token.sequences]
        text = json.dumps(head, separators=(",", ":")).encode()
        body = b"".join((len(text).to_bytes(_HEADER_BYTES, "big"), text, *(item.state for item in token.sequences)))
        written = base64.urlsafe_b64encode(self._mac(body) + body).decode()
        if len(token.sequences) > SEQUENCES_MAX or len(written) > TOKEN_CHARS_MAX:
            raise ValueError(f"the token of {len(token.sequences)} sequences has {len(written)} characters")
        return written

    def read(self, text: str, *, owner: str, now_s: float) -> Token:
        """Check a token. Raises InvalidInput when it is not one of ours, of another client, or too old."""
        if len(text) > TOKEN_CHARS_MAX:
            raise _refused(f"it has {len(text)} characters, at most {TOKEN_CHARS_MAX} are allowed")
        try:
            raw = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
        except (binascii.Error, UnicodeEncodeError):
            raise _refused("it is not base64") from None
        body = raw[_MAC_BYTES:]
        if not hmac.compare_digest(raw[:_MAC_BYTES], self._mac(body)):
            raise _refused("it was not written with this server's key")
        token = _parse(body)
        # Without a key anybody can write a token, and so it counts for nothing but a number.
        if not self._key and token.sequences:
            raise _refused("it carries state, and this server has no key to trust it by")
        if token.owner != owner and self._key:
            raise _refused("it was given to another client")
        if not -60 <= now_s - token.written_s <= AGE_MAX_S:
            raise _refused(f"it is older than {AGE_MAX_S:.0f} s")
        return token

    def _mac(self, body: bytes) -> bytes:
        if not self._key:
            return hashlib.sha256(body).digest()
        return hmac.new(self._key, body, hashlib.sha256).digest()


def _parse(body: bytes) -> Token:
    try:
        length = int.from_bytes(body[:_HEADER_BYTES], "big")
        head = json.loads(body[_HEADER_BYTES : _HEADER_BYTES + length])
        place, sequences = _HEADER_BYTES + length, []
        listed = head.get("s", [])
        if len(listed) > SEQUENCES_MAX:
            raise ValueError
        for model, version, name, size in listed:
            if type(model) is not str or type(version) is not int or type(name) not in (int, str) or size < 0:
                raise ValueError
            sequences.append(SequenceState(model=model, version=version, id=name, state=body[place : place + size]))
            place += size
        if place != len(body):
            raise ValueError
        moves, owner, written_s = int(head["n"]), str(head.get("o", "")), float(head["t"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _refused("it cannot be read") from None
    return Token(moves=moves, owner=owner, written_s=written_s, sequences=tuple(sequences))


def _refused(why: str) -> InvalidInput:
    return InvalidInput(f"the stream's token is refused: {why}", field=FIELD)


def pack(arrays: Mapping[str, Array]) -> bytes:
    """A sequence's state as bytes."""
    kinds = {name: _kind(array) for name, array in arrays.items()}
    raws = [encode_raw(kinds[name], array) for name, array in arrays.items()]
    head = [
        [name, kinds[name].name, list(array.shape), len(raw)]
        for (name, array), raw in zip(arrays.items(), raws, strict=True)
    ]
    text = json.dumps(head, separators=(",", ":")).encode()
    return b"".join((len(text).to_bytes(_HEADER_BYTES, "big"), text, *raws))


def unpack(state: bytes) -> dict[str, Array]:
    """The arrays that `pack` wrote. Raises InvalidInput for anything else."""
    try:
        place = _HEADER_BYTES + int.from_bytes(state[:_HEADER_BYTES], "big")
        arrays: dict[str, Array] = {}
        for name, kind, shape, size in json.loads(state[_HEADER_BYTES:place]):
            raw = state[place : place + size]
            arrays[name] = decode_raw(DATATYPES[kind], shape, raw, tensor=str(name)[:64], model="")
            place += size
        if place != len(state):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _refused("a state cannot be read") from None
    return arrays


def _kind(array: Array) -> Datatype:
    if array.dtype == object:
        return DATATYPES["BYTES"]
    return next(kind for kind in DATATYPES.values() if kind.name != "BF16" and kind.dtype == array.dtype)
