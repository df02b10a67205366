"""Checkpoints that are whole or not there.

A checkpoint is written beside its place, flushed to disk and renamed; its name carries the SHA-256 of its bytes, so one
that was torn or changed afterwards is seen and passed over. The last two are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlmesh_runtime.chunks import fsync_directory

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{8})-([0-9a-f]{64})\.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A checkpoint on disk: the epochs done, the file and the digest that its bytes should have."""

    epoch: int
    path: Path
    sha256: str


def save(folder: Path, epoch: int, state: Mapping[str, Any]) -> str:
    """Store the state after an epoch and return its SHA-256, hex. Older ones than the last two are removed.

    Errors: OSError (no space, a failed flush); nothing is left behind then, and the earlier ones stay.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    data = buffer.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()
    final = folder / f"checkpoint-{epoch:08d}-{sha256}.pt"
    partial = final.with_suffix(".part")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(final)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    fsync_directory(folder)
    for old in list(stored(folder))[KEPT:]:
        old.path.unlink(missing_ok=True)
    return sha256


def stored(folder: Path) -> Iterator[Stored]:
    """Checkpoints by name, newest first; whether they are whole is not looked at."""
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    for match, path in sorted(found, key=lambda item: item[1].name, reverse=True):
        yield Stored(epoch=int(match[1]), path=path, sha256=match[2])


def load(candidate: Stored) -> dict[str, Any] | None:
    """The state in a checkpoint, None when its bytes are not those that were written."""
    data = candidate.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != candidate.sha256:
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob("*.part"):
        path.unlink(missing_ok=True)
