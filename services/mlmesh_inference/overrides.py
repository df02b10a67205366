"""What a load by hand says about a model, instead of the model's own configuration and files. Pure values.

An override holds until the model is loaded or unloaded by hand again, or the process ends; nothing of it is kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from mlmesh_inference.desired import ModelFile, RegistryView, VersionRecord, Wanted
from mlmesh_inference.serving import ServingConfig
from mlmesh_runtime.errors import InvalidInput

FILE_PREFIX: Final = "file:"
"""Parameters of a load that carry files begin so; "VERSION/NAME" follows."""
FILES_MAX: Final = 64
_FILE: Final = re.compile(
    r"^(?P<version>[1-9][0-9]{0,17})/(?P<path>[A-Za-z0-9][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9][A-Za-z0-9._-]{0,127}){0,7})$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """How a model is to be loaded: the configuration, and its files by version and path where they were sent along."""

    config: ServingConfig
    files: Mapping[int, Mapping[str, bytes]] = field(default_factory=dict)


def file_of(parameter: str) -> tuple[int, str]:
    """(version, path) of a parameter "file:VERSION/PATH". Raises InvalidInput for what could leave the folder."""
    match = _FILE.fullmatch(parameter.removeprefix(FILE_PREFIX))
    if match is None:
        raise InvalidInput(
            f"Invalid file path {parameter[:64]!r}, expected file:VERSION/NAME", field=f"parameters[{parameter[:64]}]"
        )
    return int(match["version"]), match["path"]


def uploaded(model: str, override: Override) -> tuple[VersionRecord, ...]:
    """The versions that an override brings along, newest first; hashes every file. Blocking."""
    return tuple(
        VersionRecord(
            model=model,
            version=version,
            files=tuple(
                ModelFile(path=path, sha256=hashlib.sha256(data).hexdigest(), size=len(data))
                for path, data in sorted(files.items())
            ),
        )
        for version, files in sorted(override.files.items(), reverse=True)
    )


def overlaid(view: RegistryView | None, records: Mapping[str, tuple[VersionRecord, ...]]) -> RegistryView | None:
    """The registry's view with the versions of some models replaced by those that loads brought along."""
    if not any(records.values()):
        return view
    view = view or RegistryView()
    kept = {key: record for key, record in view.versions.items() if not records.get(key[0])}
    new = {(record.model, record.version): record for brought in records.values() for record in brought}
    return replace(
        view, versions={**kept, **new}, datasets=view.datasets - {model for model in records if records[model]}
    )


def chosen(model: str, config: ServingConfig | None, view: RegistryView, usual: Wanted | None) -> Wanted | None:
    """Versions to serve under a configuration: those of its version_policy, else the usual ones, else the newest.

    The highest number answers requests that name none, as the policy's own rule is. None: there is no such version.
    """
    numbers = view.numbers(model)
    policy = config.versions if config is not None else None
    if policy is None:
        if usual is not None and set(usual.versions) <= set(numbers):
            return usual
        picked = numbers[:1]
    elif policy.numbers:
        picked = [number for number in policy.numbers if number in numbers]
    else:
        picked = numbers[: policy.latest] if policy.latest else numbers
    return Wanted(versions=tuple(picked), default=picked[0]) if picked else None
