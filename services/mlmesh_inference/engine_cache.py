"""Compiled engines on disk: found by what they were compiled from and for, and believed only when their MAC holds.

An engine is machine code that a library runs, so a file that somebody else could write is never given to it. Every file
ends with an HMAC-SHA-256 over all of it, by a key that only this process (or, for shared engines, its fleet) has:

    magic, 16 bytes | length of the header, 4 bytes | header, JSON | plan | MAC, 32 bytes

The MAC is checked over the very bytes that are used, before anything else in them is looked at. What does not hold is
deleted and counted. Files are written whole or not at all; the longest unused go first when there are too many.

Everything here blocks: call it on an executor.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_compile import PlanFacts
from mlmesh_runtime.chunks import fsync_directory, sha256_of

_LOG = logging.getLogger(__name__)

MAGIC: Final = b"mlmesh engine 1\n"
SUFFIX: Final = ".engine"
KEY_BYTES_MIN: Final = 32
_HEADER_BYTES_MAX: Final = 65536
_MAC_BYTES: Final = 32
_LENGTH_BYTES: Final = 4

# Files beside the model that say nothing about its arithmetic.
_ASIDE: Final = (".pbtxt", ".txt", ".json", ".md", ".png")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanKey:
    """What an engine belongs to; another value of any of these is another engine.

    Attributes:
        model: digest of the model, see model_digest.
        flavour, version: of TensorRT.
        target: GPU with its compute capability, or the capabilities that a portable plan is for.
        profiles: as PlanOptions.describe says.
        precision: "as the model says", or with what was asked for beside it.
    """

    model: str
    flavour: str
    version: str
    target: str
    profiles: str
    precision: str

    @property
    def digest(self) -> str:
        """Lower-case hex SHA-256: the entry's name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A compiled engine and what is known of it. `source` is "built", "cache" or "registry"."""

    key: PlanKey
    facts: PlanFacts
    data: memoryview | bytes
    source: str


class NotBelieved(Exception):  # noqa: N818  named by what is wrong
    """Bytes that are no engine of ours; the text says why."""


