"""Signatures over versions: what holds, and everything that does not."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_cli.signing import make_bundle
from mlmesh_registry import signing
from mlmesh_registry.signatures import KeyFolder
from mlmesh_registry.signing import BadKeyError, BadSignatureError, TrustedKeys, key_id, load_keys, verify

KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP384R1())
FILES = {"model.onnx": "ab" * 32, "data/labels.json": "cd" * 32}
KEYS = TrustedKeys.of(KEY.public_key(), OTHER.public_key())
BUNDLE = make_bundle("m", FILES, KEY)


def pem(key: Any) -> bytes:
    """A public key as a file has it."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
def test_a_bundle_of_each_curve_holds(curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    keys = TrustedKeys.of(KEY.public_key(), key.public_key())
    assert verify(make_bundle("m", FILES, key), FILES, keys) == key_id(key.public_key())


def test_without_a_hint_every_key_is_tried() -> None:
    bundle = json.loads(make_bundle("m", FILES, OTHER))
    bundle["verificationMaterial"]["publicKey"] = {}
    assert verify(json.dumps(bundle), FILES, KEYS) == key_id(OTHER.public_key())


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"model.onnx": "ab" * 32}, "covers what the version does not have: 'data/labels.json'"),
        ({**FILES, "x.txt": "00" * 32}, "does not cover 'x.txt'"),
        ({**FILES, "model.onnx": "00" * 32}, "other bytes of 'model.onnx'"),
        ({**FILES, **{f"{n}.txt": "00" * 32 for n in range(5)}}, "'0.txt', '1.txt', '2.txt' and 2 more"),
        ({}, "covers what the version does not have"),
    ],
)
def test_other_files_are_told(files: dict[str, str], problem: str) -> None:
    with pytest.raises(BadSignatureError, match=problem):
        verify(BUNDLE, files, KEYS)


def test_keys_that_are_not_trusted() -> None:
    with pytest.raises(BadSignatureError, match="MLMESH_REGISTRY_TRUSTED_KEYS"):
        verify(BUNDLE, FILES, TrustedKeys())
    with pytest.raises(BadSignatureError, match="the key that it names"):
        verify(BUNDLE, FILES, TrustedKeys.of(OTHER.public_key()))


def changed(**parts: Any) -> str:
    """The bundle with parts of it replaced, without signing anew."""
    bundle = json.loads(BUNDLE)
    bundle.update(parts)
    return json.dumps(bundle)


def resigned(change: Callable[[dict[str, Any]], None]) -> str:
    """A bundle by a trusted key over another statement: what a careless or hostile holder of a key could make."""
    bundle = json.loads(BUNDLE)
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    payload = json.dumps(statement).encode()
    signature = KEY.sign(signing.encoded(payload), ec.ECDSA(signing.HASHES[KEY.curve.name]()))
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    bundle["dsseEnvelope"]["signatures"] = [{"sig": base64.b64encode(signature).decode()}]
    return json.dumps(bundle)


ENVELOPE = json.loads(BUNDLE)["dsseEnvelope"]


