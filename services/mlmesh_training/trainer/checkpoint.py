"""Checkpoints that are whole or not there.

A checkpoint is written beside its place, flushed to disk and renamed; its name carries the SHA-256 of its bytes, so one
that was torn or changed afterwards is seen and passed over. The last two are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from mlmesh_runtime.chunks import fsync_directory, sha256_of

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{12})-([0-9a-f]{64})\.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A checkpoint on disk: the optimizer steps done, the file and the digest that its bytes should have."""

    step: int
    path: Path
    sha256: str


class _Hashing:
    """A file that is digested as it is written, so that a large model is not in memory twice."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def save(folder: Path, step: int, state: Mapping[str, Any]) -> str:
    """Store the state after so many optimizer steps and return its SHA-256, hex. Older ones than the last two go.

    Errors: OSError (no space, a failed flush); nothing is left behind then, and the earlier ones stay.
    """
    partial = folder / f"checkpoint-{step:012d}.part"
    try:
        with partial.open("wb") as file:
            hashing = _Hashing(file)
            _write(state, hashing)
            file.flush()
            os.fsync(file.fileno())
        sha256 = hashing.digest.hexdigest()
        partial.replace(folder / f"checkpoint-{step:012d}-{sha256}.pt")
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
        yield Stored(step=int(match[1]), path=path, sha256=match[2])


def load(candidate: Stored) -> dict[str, Any] | None:
    """The state in a checkpoint, None when its bytes are not those that were written."""
    if sha256_of(candidate.path)[0] != candidate.sha256:
        return None
    state: dict[str, Any] = torch.load(candidate.path, map_location="cpu", weights_only=True)
    return state


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.glob("*.part"):
        path.unlink(missing_ok=True)


def _write(state: Mapping[str, Any], file: _Hashing) -> None:
    try:
        torch.save(dict(state), file)  # type: ignore[arg-type]  # only `write` is called
    except RuntimeError as error:
        # torch's writer ends with an error of its own after one of the file's.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
