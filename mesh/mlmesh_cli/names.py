"""Names of models as people type them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlmesh_cli.errors import usage_error

_REFERENCE = re.compile(
    r"^(?:models/)?(?P<model>[a-z0-9][a-z0-9-]{0,62})(?:/(?P<version>[1-9][0-9]*)|@(?P<alias>[a-z][a-z0-9-]*))?$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReference:
    """MODEL, MODEL/3 or MODEL@stable."""

    model: str
    version: str = ""
    alias: str = ""

    @property
    def parent(self) -> str:
        """models/{model}"""
        return f"models/{self.model}"

    @property
    def version_name(self) -> str:
        """models/{model}/versions/{n} or models/{model}/aliases/{alias}; empty for the model alone."""
        if self.version:
            return f"{self.parent}/versions/{self.version}"
        return f"{self.parent}/aliases/{self.alias}" if self.alias else ""


def parse_model(text: str) -> ModelReference:
    """Reads MODEL, MODEL/VERSION or MODEL@ALIAS. Raises CliError (exit code 2) for anything else."""
    match = _REFERENCE.match(text)
    if match is None:
        raise usage_error(
            f"{text!r} does not name a model", "write MODEL, MODEL/VERSION or MODEL@ALIAS, such as mnist@stable"
        )
    return ModelReference(model=match["model"], version=match["version"] or "", alias=match["alias"] or "")


_SIZE = re.compile(r"(?P<count>\d+(?:\.\d+)?)\s*(?P<unit>[KMGTP]iB|B)?", re.ASCII)


def parse_size(text: str) -> int:
    """Reads bytes: 1000, 500MiB, 1.5TiB. Raises CliError (exit code 2) for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise usage_error(f"{text!r} is no size", "such as 1000, 500MiB or 2TiB")
    power = "BKMGTP".index((match["unit"] or "B")[0])
    return int(float(match["count"]) * 1024**power)


def parse_pairs(texts: list[str], option: str) -> dict[str, str]:
    """Reads key=value texts. Raises CliError (exit code 2) that names the option."""
    result = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise usage_error(f"{option} wants NAME=VALUE, not {text!r}", f"such as {option} name=value")
        result[key] = value
    return result
