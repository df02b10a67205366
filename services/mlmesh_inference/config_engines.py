"""What an inference process was told about compiled engines; read once from the environment mapping."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mlmesh_runtime.config import ConfigError, Variable

VARIABLES: tuple[Variable, ...] = (
    Variable(name="MLMESH_GPU", default="0", meaning="GPU that TensorRT engines run on, by its number."),
    Variable(
        name="MLMESH_TENSORRT_INSTANCES",
        default="1",
        meaning="Batches of one TensorRT engine that run at once, each with memory of its own on the GPU.",
    ),
    Variable(
        name="MLMESH_TENSORRT_GRAPHS",
        default="1",
        meaning="0: TensorRT engines run without CUDA graphs.",
    ),
    Variable(
        name="MLMESH_TENSORRT_CAPABILITIES",
        default="",
        meaning=(
            "Compute capabilities that TensorRT for RTX compiles for, a comma list such as SM86,SM89. Empty: its "
            "default, Ampere and later."
        ),
    ),
    Variable(
        name="MLMESH_ENGINE_BUILD",
        default="auto",
        meaning=(
            "auto: where there is a GPU, an engine is built for every version while another engine serves it; manual: "
            "only when BuildEngine asks."
        ),
    ),
    Variable(
        name="MLMESH_ENGINE_CACHE_BYTES",
        default="8589934592",
        meaning="Most bytes of compiled engines on disk, under the data folder; the longest unused go first.",
    ),
    Variable(
        name="MLMESH_ENGINE_CACHE_KEY_FILE",
        default="",
        meaning=(
            "File whose bytes (32 or more) authenticate compiled engines on disk. Empty: one is made in the data "
            "folder, readable by its owner alone."
        ),
    ),
    Variable(
        name="MLMESH_ENGINE_SHARE",
        default="off",
        meaning=(
            "Compiled engines in the registry, between processes that have the same key. take: use what others "
            "built; offer: also upload what is built here."
        ),
    ),
    Variable(
        name="MLMESH_ENGINE_SHARE_KEY_FILE",
        default="",
        meaning="File whose bytes (32 or more) authenticate shared engines; no engine without this key's MAC is used.",
    ),
)

_COUNT_MAX: Final = 1 << 50
_CAPABILITY: Final = re.compile(r"SM[0-9]{2,3}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How engines are compiled, kept and shared. Files are as they were named; nothing is read here.

    Attributes:
        gpu: ordinal. instances: batches at once. graphs: whether CUDA graphs are used.
        automatic: whether builds begin by themselves.
        cache_key_file, share_key_file: None when not said.
    """

    gpu: int = 0
    instances: int = 1
    graphs: bool = True
    capabilities: tuple[str, ...] = ()
    automatic: bool = True
    cache_bytes: int = 8 << 30
    cache_key_file: Path | None = None
    takes: bool = False
    offers: bool = False
    share_key_file: Path | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> EngineSettings:
        """Read and check. Raises ConfigError that names the variable."""
        share = _choice(environ, "MLMESH_ENGINE_SHARE", ("off", "take", "offer"))
        share_key = _path(environ, "MLMESH_ENGINE_SHARE_KEY_FILE")
        if share != "off" and share_key is None:
            raise ConfigError("MLMESH_ENGINE_SHARE_KEY_FILE: sharing engines needs a key; it is empty")
        return cls(
            gpu=_count(environ, "MLMESH_GPU", least=0, most=1023),
            instances=_count(environ, "MLMESH_TENSORRT_INSTANCES", most=64),
            graphs=_choice(environ, "MLMESH_TENSORRT_GRAPHS", ("1", "0")) == "1",
            capabilities=_capabilities(environ),
            automatic=_choice(environ, "MLMESH_ENGINE_BUILD", ("auto", "manual")) == "auto",
            cache_bytes=_count(environ, "MLMESH_ENGINE_CACHE_BYTES"),
            cache_key_file=_path(environ, "MLMESH_ENGINE_CACHE_KEY_FILE"),
            takes=share != "off",
            offers=share == "offer",
            share_key_file=share_key,
        )


def _count(environ: Mapping[str, str], name: str, *, least: int = 1, most: int = _COUNT_MAX) -> int:
    default = next(variable.default for variable in VARIABLES if variable.name == name)
    text = environ.get(name, "").strip() or default
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ConfigError(f"{name}: expected a number from {least} to {most}; got {text[:32]!r}")
    return int(text)


def _choice(environ: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    text = environ.get(name, "").strip().lower() or choices[0]
    if text not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}; got {text[:32]!r}")
    return text


def _path(environ: Mapping[str, str], name: str) -> Path | None:
    text = environ.get(name, "").strip()
    return Path(text) if text else None


def _capabilities(environ: Mapping[str, str]) -> tuple[str, ...]:
    name = "MLMESH_TENSORRT_CAPABILITIES"
    found = tuple(part.strip().upper() for part in environ.get(name, "").split(",") if part.strip())
    for each in found:
        if not _CAPABILITY.fullmatch(each):
            raise ConfigError(f"{name}: expected a comma list such as SM86,SM89; got {each[:32]!r}")
    return found
