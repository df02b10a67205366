"""Checking a version from end to end: its bytes by the registry, its signatures here, its files on this disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric import ec
from rich.console import Group
from rich.text import Text

from mlmesh.registry.v1 import registry_pb2 as pb
from mlmesh_cli.errors import CliError
from mlmesh_cli.names import ModelReference
from mlmesh_cli.render import text as t
from mlmesh_cli.render.registry import signatures_table
from mlmesh_cli.resolving import version_of
from mlmesh_cli.signing import (
    check_folder,
    check_signed,
    files_of,
    load_public_keys,
    make_bundle,
    signatures_of,
)
from mlmesh_cli.terminal import Terminal, message_dict

if TYPE_CHECKING:
    from mlmesh.registry.v1.registry_pb2_grpc import ModelRegistryServiceAsyncStub

# Terabytes take their time.
_VERIFY_DEADLINE_S = 3600.0


async def verified(
    stub: ModelRegistryServiceAsyncStub,
    reference: ModelReference,
    terminal: Terminal,
    *,
    public_keys: Sequence[Path],
    folder: Path | None,
) -> None:
    """Checks all that is asked for and shows what was found.

    Raises:
        CliError: bytes are corrupt, the keys given did not sign it, or the folder's files are others.
    """
    keys = load_public_keys(public_keys)
    name = (await version_of(stub, reference)).name
    answer = await stub.VerifyModelVersion(pb.VerifyModelVersionRequest(name=name), timeout=_VERIFY_DEADLINE_S)
    version = answer.model_version
    signatures = await signatures_of(stub, version)
    key = check_signed(version, [each.bundle for each in signatures], keys) if public_keys else ""
    if folder is not None:
        await asyncio.to_thread(check_folder, folder, files_of(version))
    whole = not answer.corrupt_paths
    line = f"{t.size(answer.verified_bytes)} read, every file is what was published"
    lines = [Text(line, style="green")] if whole else [Text(f"corrupt: {p}", style="red") for p in answer.corrupt_paths]
    if key:
        lines.append(Text(f"signed by key {key}", style="green"))
    if folder is not None:
        lines.append(Text(f"the files in {folder} are the version's", style="green"))
    value = {
        "model_version": name,
        "corrupt_paths": [*answer.corrupt_paths],
        "verified_bytes": answer.verified_bytes,
        "signatures": [message_dict(each) for each in signatures],
        "signed_by": key,
    }
    terminal.show(Group(*lines, signatures_table(signatures, datetime.now(UTC))), value)
    if not whole:
        hint = "publish it again from a good copy; it is quarantined until then"
        raise CliError(f"{name} has corrupt files", hint, reason="BLOB_CORRUPT")


async def trusted(
    stub: ModelRegistryServiceAsyncStub, reference: ModelReference, public_keys: Sequence[Path]
) -> ModelReference:
    """The version by number, once one of these keys signed it: an alias might move before it is downloaded.

    Raises:
        CliError: none did.
    """
    keys = load_public_keys(public_keys)
    version = await version_of(stub, reference)
    check_signed(version, [each.bundle for each in await signatures_of(stub, version)], keys)
    return ModelReference(model=reference.model, version=version.name.rpartition("/")[2])


async def signed(
    stub: ModelRegistryServiceAsyncStub,
    reference: ModelReference,
    key: ec.EllipticCurvePrivateKey,
    folder: Path | None,
) -> pb.VersionSignature:
    """Signs a version's files and stores the signature. Raises CliError when the folder's files are others."""
    version = await version_of(stub, reference)
    if folder is not None:
        await asyncio.to_thread(check_folder, folder, files_of(version))
    bundle = make_bundle(t.model_version(version.name), files_of(version), key)
    request = pb.AddModelVersionSignatureRequest(parent=version.name, bundle=bundle)
    return (await stub.AddModelVersionSignature(request)).signature
