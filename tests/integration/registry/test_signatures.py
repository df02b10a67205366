"""Signatures against the real model-signing tool, both ways, and in a real registry."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlmesh_cli.signing import make_bundle
from mlmesh_registry import signing
from mlmesh_registry.registry import Registry
from mlmesh_registry.signatures import files_of
from mlmesh_registry.signing import BadSignatureError, TrustedKeys, key_id, verify
from mlmesh_registry.versions import Artifact, Content, Version
from mlmesh_runtime.config import ConfigError
from mlmesh_runtime.errors import InvalidInput, NotFound, Overloaded, WrongState
from tests.support.registry import create_model, number, put, sha256
from tests.support.tools import ROOT

TOOL = ROOT / ".tools" / "model-signing" / "bin" / "model_signing"
CURVES = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
FILES = {"model.onnx": b"0123456789", "data/labels.json": b"[1]", "a.txt": b"a"}

Opener = Callable[..., AbstractAsyncContextManager[Registry]]


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The real tool; skips the test where `make tools` did not install it."""
    if not TOOL.exists():
        pytest.skip("model_signing is not here: `make tools` installs it")
    command = [str(TOOL), *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=100)


def new_key(folder: Path, curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    """A key, with its halves as files `key.pem` and `public.pem`."""
    key = ec.generate_private_key(curve)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "public.pem").write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, form))
    return key


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the files of a version."""
    folder = tmp_path / "model"
    for path, data in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


DIGESTS = {path: sha256(data) for path, data in FILES.items()}


@pytest.mark.parametrize("curve", sorted(CURVES))
def test_what_the_tool_signs_holds_here(tmp_path: Path, model: Path, curve: str) -> None:
    key = new_key(tmp_path, CURVES[curve])
    bundle = tmp_path / "model.sig"
    done = tool("sign", "key", "--private_key", tmp_path / "key.pem", "--signature", bundle, model)
    assert done.returncode == 0, done.stderr
    keys = TrustedKeys.of(key.public_key())
    assert verify(bundle.read_text(), DIGESTS, keys) == key_id(key.public_key())
    with pytest.raises(BadSignatureError, match=r"other bytes of 'a\.txt'"):
        verify(bundle.read_text(), {**DIGESTS, "a.txt": "00" * 32}, keys)


@pytest.mark.parametrize("curve", sorted(CURVES))
def test_what_is_signed_here_the_tool_verifies(tmp_path: Path, model: Path, curve: str) -> None:
    key = new_key(tmp_path, CURVES[curve])
    # As people keep it: beside the files.
    bundle = model / "model.sig"
    bundle.write_text(make_bundle("digits", DIGESTS, key))
    arguments = ("verify", "key", "--public_key", tmp_path / "public.pem", "--signature", bundle, model)
    done = tool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (model / "a.txt").write_bytes(b"b")
    assert tool(*arguments).returncode != 0


def test_what_the_tool_signs_otherwise_is_refused_clearly(tmp_path: Path, model: Path) -> None:
    """Another hash, or files left out."""
    key = new_key(tmp_path, ec.SECP256R1())
    bundle = tmp_path / "model.sig"
    ignoring = ("--ignore-paths", model / "a.txt")
    done = tool("sign", "key", "--private_key", tmp_path / "key.pem", "--signature", bundle, *ignoring, model)
    assert done.returncode == 0, done.stderr
    with pytest.raises(BadSignatureError, match=r"does not cover 'a\.txt'"):
        verify(bundle.read_text(), DIGESTS, TrustedKeys.of(key.public_key()))


@pytest.fixture
def key(tmp_path: Path) -> ec.EllipticCurvePrivateKey:
    """The key that the registry trusts."""
    (tmp_path / "trusted").mkdir()
    made = new_key(tmp_path, ec.SECP256R1())
    (tmp_path / "trusted" / "public.pem").write_bytes((tmp_path / "public.pem").read_bytes())
    return made


@pytest.fixture
async def trusting(open_here: Opener, tmp_path: Path, key: ec.EllipticCurvePrivateKey) -> AsyncIterator[Registry]:
    async with open_here(trusted_keys=str(tmp_path / "trusted")) as registry:
        yield registry


async def published(registry: Registry) -> Version:
    """A version of the files."""
    await create_model(registry)
    artifact = Artifact(path="model.json", sha256=await put(registry, b'{"w": 1}'))
    return await registry.store.create_version("m", Content(artifacts=(artifact,)), request_id="", actor="")


async def test_a_signature_is_stored_once_and_judged_anew(
    trusting: Registry, tmp_path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    version = await published(trusting)
    bundle = make_bundle("m", files_of(version), key)
    signatures = trusting.signatures
    first = await signatures.add(number(1), bundle, actor="spiffe://signer")
    assert (first.key_id, first.problem, first.creator) == (key_id(key.public_key()), "", "spiffe://signer")
    assert await signatures.add(number(1), bundle, actor="spiffe://other") == first
    assert await signatures.list(number(1)) == [first]
    # A key that is trusted no more takes its signatures with it, and brings them back.
    (tmp_path / "trusted" / "public.pem").rename(tmp_path / "trusted" / ".public.pem")
    (judged,) = await signatures.list(number(1))
    assert judged.key_id == ""
    assert "no key is trusted" in judged.problem
    (tmp_path / "trusted" / ".public.pem").rename(tmp_path / "trusted" / "public.pem")
    assert await signatures.list(number(1)) == [first]


async def test_what_does_not_hold_is_not_stored(
    trusting: Registry, tmp_path: Path, key: ec.EllipticCurvePrivateKey
) -> None:
    version = await published(trusting)
    files = files_of(version)
    other = ec.generate_private_key(ec.SECP256R1())
    for bundle in ("x", make_bundle("m", files, other), make_bundle("m", {**files, "b": "00" * 32}, key)):
        with pytest.raises(InvalidInput) as refused:
            await trusting.signatures.add(number(1), bundle, actor="")
        assert (refused.value.reason, refused.value.field) == ("SIGNATURE_INVALID", "bundle")
    with pytest.raises(NotFound):
        await trusting.signatures.add(number(2), make_bundle("m", files, key), actor="")
    assert await trusting.signatures.list(number(1)) == []
    for position in range(signing.SIGNATURES_MAX):
        await trusting.signatures.add(number(1), make_bundle(f"m{position}", files, key), actor="")
    with pytest.raises(Overloaded) as full:
        await trusting.signatures.add(number(1), make_bundle("one more", files, key), actor="")
    assert full.value.reason == "QUOTA_EXCEEDED"
    await trusting.store.delete_version(number(1), etag="", actor="")
    with pytest.raises(WrongState) as gone:
        await trusting.signatures.add(number(1), make_bundle("again", files, key), actor="")
    assert gone.value.reason == "VERSION_DELETED"


async def test_without_a_folder_nothing_is_trusted(registry: Registry, tmp_path: Path) -> None:
    key = new_key(tmp_path, ec.SECP256R1())
    version = await published(registry)
    with pytest.raises(InvalidInput, match="MLMESH_REGISTRY_TRUSTED_KEYS"):
        await registry.signatures.add(number(1), make_bundle("m", files_of(version), key), actor="")


async def test_a_bad_folder_stops_the_start(open_here: Opener, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "key.pem").write_bytes(b"nonsense")
    for folder in ("bad", "none"):
        with pytest.raises(ConfigError, match="MLMESH_REGISTRY_TRUSTED_KEYS"):
            async with open_here(trusted_keys=str(tmp_path / folder)):
                pass