@pytest.mark.parametrize(
    ("bundle", "problem"),
    [
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("x" * 300_000, "at most 262144 are read"),
        ("[]", "no object"),
        ("{}", "mediaType"),
        (changed(mediaType="application/json"), "mediaType"),
        (changed(verificationMaterial=None), "verificationMaterial"),
        (changed(verificationMaterial={"certificate": {}}), "not made with a key"),
        (changed(verificationMaterial={"publicKey": "x"}), "publicKey"),
        (changed(verificationMaterial={"publicKey": {"hint": "00"}}), "the key that it names"),
        (
            changed(verificationMaterial={"publicKey": {"hint": signing.hint(OTHER.public_key())}}),
            "not over this payload",
        ),
        (changed(dsseEnvelope={}), "payloadType"),
        (changed(dsseEnvelope={**ENVELOPE, "payloadType": "text/plain"}), "payloadType"),
        (changed(dsseEnvelope={**ENVELOPE, "signatures": []}), "exactly one signature"),
        (changed(dsseEnvelope={**ENVELOPE, "signatures": ENVELOPE["signatures"] * 2}), "exactly one signature"),
        (changed(dsseEnvelope={**ENVELOPE, "signatures": [{"sig": "!"}]}), "not base64"),
        (changed(dsseEnvelope={**ENVELOPE, "signatures": [{"sig": "AAAA"}]}), "not over this payload"),
        (changed(dsseEnvelope={**ENVELOPE, "payload": 3}), "not base64"),
        (changed(dsseEnvelope={**ENVELOPE, "payload": "e30="}), "not over this payload"),
        (resigned(lambda s: s.update(_type="x")), "not a statement"),
        (resigned(lambda s: s.update(predicateType="https://model_signing/Digests/v0.1")), "not a statement"),
        (resigned(lambda s: s.update(predicate=None)), "predicate"),
        (resigned(lambda s: s["predicate"]["serialization"].update(method="shards")), "one by one"),
        (resigned(lambda s: s["predicate"]["serialization"].update(hash_type="blake3")), "one by one"),
        (resigned(lambda s: s["predicate"].update(resources={})), "lists no files"),
        (resigned(lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0])), "twice"),
        (resigned(lambda s: s["predicate"]["resources"][0].update(algorithm="md5")), "another digest"),
        (resigned(lambda s: s["predicate"]["resources"][0].update(digest="AB" * 32)), "without a name or a SHA-256"),
        (resigned(lambda s: s["predicate"]["resources"][0].update(name=3)), "without a name"),
        (resigned(lambda s: s["predicate"]["resources"].reverse()), "the subject's digest"),
        (resigned(lambda s: s.update(subject=[])), "one subject"),
        (resigned(lambda s: s["subject"][0].update(digest={"sha256": "00" * 32})), "the subject's digest"),
    ],
)
def test_what_does_not_hold(bundle: str, problem: str) -> None:
    with pytest.raises(BadSignatureError, match=problem):
        verify(bundle, FILES, KEYS)


@given(st.integers(0, len(BUNDLE) - 1), st.characters(codec="ascii", exclude_characters="\0"))
def test_no_changed_character_makes_another_signature_hold(position: int, character: str) -> None:
    """Whatever is changed on the way, either it meant nothing or the signature is refused; files are never others."""
    bundle = BUNDLE[:position] + character + BUNDLE[position + 1 :]
    try:
        verify(bundle, {**FILES, "model.onnx": "00" * 32}, KEYS)
    except BadSignatureError:
        return
    raise AssertionError("it holds over other files")


def test_keys_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_bytes(pem(KEY))
    (tmp_path / "b.pub").write_bytes(pem(OTHER))
    (tmp_path / ".hidden").write_bytes(b"anything")
    assert load_keys(tmp_path).by_id.keys() == KEYS.by_id.keys()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"hello", "is not a public key in PEM"),
        (pem(ed25519.Ed25519PrivateKey.generate()), "P-256"),
        (pem(ec.generate_private_key(ec.SECP256K1())), "P-256"),
        (b"-----BEGIN PRIVATE KEY-----", "holds a private key"),
        (b"x" * 100_000, "too long"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "k.pem").write_bytes(content)
    with pytest.raises(BadKeyError, match=f"k.pem .*{problem}"):
        load_keys(tmp_path)
    with pytest.raises(BadKeyError):
        KeyFolder(tmp_path)
    with pytest.raises(BadKeyError, match="cannot read"):
        load_keys(tmp_path / "none")


def test_a_folder_is_read_again_when_it_changes(tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_bytes(pem(KEY))
    trusted = KeyFolder(tmp_path)
    assert trusted().by_id.keys() == {key_id(KEY.public_key())}
    (tmp_path / "b.pem").write_bytes(pem(OTHER))
    assert trusted().by_id.keys() == KEYS.by_id.keys()
    # A bad file might have been a key that is to be trusted no more: nothing is trusted until that is clear.
    (tmp_path / "a.pem").write_bytes(b"oops")
    assert not trusted().by_id
    (tmp_path / "a.pem").unlink()
    assert trusted().by_id.keys() == {key_id(OTHER.public_key())}