def model_digest(model: Path) -> str:
    """Digest of a model file, and of the files beside it when there are others, such as its weights.

    A model without such files has its own SHA-256.
    """
    root = model.parent
    others = sorted(
        path for path in root.rglob("*") if path != model and path.is_file() and not path.name.endswith(_ASIDE)
    )
    own = sha256_of(model)[0]
    if not others:
        return own
    lines = [f"{own}  {model.name}", *(f"{sha256_of(path)[0]}  {path.relative_to(root)}" for path in others)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sealed(plan: Plan, key: bytes) -> bytes:
    """The bytes of a file, with its MAC."""
    header = json.dumps({"key": asdict(plan.key), "facts": plan.facts.to_json()}, sort_keys=True).encode()
    body = b"".join((MAGIC, len(header).to_bytes(_LENGTH_BYTES, "little"), header, bytes(plan.data)))
    return body + hmac.digest(key, body, "sha256")


def opened(data: bytes, key: bytes, wanted: PlanKey, *, source: str) -> Plan:
    """The plan in bytes that `sealed` made with this key, for this very purpose. Raises NotBelieved."""
    view = memoryview(data)
    body, mac = view[:-_MAC_BYTES], view[-_MAC_BYTES:]
    if len(data) < len(MAGIC) + _LENGTH_BYTES + _MAC_BYTES or not hmac.compare_digest(
        hmac.digest(key, body, "sha256"), mac
    ):
        raise NotBelieved("its MAC does not hold: it is cut, changed, or made with another key")
    start = len(MAGIC) + _LENGTH_BYTES
    size = int.from_bytes(view[len(MAGIC) : start], "little")
    if bytes(body[: len(MAGIC)]) != MAGIC or size > min(_HEADER_BYTES_MAX, len(body) - start):
        raise NotBelieved("it is of another format")
    try:
        header = json.loads(bytes(view[start : start + size]))
        found, facts = PlanKey(**header["key"]), PlanFacts.from_json(header["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise NotBelieved(f"its header cannot be read: {error}") from None
    if found != wanted:
        raise NotBelieved("it is an engine for something else")
    plan = body[start + size :]
    if len(plan) != facts.size:
        raise NotBelieved(f"it holds {len(plan)} bytes, its header says {facts.size}")
    return Plan(key=found, facts=facts, data=plan, source=source)


def load_key(path: Path, *, generate: bool) -> bytes:
    """The key in a file. One that is missing is made, for this user alone, where `generate` says so.

    Raises EngineError for a key that is missing, too short, or (a generated one) readable by others.
    """
    if generate and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES_MIN))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was faster: its key is the one
            os.link(temporary, path)
        temporary.unlink()
        fsync_directory(path.parent)
    try:
        key = path.read_bytes()
        mode = path.stat().st_mode
    except OSError as error:
        raise EngineError(f"the key of the engine cache cannot be read: {error}") from None
    if len(key) < KEY_BYTES_MIN:
        raise EngineError(f"{path} holds {len(key)} bytes; a key has {KEY_BYTES_MIN} at least")
    if generate and mode & 0o077:
        raise EngineError(f"others may read {path} (mode {mode & 0o777:o}): make it 0600, or delete it")
    return key


@dataclass(slots=True, kw_only=True)
class CacheCounts:
    """What happened since the start."""

    hits: int = 0
    misses: int = 0
    refused: int = 0
    evicted: int = 0


class EngineCache:
    """Engines under `root`, made when missing, that are at most `bytes_max` together.

    Args:
        key: of the MAC; see load_key. refused: is told of every file that was not believed, with the reason.
    """

    def __init__(
        self, root: Path, key: bytes, *, bytes_max: int, refused: Callable[[str], None] = lambda _reason: None
    ) -> None:
        self._root = root
        self._key = key
        self._bytes_max = bytes_max
        self._refused = refused
        self._lock = threading.Lock()
        self.counts = CacheCounts()
        root.mkdir(parents=True, exist_ok=True)
        for path in root.glob("*.part"):
            path.unlink(missing_ok=True)

    def get(self, key: PlanKey) -> Plan | None:
        """The engine for a key, None when there is none that can be believed."""
        path = self._path(key)
        try:
            plan = opened(path.read_bytes(), self._key, key, source="cache")
        except FileNotFoundError:
            self.counts.misses += 1
            return None
        except (OSError, NotBelieved) as error:
            self.counts.misses += 1
            self.counts.refused += 1
            _LOG.warning("an engine on disk is not believed", extra={"file": path.name, "why": str(error)})
            self._refused(str(error))
            path.unlink(missing_ok=True)
            return None
        self.counts.hits += 1
        with contextlib.suppress(OSError):
            os.utime(path)
        return plan

    def has(self, key: PlanKey) -> bool:
        """Whether there is a file for it; whether it can be believed shows when it is read."""
        return self._path(key).exists()

    def put(self, plan: Plan) -> None:
        """Keep an engine; others make room for it. One that is larger than all the room is not kept."""
        data = sealed(plan, self._key)
        if len(data) > self._bytes_max:
            _LOG.warning("an engine is too large for the cache", extra={"bytes": len(data), "room": self._bytes_max})
            return
        path = self._path(plan.key)
        temporary = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.part")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(self._root)
        self._make_room()

    def scratch(self) -> Path:
        """A file of one's own to write a plan to; delete it."""
        return self._root / f"{secrets.token_hex(8)}.part"

    def entries(self) -> Mapping[str, int]:
        """Bytes by digest of the key, longest unused first."""
        return {path.stem: size for _, size, path in self._files()}

    def _path(self, key: PlanKey) -> Path:
        return self._root / (key.digest + SUFFIX)

    def _files(self) -> list[tuple[float, int, Path]]:
        found = []
        for path in self._root.glob("*" + SUFFIX):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                found.append((state.st_mtime, state.st_size, path))
        return sorted(found, key=lambda each: (each[0], each[2].name))

    def _make_room(self) -> None:
        with self._lock:
            files = self._files()
            total = sum(size for _, size, _ in files)
            for _, size, path in files:
                if total <= self._bytes_max:
                    return
                path.unlink(missing_ok=True)
                self.counts.evicted += 1
                total -= size


def read_plan(path: Path, facts: PlanFacts) -> bytes:
    """The plan that a compiler wrote, held against what it said of it. Raises EngineError."""
    data = path.read_bytes()
    if len(data) != facts.size or hashlib.sha256(data).hexdigest() != facts.sha256:
        raise EngineError("the compiler's process wrote another plan than it said")
    return data


def describe(plan: Plan) -> dict[str, Any]:
    """What is known of a plan, for a log line."""
    return {"source": plan.source, "bytes": plan.facts.size, "precisions": list(plan.facts.precisions)}
