"""Signing versions and checking signatures, with keys that are on this machine."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError
from mlmesh_registry import signing
from mlmesh_registry.signing import BadKeyError, BadSignatureError, TrustedKeys
from mlmesh_runtime.chunks import sha256_of

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub

_KEY_HINT = "make one with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"


def files_of(version: pb.ModelVersion) -> dict[str, str]:
    """Hex SHA-256 by path, as the registry tells them."""
    return {artifact.path: artifact.blob.removeprefix("blobs/sha256-") for artifact in version.artifacts}


def load_private_key(path: Path, password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Reads a private key in PEM. Raises CliError."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password)
    except (ValueError, TypeError):
        problem = f"{path} is not a private key in PEM" + (
            ", or the password is not its own" if password else ", or needs --password-file"
        )
        raise CliError(problem, _KEY_HINT, reason="BAD_KEY") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in signing.HASHES:
        raise CliError(f"{path} is not a key of P-256, P-384 or P-521", _KEY_HINT, reason="BAD_KEY")
    return key


def load_public_keys(paths: Iterable[Path]) -> TrustedKeys:
    """Reads public keys in PEM. Raises CliError."""
    keys = []
    for path in paths:
        try:
            keys.append(signing.public_key(path.read_bytes()))
        except BadKeyError as error:
            hint = "openssl ec -in key.pem -pubout -out public.pem writes the public half of a key"
            raise CliError(f"{path} {error}", hint, reason="BAD_KEY") from None
    return TrustedKeys.of(*keys)


def make_bundle(name: str, files: Mapping[str, str], key: ec.EllipticCurvePrivateKey) -> str:
    """A Sigstore bundle over files (hex SHA-256 by path), as `model_signing sign key` writes it.

    Args:
        name: what the statement calls its subject; not checked by anybody.
    """
    paths = sorted(files)
    statement = {
        "_type": signing.STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": signing.root_digest([files[path] for path in paths])}}],
        "predicateType": signing.PREDICATE_TYPE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [{"name": path, "algorithm": "sha256", "digest": files[path]} for path in paths],
        },
    }
    payload = json.dumps(statement, sort_keys=True).encode()
    signature = key.sign(signing.encoded(payload), ec.ECDSA(signing.HASHES[key.curve.name]()))
    bundle = {
        "mediaType": signing.MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": signing.hint(key.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": signing.PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(bundle)


def check_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Compares files on this disk with the registry's. Raises CliError that names the first that differs."""
    for path, digest in files.items():
        here = folder / path
        if not here.resolve().is_relative_to(folder.resolve()) or not here.is_file():
            raise CliError(f"{here} is not here", f"`mlmesh models download` fetches it into {folder}")
        if sha256_of(here)[0] != digest:
            raise CliError(
                f"{here} is not the file that the registry has", "download it again", reason="DIGEST_MISMATCH"
            )


async def signatures_of(stub: ModelRegistryServiceAsyncStub, version: pb.ModelVersion) -> Sequence[pb.VersionSignature]:
    """The signatures of a version as the registry judges them."""
    request = pb.ListModelVersionSignaturesRequest(parent=version.name)
    return (await stub.ListModelVersionSignatures(request)).signatures


def check_signed(version: pb.ModelVersion, bundles: Iterable[str], keys: TrustedKeys) -> str:
    """Id of the first of these keys that signed the version's files; the registry's own judgement is not asked.

    Raises:
        CliError: none did.
    """
    problems = []
    for bundle in bundles:
        try:
            return signing.verify(bundle, files_of(version), keys)
        except BadSignatureError as error:
            problems.append(str(error))
    why = "; ".join(problems) if problems else "it has no signature at all"
    hint = "`mlmesh models verify` shows its signatures, `mlmesh models sign` adds one"
    raise CliError(f"{version.name} is not signed by the key given: {why}", hint, reason="SIGNATURE_INVALID")
